"""What a chat template is given of tools, their calls and their results."""

from __future__ import annotations

import json
from typing import Any

from modelbus_broker.messages import Chat, ChatMessage

from .call_formats import HERMES

#: For templates that know no tools: the words that Hermes and Qwen models were trained with.
_SYSTEM_TEXT = """# Tools

You may call one or more functions to assist with the user query.

You are provided with function signatures within <tools></tools> XML tags:
<tools>
%s
</tools>

For each function call, return a json object with function name and arguments within <tool_call></tool_call> XML tags:
<tool_call>
{"name": <function-name>, "arguments": <args-json-object>}
</tool_call>"""


def shown_tools(task: Chat) -> list[dict[str, Any]]:
    """The tools that the model is told of."""
    return [] if task.tool_choice == "none" else task.tools or []


def with_described_tools(messages: list[ChatMessage], tools: list[dict[str, Any]]) -> list[ChatMessage]:
    """The conversation for a template that knows no tools: all that concerns them is text."""
    turns = [_as_text(message) for message in messages]
    if not tools:
        return turns
    text = _SYSTEM_TEXT % "\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools)
    first = turns[0] if turns else None
    if first is not None and first.role in ("system", "developer"):
        return [ChatMessage(role=first.role, content=f"{first.text()}\n\n{text}"), *turns[1:]]
    return [ChatMessage(role="system", content=text), *turns]


def _as_text(message: ChatMessage) -> ChatMessage:
    if message.role in ("tool", "function"):
        return ChatMessage(role="user", content=f"<tool_response>\n{message.text()}\n</tool_response>")
    if not message.tool_calls:
        return message
    written = [
        HERMES.written(json.dumps(call.function.name)[1:-1], call.function.arguments or "{}")
        for call in message.tool_calls
    ]
    return ChatMessage(role=message.role, content="\n".join([*([message.text()] if message.text() else []), *written]))
