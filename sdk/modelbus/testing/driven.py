"""The schema-driven model: what a request asks for, it gets, without a word written for it."""

from __future__ import annotations

import json
from typing import Any

from modelbus_broker.errors import InvalidRequest
from modelbus_broker.messages import Chat

from ..schemas import instance
from .script import Malformation, ScriptedAnswer, ScriptedCall


def driven_answer(task: Chat, text: str = "") -> ScriptedAnswer:
    """A call of each tool, one after the other and each once; then an instance of ``response_format``; else a text.

    Args:
        text: that is answered where nothing else is asked for; "": the last message.

    Raises:
        InvalidRequest: a tool, the choice of one, or the format makes no sense; no instance of the schema can be made.
    """
    calls = _next_calls(task)
    if calls:
        return ScriptedAnswer(tool_calls=calls)
    schema = answer_schema(task)
    if schema is not None:
        return ScriptedAnswer(text=json.dumps(instance(schema), ensure_ascii=False))
    return ScriptedAnswer(text=text or (task.messages[-1].text() if task.messages else ""))


def answer_schema(task: Chat) -> dict[str, Any] | None:
    """The schema that the answer must satisfy; None: it is free.

    Raises:
        InvalidRequest: the format is none that exists.
    """
    wanted = task.response_format or {}
    match wanted.get("type", "text"):
        case "text":
            return None
        case "json_object":
            return {"type": "object"}
        case "json_schema":
            inner = wanted.get("json_schema")
            schema = inner.get("schema") if isinstance(inner, dict) else None
            if isinstance(schema, dict):
                return schema
            raise InvalidRequest("response_format.json_schema has no schema", param="response_format")
        case kind:
            raise InvalidRequest(f"there is no response_format {kind!r}", param="response_format")


def spoilt(text: str, how: Malformation) -> str:
    """JSON as models spoil it; other text stays as it is."""
    try:
        json.loads(text)
    except ValueError:
        return text
    match how:
        case "cut":
            return text[: len(text) // 2]
        case "fenced":
            return f"Sure, here it is:\n```json\n{text}\n```\nAnything else?"
        case "prose":
            return "I am sorry, but I would rather talk about the weather."
        case "wrong":
            return '{"unexpected": true}'


def calls_so_far(task: Chat) -> list[str]:
    """The names of the tools that were called in the conversation, in order."""
    return [call.function.name for message in task.messages for call in message.tool_calls or ()]


def _next_calls(task: Chat) -> list[ScriptedCall]:
    tools: dict[str, Any] = {}
    for index, tool in enumerate(task.tools or ()):
        function = tool.get("function")
        name = function.get("name") if isinstance(function, dict) else None
        if not isinstance(name, str) or not name:
            raise InvalidRequest(f"'tools[{index}]' is no function with a name", param=f"tools[{index}].function")
        tools[name] = function.get("parameters") or {"type": "object"}  # type: ignore[union-attr]  # it has a name
    if task.tool_choice == "none" or not tools:
        return []
    # Only since the last question: the next one has all tools called again.
    asked = max((at for at, message in enumerate(task.messages) if message.role == "user"), default=0)
    done = {call.function.name for message in task.messages[asked:] for call in message.tool_calls or ()}
    wanted = [name for name in tools if name not in done]
    match task.tool_choice:
        case {"function": {"name": str(name)}}:
            if name not in tools:
                raise InvalidRequest(f"tool_choice names {name!r}, which is no tool", param="tool_choice")
            wanted = [name]
        case "required":
            wanted = wanted or list(tools)[:1]
    return [ScriptedCall(name=name, arguments=instance(tools[name])) for name in wanted[:1]]
