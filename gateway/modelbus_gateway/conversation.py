"""The messages of a chat request, each as the bus has it. Pure."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
from modelbus_broker.errors import InvalidRequest, UnsupportedField
from modelbus_broker.messages import AudioPart, ChatMessage, FilePart, ImagePart, ToolCall

from .checks import Need
from .openai_types import RequestMessage


def conversation(messages: list[RequestMessage], needs: list[Need]) -> list[ChatMessage]:
    """The messages, deprecated forms translated. Raises InvalidRequest or UnsupportedField; what only some engines can
    do is added to ``needs``."""
    if not messages:
        raise InvalidRequest(
            "Invalid 'messages': empty array. Expected an array with minimum length 1, but got an empty array instead.",
            param="messages",
        )
    result: list[ChatMessage] = []
    for index, message in enumerate(messages):
        content = message.content
        if content.__class__ is not str or message.role not in _PLAIN_ROLES:
            message = _checked(message, index, needs)
        result.append(message)
    return result


#: Messages of these roles with a text need no second look.
_PLAIN_ROLES = frozenset({"user", "system", "developer"})


def _checked(message: RequestMessage, index: int, needs: list[Need]) -> RequestMessage:
    at = f"messages[{index}]"
    if message.audio is not None:
        raise UnsupportedField(f"'{at}.audio' is not supported here: answers are text.", param=f"{at}.audio")
    calls = message.tool_calls or []
    for number, call in enumerate(calls):
        if call.type != "function":
            param = f"{at}.tool_calls[{number}].type"
            raise UnsupportedField(f"'{param}' {call.type!r} is not supported here: only 'function' is.", param=param)
    if message.content is None:
        spoke = calls or message.function_call or message.refusal is not None or message.reasoning_content is not None
        if message.role != "assistant" or not spoke:
            raise InvalidRequest(
                f"Invalid value for '{at}.content': expected a string or an array of parts, got null.",
                param=f"{at}.content",
            )
    elif not isinstance(message.content, str):
        _parts(message.content, f"{at}.content", needs)
    if message.role == "tool" and not message.tool_call_id:
        raise InvalidRequest(f"Missing required parameter: '{at}.tool_call_id'.", param=f"{at}.tool_call_id")
    if message.role == "function":
        if not message.name:
            raise InvalidRequest(f"Missing required parameter: '{at}.name'.", param=f"{at}.name")
        return RequestMessage(role="tool", content=message.content, tool_call_id=_legacy_id(message.name))
    if message.function_call is not None:
        call = ToolCall(id=_legacy_id(message.function_call.name), function=message.function_call)
        return msgspec.structs.replace(message, function_call=None, tool_calls=[*calls, call])
    return message


def _legacy_id(function: str) -> str:
    """Deprecated function calls have no id: the name joins a call with its result."""
    return f"call_{function}"


def _parts(parts: Sequence[object], at: str, needs: list[Need]) -> None:
    if not parts:
        raise InvalidRequest(f"Invalid '{at}': empty array. Expected at least one part.", param=at)
    for number, part in enumerate(parts):
        match part:
            case ImagePart():
                if not part.image_url.url.startswith(("https://", "http://", "data:image/")):
                    param = f"{at}[{number}].image_url.url"
                    raise InvalidRequest(
                        f"Invalid '{param}': expected an http(s) URL or a data URL of an image.", param=param
                    )
                needs.append(Need(f"{at}[{number}].image_url", "vision"))
            case AudioPart():
                needs.append(Need(f"{at}[{number}].input_audio", "audio"))
            case FilePart():
                if part.file.file_id is not None:
                    param = f"{at}[{number}].file.file_id"
                    raise UnsupportedField(
                        f"'{param}' is not supported here: no files are kept; send 'file_data'.", param=param
                    )
                needs.append(Need(f"{at}[{number}].file", "files"))
