"""What form a chat's answer must or may have: ``response_format``, ``tools`` and ``tool_choice`` become a grammar."""

from __future__ import annotations

import json
from collections.abc import Mapping

import msgspec
from modelbus_broker.errors import InvalidRequest, UnsupportedField
from modelbus_broker.messages import Chat

from .call_formats import CallFormat

#: Blanks between the parts of JSON: models like to indent, and small ones would indent for ever.
_BLANKS = r"[\x20\x0A\x0D\x09]{1,40}"


class Schema(msgspec.Struct, frozen=True, kw_only=True):
    """A JSON schema inside a grammar, and the field of the request that it came from."""

    rule: str
    param: str
    text: str


class AnswerForm(msgspec.Struct, frozen=True, kw_only=True):
    """How one answer is held to a form and read."""

    calls: CallFormat | None = None  #: the answer may have calls, written like this
    tools: frozenset[str] = frozenset()  #: their names
    one_call: bool = False  #: the answer ends after the first
    forced: bool = False  #: the answer is calls and nothing else
    rules: str = ""  #: of a Lark grammar without the schemas; "": the model may write what it likes
    param: str = ""  #: the field of the request that the rules came from, where they have no schemas
    schemas: tuple[Schema, ...] = ()

    @property
    def grammar(self) -> str:
        """All of the grammar; "" if there is none."""
        return "\n".join([self.rules, *(f"{schema.rule}: %json {schema.text}" for schema in self.schemas)]).strip()


def answer_form(task: Chat, format: CallFormat | None, tokens: Mapping[str, int]) -> AnswerForm:
    """The form of an answer.

    Args:
        task: the request.
        format: how the model writes calls; None: it cannot call tools.
        tokens: words that are tokens of their own in the model's vocabulary, which a grammar must name by their id.

    Raises:
        InvalidRequest: ``tools``, ``tool_choice`` or ``response_format`` make no sense.
        UnsupportedField: calls of this model cannot be read.
    """
    answer = _response_schema(task)
    names = _tool_names(task)
    if not names or task.tool_choice == "none":
        if task.tool_choice not in (None, "none", "auto"):
            raise InvalidRequest("'tool_choice' is only allowed when 'tools' are specified", param="tool_choice")
        return AnswerForm(rules="start: answer", schemas=(answer,)) if answer else AnswerForm()
    if format is None:
        raise UnsupportedField(
            "it is not known how this model writes tool calls; the deployment can say it with tool_parser",
            param="tools",
        )
    forced = _forced(task, names)
    form = AnswerForm(
        calls=format, tools=frozenset(names), one_call=task.parallel_tool_calls is False or isinstance(task.tool_choice, dict)
    )  # fmt: skip
    if not forced and answer is None:
        return form
    schemas = tuple(_arguments(task, index) for index, name in enumerate(names) if name in (forced or names))
    rules = ["start: calls" if forced else "start: calls | answer"]
    rules += _call_rules(format, {schema.rule: names[_index(schema)] for schema in schemas}, tokens, form.one_call)
    return msgspec.structs.replace(
        form,
        forced=bool(forced),
        rules="\n".join(rules),
        schemas=schemas if forced or answer is None else (*schemas, answer),
    )


def _response_schema(task: Chat) -> Schema | None:
    wanted = task.response_format or {}
    match wanted.get("type", "text"):
        case "text":
            return None
        case "json_object":
            schema: object = {"type": "object"}
        case "json_schema":
            inner = wanted.get("json_schema")
            schema = inner.get("schema") if isinstance(inner, dict) else None
            if not isinstance(schema, dict):
                raise InvalidRequest(
                    "Missing required parameter: 'response_format.json_schema.schema'.", param="response_format"
                )
        case kind:
            raise UnsupportedField(f"this engine cannot hold a model to {kind}", param="response_format")
    return Schema(rule="answer", param="response_format", text=schema_text(schema, lenient=False))


def _tool_names(task: Chat) -> list[str]:
    names = []
    for index, tool in enumerate(task.tools or ()):
        function = tool.get("function")
        name = function.get("name") if isinstance(function, dict) else None
        if not isinstance(name, str) or not name:
            raise InvalidRequest(f"'tools[{index}]' is no function with a name", param=f"tools[{index}].function")
        names.append(name)
    return names


def _forced(task: Chat, names: list[str]) -> list[str]:
    """The tools of which one must be called; none: the model decides."""
    match task.tool_choice:
        case None | "auto":
            return []
        case "required":
            return names
        case {"function": {"name": str(name)}} if name in names:
            return [name]
    raise InvalidRequest(
        "'tool_choice' must be none, auto, required or the name of one of the tools", param="tool_choice"
    )


def _arguments(task: Chat, index: int) -> Schema:
    function = (task.tools or [])[index]["function"]
    schema = function.get("parameters")
    if schema is not None and not isinstance(schema, dict):
        raise InvalidRequest(
            "the parameters of a function are a JSON schema", param=f"tools[{index}].function.parameters"
        )
    # Of arguments a schema may say what no grammar can, unless the client wants to rely on it.
    text = schema_text({"type": "object"} | (schema or {}), lenient=not function.get("strict"))
    return Schema(rule=f"arguments_{index}", param=f"tools[{index}].function.parameters", text=text)


def _index(schema: Schema) -> int:
    return int(schema.rule.rpartition("_")[2])


def schema_text(schema: object, *, lenient: bool) -> str:
    """A schema as the grammar has it; ``lenient``: what it says beyond what a grammar can is left out."""
    assert isinstance(schema, dict)
    own = {"x-guidance": {"whitespace_pattern": _BLANKS, "lenient": lenient}}
    return json.dumps({name: value for name, value in schema.items() if name != "x-guidance"} | own)


def _call_rules(format: CallFormat, names: Mapping[str, str], tokens: Mapping[str, int], one: bool) -> list[str]:
    """Rules for ``calls``; ``names``: the tools, by the rules of their arguments."""
    calls = [_literal(format.opening, tokens), "call"]
    if not one:
        calls.append(f"({_literal(format.joint, tokens)} call)*")
    calls.append(_literal(format.closing, tokens))
    before, middle, after = (
        _literal(text, tokens) for text in (format.before_name, format.before_arguments, format.after)
    )
    bodies = []
    for rule, name in names.items():
        written = name if format.before_arguments.startswith("[") else json.dumps(name)[1:-1]
        bodies.append(" ".join([before, _literal(written, {}), middle, rule, after]))
    return ["calls: " + " ".join(calls), "call: " + " | ".join(bodies)]


def _literal(text: str, tokens: Mapping[str, int]) -> str:
    """A text in a grammar; words that are tokens of their own are named by their id."""
    for word, token in tokens.items():
        before, found, after = text.partition(word)
        if found:
            parts = [_literal(before, tokens), f"<[{token}]>", _literal(after, tokens)]
            return " ".join(part for part in parts if part)
    return json.dumps(text, ensure_ascii=False) if text else ""
