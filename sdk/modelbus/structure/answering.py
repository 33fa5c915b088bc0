"""Typed answers over the bus: asks a model until its answer has the form, as far as the ladder allows.

Every attempt is a request of its own on the bus; cancelling the task that waits cancels the one that runs.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Generic, Protocol, TypeVar

import msgspec
from modelbus_broker.asking import CallOptions
from modelbus_broker.errors import ModelBusError, OutputError
from modelbus_broker.messages import ChatMessage, FinishReason, Ladder, Rung, Sampling, Usage

from ..answer_types import ChatAnswer
from ..model_client import Messages, chat_task
from .climbing import Climb, fitted
from .output_types import OutputType, output_type
from .profiles import Profile
from .replies import Reply
from .tool_calls import ToolCallsOutput

T = TypeVar("T")


class Asks(Protocol):
    """What is needed of a client: :class:`modelbus.Client`, or a model that answers in this process."""

    async def chat(
        self, model: str, messages: Messages, *, options: CallOptions | None = None, **fields: Any
    ) -> ChatAnswer: ...

    def profile(self, model: str) -> Profile: ...


class Result(msgspec.Struct, Generic[T], frozen=True, kw_only=True):
    """A typed answer, and how it came about."""

    value: T
    raw: str = ""  #: what the model wrote, of the answer that counts
    usage: Usage = Usage()  #: of all attempts
    model: str = ""
    rung: Rung = "text"
    attempts: int = 1  #: how often the model was asked, drafts included
    request_id: str = ""  #: of the request that counts
    trace_id: str = ""
    finish_reason: FinishReason = "stop"
    messages: list[
        ChatMessage
    ] = []  #: what was said after the question: drafts, wrong answers, what was wrong with them, the answer


async def answer(
    client: Asks,
    model: str,
    messages: Messages,
    output: OutputType[T] | type[T],
    *,
    sampling: Sampling | Mapping[str, Any] | None = None,
    options: CallOptions | None = None,
    ladder: Ladder | None = None,
    **fields: Any,
) -> Result[T]:
    """The answer of a model as a value of a type.

    Args:
        messages: a text is one turn of the user.
        output: an :class:`OutputType` or a type for one, see :func:`output_type`.
        sampling: how tokens are chosen.
        options: budget, lane, tenant ... of each request.
        ladder: how far the form is sought; None: all the way.
        fields: further fields of the chat.

    Raises:
        OutputError: the answer has not the form, and the ladder ends here; it carries ``raw`` and ``problems``.
        UnsupportedField: the model's workers have none of the ways that the ladder allows.
        ModelBusError: what a request may end with.
    """
    wanted: OutputType[Any] = output if isinstance(output, OutputType) else output_type(output)
    chosen = msgspec.to_builtins(sampling) if isinstance(sampling, Sampling) else dict(sampling or {})
    task = chat_task(messages, {**chosen, **fields})
    profile, ladder = client.profile(model), fitted(ladder, task.sampling)
    own_ladder = Ladder(rungs=("native", "grammar"), reasks=0)
    there = isinstance(wanted, ToolCallsOutput) and profile.chooses_tool(ladder) and not ladder.reason_first
    if there:
        # The worker chooses among the tools beside its engine, and climbs by itself: to us the model has tools.
        own_ladder, profile = ladder, msgspec.structs.replace(profile, native_tools=True)
        ladder = msgspec.structs.replace(ladder, rungs=("native", *ladder.rungs))
    climb: Climb[Any] = Climb(task.messages, wanted, profile, ladder)
    while True:
        ask = climb.ask
        own = {**chosen, **fields, **ask.fields}
        if ask.temperature is not None:
            own["temperature"] = ask.temperature
        if ask.fields:
            # A worker that came meanwhile and cannot do it refuses, in place of climbing a ladder of its own.
            own["ladder"] = own_ladder
        try:
            got = await client.chat(model, ask.messages, options=options, **own)
        except OutputError:
            raise
        except ModelBusError as error:
            if climb.step_down(error):
                continue
            raise
        reply = Reply(
            text=got.text, reasoning=got.reasoning, tool_calls=got.tool_calls, finish_reason=got.finish_reason,
            refusal=got.choices[0].refusal if got.choices else "", usage=got.usage,
        )  # fmt: skip
        if climb.take(reply):
            rung: Any = got.rung if there and got.rung and climb.attempts == 1 else climb.rung
            attempts = climb.attempts - 1 + max(1, got.attempts) if there else climb.attempts
            return Result(
                value=climb.value, raw=got.text, usage=climb.usage, model=model, rung=rung, attempts=attempts,
                request_id=got.id, trace_id=_trace_id(options), finish_reason=got.finish_reason, messages=climb.transcript,
            )  # fmt: skip


def _trace_id(options: CallOptions | None) -> str:
    """Of the W3C trace context that the requests carried."""
    fields = options.traceparent.split("-") if options is not None else []
    return fields[1] if len(fields) == 4 else ""
