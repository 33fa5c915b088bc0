"""Return annotations as the forms of answers: what is asked of a model, and what its answer becomes."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, Generic, Literal, TypeVar, get_origin

import msgspec
from modelbus_broker.errors import InvalidRequest, OutputError
from modelbus_broker.messages import ChatMessage, Ladder, ToolCall

from ..decisions.decision import Decision
from .annotations import understand
from .instances import instances
from .lenient import NoJSON, find_json, without_thinking
from .nodes.base import Definitions, Node, Reading
from .nodes.constraints import AnnotatedNode
from .nodes.containers import DictNode, ListNode, TupleNode, UnionNode
from .nodes.scalars import AnyNode, ChoiceNode, ScalarNode
from .partial import MISSING
from .replies import Reply, with_words
from .schemas import Schema, bounded, is_strict, plain

T = TypeVar("T")

#: What an annotation asks for.
Kind = Literal["text", "scalar", "choice", "object", "list", "union", "any", "tool_call", "tool_calls"]

_WRAP = "value"
_NUMBER = re.compile(r"(?<![\w.])-?\d[\d,]*(?:\.\d+)?(?:[eE][+-]?\d+)?(?![\w])")


class OutputType(Generic[T]):
    """The type of an answer.

    Attributes:
        annotation: as the user wrote it.
        kind: what it asks for; ``text`` is any text, and everything else is JSON.
        schema: the JSON Schema of its values, in the order of the fields, without references where possible.
        name: for people and for ``response_format``.
    """

    #: Its answers are calls of tools, which many models have a way of their own for.
    about_tools = False

    def __init__(self, annotation: Any, node: Node, kind: Kind, validators: Sequence[Callable[[T], Any]] = ()) -> None:
        defs = Definitions()
        own = node.schema(defs)
        self.annotation = annotation
        self.kind: Kind = kind
        self.schema: Schema = plain({**own, "$defs": dict(defs)} if defs else own)
        self.name = _name(annotation)
        self._node = node
        self._validators = tuple(validators)

    def __repr__(self) -> str:
        return f"OutputType({self.name})"

    def with_validators(self, *validators: Callable[[T], Any]) -> OutputType[T]:
        """A copy whose values must pass these functions too.

        A validator raises :class:`Retry` (or any ValueError) with words for the model, or returns the value to take in
        place of the one it got (None: the same).
        """
        return OutputType(self.annotation, self._node, self.kind, (*self._validators, *validators))

    @property
    def item(self) -> OutputType[Any] | None:
        """The type of the items, if this is a list."""
        node = self._node
        if not isinstance(node, ListNode):
            return None
        return OutputType(Any, node.item, _kind(node.item))

    # Asking

    def response_format(self, ladder: Ladder) -> dict[str, Any]:
        """For a grammar, or a provider that holds its model to a schema: always an object, and everything has an end."""
        schema = bounded(self.schema, ladder.max_string, ladder.max_items)
        if schema.get("type") != "object":
            definitions = {"$defs": schema.pop("$defs")} if "$defs" in schema else {}
            schema = {
                "type": "object", "properties": {_WRAP: schema}, "required": [_WRAP], "additionalProperties": False, **definitions,
            }  # fmt: skip
        name = re.sub(r"\W+", "_", self.name)[:64] or "answer"
        return {"type": "json_schema", "json_schema": {"name": name, "schema": schema, "strict": is_strict(schema)}}

    def fields(self, ladder: Ladder, *, native: bool) -> dict[str, Any]:
        """Fields of a chat that ask for the form: of the model's own way, or of a grammar."""
        return {"response_format": self.response_format(ladder)}

    def examples(self, count: int) -> list[str]:
        """Generated answers, as JSON texts."""
        return [msgspec.json.encode(value).decode() for value in instances(self.schema, count) if self.accepts(value)]

    def instructions(self, ladder: Ladder, *, grammar: bool) -> str:
        """What a model is told of the form; ``grammar``: and it can write nothing else."""
        lines = [
            "Answer with JSON only, and nothing before or after it. It must fit this JSON Schema:",
            msgspec.json.encode(self._shown()).decode(),
        ]
        examples = [] if grammar else self.examples(ladder.examples)
        if examples:
            lines += ["Examples of the form, with made-up content:", *examples]
        return "\n".join(lines)

    def told(self, messages: Sequence[ChatMessage], ladder: Ladder, *, grammar: bool) -> list[ChatMessage]:
        """The conversation, with words about the form at its end."""
        return with_words(messages, self.instructions(ladder, grammar=grammar))

    def complaint(self, reply: Reply, said: ChatMessage, error: OutputError, *, native: bool) -> list[ChatMessage]:
        """What the model is told of its wrong answer."""
        problems = "\n".join(f"- {problem}" for problem in error.problems or [error.message])
        words = f"This answer is not right:\n{problems}\nWrite all of the answer again, corrected, as JSON only."
        return [ChatMessage(role="user", content=words)]

    def _shown(self) -> Schema:
        return {key: value for key, value in self.schema.items() if key != "title"}

    # Reading

    def read(self, reply: Reply) -> T:
        """The value in a model's reply.

        Raises:
            OutputError: there is none, or it is not right; see :meth:`validate`.
        """
        if reply.refusal:
            raise OutputError(f"the model refuses: {reply.refusal}", raw=reply.refusal, problems=[reply.refusal])
        return self.parse(reply.text, cut=reply.finish_reason == "length")

    def parse(self, text: str, *, cut: bool = False) -> T:
        """The value in a model's text, however it is wrapped: see ``lenient``.

        Args:
            cut: the text ended because the model was out of tokens.

        Raises:
            OutputError: there is none, or it is not right; see :meth:`validate`.
        """
        if self.kind == "text":
            return self._validated(text, text)
        opening = {"object": "{", "array": "["}.get(str(self.schema.get("type")), "{[")
        if _WRAP not in self.schema.get("properties", ()):
            opening = "{["
        try:
            found = find_json(
                text, opening=opening, accept=self.accepts, scalars=self.kind in ("scalar", "choice", "union", "any")
            )
        except NoJSON as error:
            value = self._from_words(without_thinking(text).strip()) if not cut else MISSING
            if value is not MISSING:
                return self._validated(value, text)
            words = "the answer was cut off before it had a JSON value" if cut else f"the answer is no JSON: {error}"
            raise OutputError(words, raw=text, problems=[words]) from None
        if found.cut:
            words = (
                "the answer was cut off in the middle: write a shorter one"
                if cut
                else "the answer ends in the middle of the JSON"
            )
            raise OutputError(words, raw=text, problems=[words])
        value = (
            self._from_words(str(found.value))
            if isinstance(found.value, str) and not self.accepts(found.value)
            else MISSING
        )
        return self._validated(found.value if value is MISSING else value, text)

    def validate(self, data: Any) -> T:
        """The value of decoded JSON.

        Raises:
            OutputError: it does not fit; ``problems`` says what and where, in words that a model understands too.
        """
        return self._validated(data, "")

    def _validated(self, data: Any, raw: str) -> T:
        reading = Reading()
        value = self._node.read(self._unwrapped(data), "", reading)
        if value is not MISSING and not reading.problems:
            for validator in self._validators:
                try:
                    changed = validator(value)
                except (ValueError, AssertionError) as error:
                    reading.wrong("", str(error) or type(error).__name__)
                    break
                value = value if changed is None else changed
        if reading.problems:
            words = "; ".join(reading.problems)
            raise OutputError(f"the answer does not fit {self.name}: {words}", raw=raw, problems=reading.problems)
        result: T = value
        return result

    def accepts(self, data: Any) -> bool:
        """Whether decoded JSON fits, the user's validators aside."""
        reading = Reading()
        return self._node.read(self._unwrapped(data), "", reading) is not MISSING and not reading.problems

    def _unwrapped(self, data: Any) -> Any:
        """What :meth:`response_format` wraps."""
        wrapped = isinstance(data, dict) and data.keys() == {_WRAP} and self.schema.get("type") != "object"
        return data[_WRAP] if wrapped else data

    def _from_words(self, text: str) -> Any:
        """A value that stands in words, when one and only one does; else MISSING."""
        node = self._node._node if isinstance(self._node, AnnotatedNode) else self._node
        if isinstance(node, ChoiceNode):
            bare = text.strip(" \t\r\n.\"'`*!")
            same = [t for t in node.texts if t.casefold() == bare.casefold()]
            named = same or [t for t in node.texts if re.search(rf"(?<!\w){re.escape(t)}(?!\w)", text, re.IGNORECASE)]
            # "not spam" names "spam" as well: the longest name that holds the others is meant.
            longest = max(named, key=len, default="")
            return longest if named and all(t.casefold() in longest.casefold() for t in named) else MISSING
        if isinstance(node, UnionNode) and any(
            node.read(text, "", Reading(strict=True)) is not MISSING for node in node.options
        ):
            return text
        if not isinstance(node, ScalarNode):
            return MISSING
        kind = self.schema.get("type")
        if kind == "boolean":
            words = {word for word in re.findall(r"[a-z]+", text.casefold()) if word in ("true", "false", "yes", "no")}
            return words.pop() in ("true", "yes") if len(words) == 1 else MISSING
        reading = Reading()
        if node.read(text, "", reading) is not MISSING:
            return text
        numbers = set(_NUMBER.findall(text)) if kind in ("integer", "number") else set()
        return numbers.pop() if len(numbers) == 1 else MISSING


def output_type(annotation: Any) -> OutputType[Any]:
    """The type of an answer for a return annotation: any text for ``str``, JSON for everything else.

    Scalars (int, float, bool, date, time, datetime, Decimal, UUID), Literal, Enum, pydantic models, dataclasses, TypedDict,
    NamedTuple, msgspec Structs, list, tuple, set, dict, unions, Optional, Any; with ``Annotated`` for descriptions, bounds
    and validators. It is understood once and remembered.

    Raises:
        InvalidRequest: no answer of a model can become this type.
    """
    if isinstance(annotation, OutputType):
        return annotation
    try:
        return _remembered(annotation)
    except TypeError:  # not hashable: Annotated with a list inside
        return _made(annotation)


def _made(annotation: Any) -> OutputType[Any]:
    if annotation is ToolCall or annotation == list[ToolCall]:
        raise InvalidRequest("a ToolCall needs tools to choose from: use structure.tool_calls(tools)")
    if annotation is Decision or get_origin(annotation) is Decision:
        from ..decisions.output import DecisionType

        return DecisionType(annotation)
    node = understand(annotation)
    return OutputType(annotation, node, "text" if annotation is str else _kind(node))


#: ``bool`` and ``int`` are told apart: True == 1.
_remembered = lru_cache(maxsize=1024, typed=True)(_made)


def _kind(node: Node) -> Kind:
    match node:
        case AnnotatedNode():
            return _kind(node._node)
        case ScalarNode():
            return "scalar"
        case ChoiceNode():
            return "choice"
        case ListNode() | TupleNode():
            return "list"
        case UnionNode():
            return "union"
        case AnyNode():
            return "any"
        case DictNode():
            return "object"
    return "object"


def _name(annotation: Any) -> str:
    plain_class = isinstance(annotation, type) and not hasattr(annotation, "__args__")
    return (
        annotation.__name__
        if plain_class
        else re.sub(r"\b[\w.]+\.(?=\w)", "", str(annotation).replace("<locals>.", ""))
    )
