"""The ladder as a state machine: what to ask next, given what the model has said so far. No bus, no engine, no clock.

Whoever drives it asks the model for ``ask`` and hands each reply to ``take`` until that says that there is a ``value``: the SDK over the bus
(``answering``), a worker at its engine.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Generic, TypeVar

import msgspec
from modelbus_broker.errors import ModelBusError, OutputError
from modelbus_broker.messages import ChatMessage, Ladder, Rung, Sampling, Usage

from .output_types import OutputType
from .profiles import Profile, Start
from .replies import Reply, summed, with_words

T = TypeVar("T")

_DRAFT = "First think it through in plain words: what is asked, what is known, step by step to a result. Do not write JSON yet."
#: Fields that a provider may refuse because it has not the form's own way.
_FORM_FIELDS = ("response_format", "tools", "tool_choice", "parallel_tool_calls")


class Ask(msgspec.Struct, frozen=True, kw_only=True):
    """One question to the model."""

    messages: list[ChatMessage]
    fields: dict[str, Any] = {}  #: of ``Chat``: ``response_format``, ``tools`` ...
    temperature: float | None = None  #: None: that of the request
    draft: bool = False  #: the answer is free text and no value yet


class Climb(Generic[T]):
    """One answer being sought.

    Attributes:
        ask: what to ask the model now.
        value: of the answer, once it is there.
        rung: how the last answer was come by.
        attempts: how often the model was asked.
        transcript: all that was said after the first question, drafts and re-asks, the last reply included.
    """

    def __init__(
        self,
        messages: Sequence[ChatMessage],
        output: OutputType[T],
        profile: Profile,
        ladder: Ladder,
        used: Usage | None = None,
    ) -> None:
        """
        Args:
            used: before the first question.

        Raises:
            UnsupportedField: the workers have none of the ways that the ladder allows.
        """
        self._messages, self._output, self._profile, self._ladder = list(messages), output, profile, ladder
        self._start: Start | None = None if output.kind == "text" else profile.rung(ladder, tools=output.about_tools)
        self._draft: list[ChatMessage] = []
        self._reasked = 0
        self.attempts = 0
        self.transcript: list[ChatMessage] = []
        self._usages: list[Usage] = [used] if used is not None else []
        self.value: T
        self.rung: Rung = self._start or "text"
        self.ask = self._first()

    @property
    def usage(self) -> Usage:
        """Of all attempts."""
        return summed(self._usages)

    def take(self, reply: Reply) -> bool:
        """Whether this was the answer: ``value`` is there; else ``ask`` says what to ask next.

        Raises:
            OutputError: it is not right, and nothing more may be asked; ``raw`` is what the model wrote last.
        """
        self.attempts += 1
        self._usages.append(reply.usage)
        said = _said(reply)
        self.transcript.append(said)
        if self.ask.draft:
            self._draft = [*self.ask.messages, said]
            self.ask = self._formed()
            self.transcript.append(self.ask.messages[-1])
            return False
        try:
            self.value = self._output.read(reply)
        except OutputError as error:
            spent = self.usage.completion_tokens
            out_of_tokens = bool(self._ladder.max_tokens) and spent >= self._ladder.max_tokens
            if self._start is None or self._reasked >= self._ladder.reasks or out_of_tokens:
                raise
            self._reasked += 1
            self.rung = "reasked"
            self.ask = self._again(reply, said, error)
            return False
        return True

    def step_down(self, error: ModelBusError) -> bool:
        """The model's worker or provider refuses to be asked like this: whether there is another way, which ``ask`` is then."""
        refused = error.param in _FORM_FIELDS or any(
            field in f"{error.message} {error.upstream}" for field in _FORM_FIELDS
        )
        if self._start not in ("native", "grammar") or not refused or error.status not in (400, 404, 422, 501):
            return False
        weaker = Profile(grammar=self._profile.grammar and self._start == "native")
        try:
            self._start = weaker.rung(self._ladder, tools=self._output.about_tools)
        except ModelBusError:
            return False
        self._profile, self.rung = weaker, self._start
        self.ask = self._formed() if self._draft else self._first()
        return True

    def _first(self) -> Ask:
        if self._start is not None and self._ladder.reason_first:
            return Ask(messages=with_words(self._messages, _DRAFT), draft=True)
        return self._formed()

    def _formed(self) -> Ask:
        """The question for an answer in its form."""
        if self._start is None:
            return Ask(messages=self._messages)
        messages = self._draft or self._messages
        if self._start == "native":
            messages = with_words(messages, "Now give the answer itself.") if self._draft else messages
            return Ask(messages=messages, fields=self._output.fields(self._ladder, native=True))
        return Ask(messages=self._told(messages), fields=self._grammar_fields())

    def _grammar_fields(self) -> dict[str, Any]:
        return self._output.fields(self._ladder, native=False) if self._start == "grammar" else {}

    def _told(self, messages: list[ChatMessage]) -> list[ChatMessage]:
        """The conversation, with words about the form."""
        return self._output.told(messages, self._ladder, grammar=self._start == "grammar")

    def _again(self, reply: Reply, said: ChatMessage, error: OutputError) -> Ask:
        """The same question, the answer, and what is wrong with it."""
        complaint = self._output.complaint(reply, said, error, native=self._start == "native")
        self.transcript += complaint
        before = self.ask.messages
        if self._start == "native" and not self._output.about_tools and self._reasked == 1:
            before = self._output.told(before, self._ladder, grammar=False)  # it was not told of the form in words yet
        return Ask(
            messages=[*before, said, *complaint], fields=self.ask.fields, temperature=self._ladder.retry_temperature
        )


def _said(reply: Reply) -> ChatMessage:
    return ChatMessage(
        role="assistant",
        content=reply.text or None if reply.tool_calls else reply.text,
        tool_calls=reply.tool_calls or None,
    )


def fitted(ladder: Ladder | None, sampling: Sampling) -> Ladder:
    """The ladder with bounds for texts that leave room for the end of the JSON, where the request limits its tokens."""
    ladder = ladder or Ladder()
    if sampling.max_tokens is None or not ladder.max_string:
        return ladder
    return msgspec.structs.replace(ladder, max_string=min(ladder.max_string, max(16, 2 * sampling.max_tokens)))
