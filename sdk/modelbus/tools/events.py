"""What comes of a tool loop: the run as a whole, and what happens on the way."""

from __future__ import annotations

from typing import Any

import msgspec
from modelbus_broker.messages import ChatMessage, FinishReason, Rung, ToolCall, Usage

from .calling import ToolOutcome


class ToolRun(msgspec.Struct, frozen=True, kw_only=True):
    """A conversation that was gone on with until the model had no more calls to make."""

    answer: str = ""  #: the last text of the model
    value: Any = None  #: the answer in the form that was asked for; else the text
    calls: list[ToolOutcome] = []  #: all that was called, in order
    messages: list[ChatMessage] = []  #: the whole conversation, from the first message to the answer
    pending: list[ToolCall] = []  #: calls that were asked for and not made
    usage: Usage = Usage()  #: of all requests
    rounds: int = 0  #: of calls
    model: str = ""
    rung: Rung = "text"  #: how the last calls or answer were come by
    request_id: str = ""  #: of the last request
    finish_reason: FinishReason = "stop"

    @property
    def values(self) -> list[Any]:
        """What the calls returned, in order, without those that failed."""
        return [outcome.value for outcome in self.calls if outcome.ok]


class TextEvent(msgspec.Struct, frozen=True, kw_only=True):
    """A piece of what the model writes."""

    text: str
    reasoning: str = ""


class CallsEvent(msgspec.Struct, frozen=True, kw_only=True):
    """Calls are about to be made."""

    calls: list[ToolCall]


class OutcomeEvent(msgspec.Struct, frozen=True, kw_only=True):
    """A call was made, or refused, or failed."""

    outcome: ToolOutcome


class RoundEvent(msgspec.Struct, frozen=True, kw_only=True):
    """All calls of a round were made. Who leaves now loses nothing: the model has not been asked again."""

    number: int  #: from 1
    messages: list[ChatMessage]  #: the conversation so far
    usage: Usage  #: so far


class EndEvent(msgspec.Struct, frozen=True, kw_only=True):
    """The last event."""

    run: ToolRun


ToolEvent = TextEvent | CallsEvent | OutcomeEvent | RoundEvent | EndEvent
