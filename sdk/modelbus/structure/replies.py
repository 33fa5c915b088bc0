"""What a model said to one question of a ladder, wherever it came from: a client of the bus, or an engine beside it."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
from modelbus_broker.messages import ChatMessage, FinishReason, ToolCall, Usage


class Reply(msgspec.Struct, frozen=True, kw_only=True):
    """One whole answer."""

    text: str = ""
    reasoning: str = ""
    tool_calls: list[ToolCall] = []
    finish_reason: FinishReason = "stop"
    refusal: str = ""
    usage: Usage = Usage()


def summed(usages: list[Usage]) -> Usage:
    """All of it: what several attempts used."""
    if len(usages) == 1:
        return usages[0]
    return Usage(
        prompt_tokens=sum(usage.prompt_tokens for usage in usages),
        completion_tokens=sum(usage.completion_tokens for usage in usages),
        cached_tokens=sum(usage.cached_tokens for usage in usages),
        reasoning_tokens=sum(usage.reasoning_tokens for usage in usages),
        estimated=any(usage.estimated for usage in usages),
    )


def with_words(messages: Sequence[ChatMessage], words: str, *, gap: str = "\n\n") -> list[ChatMessage]:
    """The conversation with words at its end: in the last turn, where that is the user's text."""
    last = messages[-1] if messages else None
    if last is not None and last.role == "user" and isinstance(last.content, str):
        return [*messages[:-1], msgspec.structs.replace(last, content=f"{last.content}{gap}{words}")]
    return [*messages, ChatMessage(role="user", content=words)]
