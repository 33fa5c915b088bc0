"""Conversations that must fit a budget of tokens: which turns are left out. Pure."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from modelbus_broker.errors import ContextLengthExceeded
from modelbus_broker.messages import ChatMessage

#: How many tokens a message has.
Count = Callable[[ChatMessage], int]


def exchanges(messages: Sequence[ChatMessage]) -> list[list[ChatMessage]]:
    """A conversation in parts that belong together: a turn of the user and all that follows until the next one, calls of
    tools and their results included. What comes before the first turn of the user is a part of its own."""
    parts: list[list[ChatMessage]] = []
    for message in messages:
        if message.role == "user" or not parts:
            parts.append([])
        parts[-1].append(message)
    return parts


def fitted(messages: Sequence[ChatMessage], limit: int, count: Count) -> list[ChatMessage]:
    """The conversation within so many tokens: the oldest exchanges are left out, whole ones, so that no result of a tool
    stands there without its call. System turns and the last exchange always stay.

    Args:
        limit: 0 leaves out nothing.

    Raises:
        ContextLengthExceeded: what must stay is more than that.
    """
    if not limit:
        return list(messages)
    fixed = [message for message in messages if message.role in ("system", "developer")]
    parts = exchanges([message for message in messages if message.role not in ("system", "developer")])
    left = limit - sum(map(count, fixed))
    kept: list[ChatMessage] = []
    for number, part in enumerate(reversed(parts)):
        size = sum(map(count, part))
        if size > left:
            if number == 0:
                raise ContextLengthExceeded(
                    f"the last turn and the instructions have {limit - left + size} tokens, and the conversation may have "
                    f"{limit}",
                    param="messages",
                )
            break
        left -= size
        kept = [*part, *kept]
    return [*fixed, *kept]
