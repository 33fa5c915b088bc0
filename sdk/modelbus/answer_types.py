"""What the calls of a client give: whole answers, pieces of streamed ones, vectors, rankings, classes."""

from __future__ import annotations

import msgspec
from modelbus_broker.jobs import Ended
from modelbus_broker.messages import (
    Delta,
    Done,
    FinishReason,
    Grounding,
    Started,
    TokenLogprob,
    ToolCall,
    ToolCallDelta,
    Usage,
)

from .answers import AnswerBuilder, ChoiceAnswer


class ChatAnswer(msgspec.Struct, frozen=True, kw_only=True):
    """A whole answer to a conversation."""

    id: str
    model: str
    choices: list[ChoiceAnswer]
    usage: Usage
    time_cost_ms: float = 0.0  #: from the call to the last token
    rung: str = ""  #: how a form that was asked for was come by, see ``Rung``; "": none was asked for
    attempts: int = 0  #: how often its worker asked the model for it
    grounding: Grounding | None = None  #: what an answer out of documents was made of

    @property
    def text(self) -> str:
        """Of the first choice."""
        return self.choices[0].text if self.choices else ""

    @property
    def reasoning(self) -> str:
        return self.choices[0].reasoning if self.choices else ""

    @property
    def finish_reason(self) -> FinishReason:
        return self.choices[0].finish_reason if self.choices else ""

    @property
    def tool_calls(self) -> list[ToolCall]:
        return self.choices[0].tool_calls if self.choices else []


class ChatDelta(msgspec.Struct, frozen=True, kw_only=True):
    """New output of one choice of a streamed answer."""

    choice: int = 0
    text: str = ""
    position: int = 0  #: output tokens of this choice so far; 0 = not known
    reasoning: str = ""
    tool_calls: list[ToolCallDelta] = []
    finish_reason: FinishReason = ""  #: set in the last delta of a choice
    logprobs: list[TokenLogprob] = []
    refusal: str = ""


class EmbeddingAnswer(msgspec.Struct, frozen=True, kw_only=True):
    """Vectors, in the order of the texts."""

    id: str
    model: str
    vectors: list[list[float]]
    dimensions: int
    usage: Usage


class RankedDocument(msgspec.Struct, frozen=True, kw_only=True):
    """A document, and how well it answers the query."""

    index: int  #: among the documents that were given
    score: float
    text: str


class Ranking(msgspec.Struct, frozen=True, kw_only=True):
    """Documents, the best first."""

    id: str
    model: str
    documents: list[RankedDocument]
    usage: Usage


class ClassifiedText(msgspec.Struct, frozen=True, kw_only=True):
    """One text's class, and the probability of each."""

    label: str
    probabilities: dict[str, float]


class ClassificationAnswer(msgspec.Struct, frozen=True, kw_only=True):
    """Classes, in the order of the texts."""

    id: str
    model: str
    texts: list[ClassifiedText]
    usage: Usage


def answer_of(ended: Ended) -> ChatAnswer:
    """What a job has said (see ``modelbus_broker.jobs``), as the answer to a conversation."""
    builder = AnswerBuilder()
    for frame in ended.frames:
        if isinstance(frame, (Started, Delta, Done)):
            builder.add(frame)
    return ChatAnswer(
        id=ended.id,
        model=ended.model,
        choices=builder.choices,
        usage=builder.usage,
        time_cost_ms=builder.done.engine_ms if builder.done else 0.0,
    )
