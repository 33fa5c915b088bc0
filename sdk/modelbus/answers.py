"""Answers put together from frames: what a plain (not streamed) caller gets."""

from __future__ import annotations

from array import array
from sys import byteorder
from typing import TYPE_CHECKING

import msgspec
from modelbus_broker.calls import Answer, Restarted
from modelbus_broker.messages import (
    Delta,
    Document,
    Done,
    FinishReason,
    FunctionCall,
    Started,
    TokenLogprob,
    ToolCall,
    ToolCallDelta,
    Usage,
    Vectors,
)

if TYPE_CHECKING:
    from .port import Answering


class ChoiceAnswer(msgspec.Struct, frozen=True, kw_only=True):
    """One whole choice of an answer."""

    index: int = 0
    text: str = ""
    reasoning: str = ""
    tool_calls: list[ToolCall] = []
    finish_reason: FinishReason = ""
    logprobs: list[TokenLogprob] = []
    refusal: str = ""


class _Choice:
    """A choice while its pieces still come."""

    __slots__ = ("finish_reason", "logprobs", "reasoning", "refusal", "text", "tool_calls")

    def __init__(self) -> None:
        self.text: list[str] = []
        self.reasoning: list[str] = []
        self.refusal: list[str] = []
        self.logprobs: list[TokenLogprob] = []
        self.tool_calls: dict[int, list[ToolCallDelta]] = {}
        self.finish_reason: FinishReason = ""

    def add(self, delta: Delta) -> None:
        if delta.text:
            self.text.append(delta.text)
        if delta.finish_reason:
            self.finish_reason = delta.finish_reason
        if delta.reasoning:
            self.reasoning.append(delta.reasoning)
        if delta.refusal:
            self.refusal.append(delta.refusal)
        if delta.logprobs:
            self.logprobs.extend(delta.logprobs)
        for call in delta.tool_calls:
            self.tool_calls.setdefault(call.index, []).append(call)

    def answer(self, index: int) -> ChoiceAnswer:
        return ChoiceAnswer(
            index=index,
            text="".join(self.text),
            reasoning="".join(self.reasoning),
            tool_calls=[_tool_call(self.tool_calls[at]) for at in sorted(self.tool_calls)],
            finish_reason=self.finish_reason,
            logprobs=self.logprobs,
            refusal="".join(self.refusal),
        )


def _tool_call(pieces: list[ToolCallDelta]) -> ToolCall:
    # Providers repeat or leave out id and name in later pieces: the first one given counts.
    return ToolCall(
        id=next((piece.id for piece in pieces if piece.id), ""),
        function=FunctionCall(
            name=next((piece.name for piece in pieces if piece.name), ""),
            arguments="".join(piece.arguments for piece in pieces),
        ),
    )


class AnswerBuilder:
    """Takes the frames of one call and holds the answer so far."""

    def __init__(self) -> None:
        self._begin()

    def _begin(self) -> None:
        self.done: Done | None = None
        self.prompt_tokens = 0  #: as said by the ``started`` frame; 0 = not known yet
        self.dimensions = 0  #: of the vectors
        self.labels: list[str] = []  #: of the dimensions, for classifications
        self._choices: dict[int, _Choice] = {}
        self._vectors: dict[int, bytes] = {}
        self._pieces: list[bytes] = []

    def add(self, frame: Answer) -> None:
        match frame:
            case Delta():
                choice = self._choices.get(frame.choice)
                if choice is None:
                    choice = self._choices[frame.choice] = _Choice()
                choice.add(frame)
            case Done():
                self.done = frame
            case Vectors():
                self.dimensions = frame.dimensions
                self.labels = frame.labels
                self._vectors.update(enumerate(frame.data, frame.start))
            case Document():
                self._pieces.append(frame.data)
            case Started():
                self.prompt_tokens = frame.prompt_tokens or self.prompt_tokens
            case Restarted():
                self._begin()

    @property
    def choices(self) -> list[ChoiceAnswer]:
        """By index."""
        return [self._choices[index].answer(index) for index in sorted(self._choices)]

    @property
    def vectors(self) -> list[bytes]:
        """In the order of the inputs; each ``dimensions`` float32, little endian."""
        return [self._vectors[index] for index in sorted(self._vectors)]

    @property
    def document(self) -> bytes:
        """The answer to a task whose answer is one encoded document."""
        return b"".join(self._pieces)

    @property
    def usage(self) -> Usage:
        return self.done.usage if self.done else Usage(prompt_tokens=self.prompt_tokens)


def floats(vector: bytes) -> list[float]:
    """A vector off the bus (float32, little endian) as numbers."""
    numbers = array("f")
    numbers.frombytes(vector)
    if byteorder == "big":
        numbers.byteswap()
    return numbers.tolist()


async def collect(call: Answering) -> AnswerBuilder:
    """Reads a call to its end. Raises what the call raises; cancelling it cancels the request on the bus."""
    builder = AnswerBuilder()
    async with call:
        while builder.done is None:
            for frame in await call.batch():
                builder.add(frame)
    return builder
