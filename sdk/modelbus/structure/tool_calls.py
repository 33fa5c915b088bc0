"""Calls of tools as the form of an answer, for models that have no way of their own to call them."""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import msgspec
from modelbus_broker.errors import InvalidRequest, OutputError
from modelbus_broker.messages import ChatMessage, FunctionCall, Ladder, ToolCall

from .lenient import NoJSON, find_json, without_thinking
from .nodes.scalars import AnyNode
from .output_types import OutputType
from .replies import Reply
from .schemas import Schema, bounded, coerced, plain, schema_reader
from .tool_prompts import ToolForm, encoded, tool_words, with_tools

#: What a model calls, or the text that it answers with in place of a call.
Calls = list[ToolCall] | str

_NO_PARAMETERS: Schema = {"type": "object", "properties": {}}
#: How models name what a call is made of.
_NAMES, _ARGUMENTS = ("name", "tool", "function", "tool_name"), ("arguments", "parameters", "args", "input")
_ANSWERS = ("answer", "response", "text", "content")


def tool_forms(tools: Sequence[Any]) -> list[ToolForm]:
    """Tools in the form of the OpenAI API, or any objects with ``name``, ``description`` and ``parameters``.

    Raises:
        InvalidRequest: one is no function with a name, two have the same name, or a schema is wrong.
    """
    forms: list[ToolForm] = []
    for index, tool in enumerate(tools):
        function = tool.get("function", tool) if isinstance(tool, Mapping) else None
        if function is None:
            function = {"name": tool.name, "description": tool.description, "parameters": tool.parameters}
        name = function.get("name") if isinstance(function, Mapping) else None
        if not isinstance(name, str) or not name:
            raise InvalidRequest(f"'tools[{index}]' is no function with a name", param=f"tools[{index}].function")
        if any(form.name == name for form in forms):
            raise InvalidRequest(f"two tools have the name {name!r}", param=f"tools[{index}].function.name")
        param = f"tools[{index}].function.parameters"
        given = function.get("parameters") or _NO_PARAMETERS
        if not isinstance(given, Mapping):
            raise InvalidRequest("the parameters of a function are a JSON schema", param=param)
        parameters = {"type": "object", **given}
        reader = schema_reader(parameters, param)
        forms.append(
            ToolForm(name=name, description=function.get("description") or "", parameters=parameters, reader=reader)
        )
    return forms


def chosen(forms: Sequence[ToolForm], choice: Any) -> tuple[list[ToolForm], bool]:
    """The tools that may be called by an OpenAI ``tool_choice``, and whether one of them must be.

    Raises:
        InvalidRequest: the choice is none of auto, none, required and the name of a tool.
    """
    match choice:
        case None | "auto":
            return list(forms), False
        case "none":
            return [], False
        case "required":
            return list(forms), True
        case {"function": {"name": str(name)}} | {"name": str(name)} | str(name):
            named = [form for form in forms if form.name == name]
            if named:
                return named, True
    raise InvalidRequest(
        "'tool_choice' must be none, auto, required or the name of one of the tools", param="tool_choice"
    )


class ToolCallsOutput(OutputType[Calls]):
    """An answer that is calls of tools or, where no tool must be called, a text.

    The value is a list of calls, their arguments as JSON texts that fit the tools' schemas, or the text.
    """

    about_tools = True

    def __init__(
        self,
        tools: Sequence[Any],
        choice: Any,
        parallel: bool,
        call_id: Callable[[int], str],
        validators: Sequence[Callable[[Calls], Any]] = (),
        answer: OutputType[Any] | None = None,
    ) -> None:
        """``answer``: the form of an answer that calls no tool; None: a text."""
        self.tools, self.choice, self.parallel, self.answer = list(tools), choice, parallel, answer
        self.forms, self.must = chosen(tool_forms(tools), choice)
        if not self.forms:
            raise InvalidRequest("there is no tool to call", param="tools")
        self._call_id = call_id
        super().__init__(Calls, AnyNode(), "tool_calls", validators)
        self.name = "a call of a tool"
        self.schema = self._calls_schema()

    def with_validators(self, *validators: Callable[[Calls], Any]) -> ToolCallsOutput:
        return ToolCallsOutput(
            self.tools, self.choice, self.parallel, self._call_id, (*self._validators, *validators), self.answer
        )

    def only(self, index: int) -> ToolCallsOutput:
        """With one of the tools, where they are not chosen by name."""
        choice = "required" if self.must else "auto"
        return ToolCallsOutput([self.tools[index]], choice, self.parallel, self._call_id, self._validators, self.answer)

    def _calls_schema(self) -> Schema:
        definitions: Schema = {}
        calls = []
        for number, form in enumerate(self.forms):
            parameters = _hoisted(plain(form.parameters), f"tool{number}_", definitions)
            calls.append({
                "type": "object", "properties": {"name": {"const": form.name}, "arguments": parameters},
                "required": ["name", "arguments"], "additionalProperties": False,
            })  # fmt: skip
        options: list[Schema] = list(calls)
        if self.parallel:
            options.append({"type": "array", "items": {"anyOf": calls}, "minItems": 1, "maxItems": 8})
        if not self.must:
            answer = _hoisted(self.answer.schema, "answer_", definitions) if self.answer else {"type": "string"}
            options.append({
                "type": "object", "properties": {"answer": answer}, "required": ["answer"], "additionalProperties": False,
            })  # fmt: skip
        return {"anyOf": options, **({"$defs": definitions} if definitions else {})}

    # Asking

    def response_format(self, ladder: Ladder) -> dict[str, Any]:
        schema = bounded(self.schema, ladder.max_string, ladder.max_items)
        return {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}}

    def fields(self, ladder: Ladder, *, native: bool) -> dict[str, Any]:
        if not native:
            return super().fields(ladder, native=False)
        tools = [tool if isinstance(tool, Mapping) else self._as_mapping(tool.name) for tool in self.tools]
        choice = self.choice
        if isinstance(choice, str) and choice not in ("auto", "none", "required"):
            choice = {"type": "function", "function": {"name": choice}}
        named = {} if choice is None else {"tool_choice": choice}
        return {"tools": tools, **named, **({} if self.parallel else {"parallel_tool_calls": False})}

    def _as_mapping(self, name: str) -> dict[str, Any]:
        form = next(form for form in self.forms if form.name == name)
        function = {"name": form.name, "description": form.description, "parameters": form.parameters}
        return {"type": "function", "function": function}

    def instructions(self, ladder: Ladder, *, grammar: bool) -> str:
        answer = self.answer.schema if self.answer is not None else None
        return tool_words(self.forms, must=self.must, parallel=self.parallel, answer=answer)

    def told(self, messages: Sequence[ChatMessage], ladder: Ladder, *, grammar: bool) -> list[ChatMessage]:
        """The conversation with the tools before it. ``ladder.examples``: of tools there is one each, or none."""
        words = self.instructions(ladder, grammar=grammar)
        return with_tools(messages, words, self.forms, must=self.must, examples=ladder.examples)

    def complaint(self, reply: Reply, said: ChatMessage, error: OutputError, *, native: bool) -> list[ChatMessage]:
        if not (native and said.tool_calls):
            return super().complaint(reply, said, error, native=native)
        words = "This call is not right: " + "; ".join(error.problems or [error.message]) + ". Call again, corrected."
        return [ChatMessage(role="tool", tool_call_id=call.id, content=words) for call in said.tool_calls]

    # Reading

    def read(self, reply: Reply) -> Calls:
        if reply.refusal:
            raise OutputError(f"the model refuses: {reply.refusal}", raw=reply.refusal, problems=[reply.refusal])
        raw = reply.text or encoded(
            [{"name": c.function.name, "arguments": c.function.arguments} for c in reply.tool_calls]
        )
        if not reply.tool_calls:
            return self.parse(reply.text, cut=reply.finish_reason == "length")
        problems: list[str] = []
        calls: list[ToolCall] = []
        for index, given in enumerate(reply.tool_calls):
            try:
                arguments = find_json(given.function.arguments or "{}", opening="{")
            except NoJSON as error:
                problems.append(f"the arguments of call {index + 1} are no JSON object: {error}")
                continue
            if arguments.cut:
                problems.append(f"the arguments of call {index + 1} are cut off")
                continue
            call = self._call(given.function.name, arguments.value, index, problems)
            if call is not None:
                calls.append(msgspec.structs.replace(call, id=given.id or call.id))
        return self._done(calls, problems, raw)

    def parse(self, text: str, *, cut: bool = False) -> Calls:
        try:
            found = find_json(text, accept=lambda value: not self._problems(value))
        except NoJSON as error:
            if not self.must and self.answer is None:
                return self._done(without_thinking(text).strip(), [], text)
            words = (
                "the answer was cut off before it had a call" if cut else f"the answer is no call of a tool: {error}"
            )
            raise OutputError(words, raw=text, problems=[words]) from None
        if found.cut:
            words = "the answer ends in the middle of the JSON"
            raise OutputError(words, raw=text, problems=[words])
        problems: list[str] = []
        return self._done(self._value(found.value, problems), problems, text)

    def validate(self, data: Any) -> Calls:
        problems: list[str] = []
        return self._done(self._value(data, problems), problems, "")

    def _problems(self, data: Any) -> list[str]:
        problems: list[str] = []
        self._value(data, problems)
        return problems

    def _value(self, data: Any, problems: list[str]) -> Calls:
        if isinstance(data, dict) and isinstance(data.get("tool_calls"), list):
            data = data["tool_calls"]
        if isinstance(data, dict) and not self.must and (answer := _member(data, _ANSWERS)) is not None:
            if not _member(data, _NAMES):
                return self._in_form(answer, problems)
        if self.answer is not None and not self.must and self.answer.accepts(data):
            return self._in_form(data, problems)
        calls = []
        for index, one in enumerate(data if isinstance(data, list) else [data]):
            if isinstance(one, dict) and isinstance(one.get("function"), dict):
                one = one["function"]  # as the OpenAI API has it
            name = _member(one, _NAMES) if isinstance(one, dict) else None
            arguments = _member(one, _ARGUMENTS) if isinstance(one, dict) else None
            if not isinstance(name, str):
                if (
                    isinstance(one, dict)
                    and len(self.forms) == 1
                    and self.must
                    and not self.forms[0].reader.problems(one)
                ):
                    name, arguments = self.forms[0].name, one  # only one tool can be meant
                else:
                    problems.append(
                        'expected an object with "name" and "arguments"' + ("" if self.must else ' or with "answer"')
                    )
                    continue
            if isinstance(arguments, str):
                try:
                    arguments = find_json(arguments, opening="{").value
                except NoJSON:
                    problems.append(f"arguments: expected an object, got the text {arguments[:60]!r}")
                    continue
            call = self._call(name, arguments, index, problems)
            if call is not None:
                calls.append(call)
        return calls

    def _in_form(self, answer: Any, problems: list[str]) -> str:
        """An answer that calls no tool, as the text that the user gets."""
        if self.answer is None:
            return answer if isinstance(answer, str) else encoded(answer)
        try:
            return encoded(self.answer.validate(answer))
        except OutputError as error:
            problems += [f"answer: {words}" for words in error.problems]
            return ""

    def _call(self, name: str, arguments: Any, index: int, problems: list[str]) -> ToolCall | None:
        form = next((form for form in self.forms if form.name == name), None)
        if form is None:
            problems.append(f"there is no tool {name!r}; the tools are {', '.join(form.name for form in self.forms)}")
            return None
        arguments = {} if arguments is None else arguments
        if form.reader.problems(arguments):
            arguments = coerced(form.parameters, arguments)
        wrong = form.reader.problems(arguments)
        if wrong:
            problems += [f"arguments of {name}: {words}" for words in wrong]
            return None
        return ToolCall(id=self._call_id(index), function=FunctionCall(name=name, arguments=encoded(arguments)))

    def _done(self, value: Calls, problems: list[str], raw: str) -> Calls:
        if not problems and self.must and not isinstance(value, list):
            problems = ["no tool was called, and one must be"]
        if not problems and isinstance(value, list):
            if not value:
                problems = ["the list of calls is empty"]
            elif len(value) > 1 and not self.parallel:
                problems = [f"{len(value)} tools were called, and only one may be at once"]
        if problems:
            raise OutputError(f"the call is not right: {'; '.join(problems)}", raw=raw, problems=problems)
        result: Calls = self._validated(value, raw)
        return result


def tool_calls(
    tools: Sequence[Any],
    *,
    choice: Literal["auto", "required"] | str | Mapping[str, Any] | None = None,
    parallel: bool = True,
    call_id: Callable[[int], str] = lambda index: f"call_{uuid.uuid4().hex[:24]}",
) -> ToolCallsOutput:
    """The type of an answer that calls tools, or is a text where no tool is of use.

    Args:
        tools: in the form of the OpenAI API, or objects with ``name``, ``description`` and ``parameters``.
        choice: auto, required, or one that must be called: its name, or the OpenAI API's ``tool_choice``.
        parallel: several may be called at once.
        call_id: gives the n-th call of an answer its id.

    Raises:
        InvalidRequest: a tool or the choice makes no sense.
    """
    return ToolCallsOutput(tools, choice, parallel, call_id)


def _member(data: Any, names: Sequence[str]) -> Any:
    return next((data[name] for name in names if isinstance(data, dict) and name in data), None)


def _hoisted(schema: Schema, prefix: str, definitions: Schema) -> Schema:
    """The schema for a place inside of another one: its definitions go to the root, under names of their own."""
    if "$defs" not in schema:
        return schema
    text = re.sub(r'"#/\$defs/', f'"#/$defs/{prefix}', json.dumps(schema))
    moved: Schema = json.loads(text)
    definitions.update({f"{prefix}{name}": inner for name, inner in moved.pop("$defs").items()})
    return moved
