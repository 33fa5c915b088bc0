"""One run of one request: the engine's outputs become frames."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import TYPE_CHECKING, Literal

from modelbus.tracing import Trace
from modelbus_broker.errors import DeadlineExceeded, EngineFailed, ModelBusError, RequestCancelled, WorkerLost
from modelbus_broker.messages import (
    Delta,
    Document,
    Done,
    Request,
    Started,
    Task,
    Usage,
    UsageEvent,
    Vectors,
)
from modelbus_broker.pulling import Pulled

from .engines.base import Attempted, Encoded, EngineOutput, Finished, Output, Prompt, VectorBatch
from .engines.base import Run as EngineRun
from .forms import Forms
from .outbox import Outbox, Ring

if TYPE_CHECKING:
    from opentelemetry.trace import Span

log = logging.getLogger(__name__)

FRAME_BYTES = 512 << 10
#: A request with less time left than this has a timer of its own.
TIMER_S = 30.0
_FRAMES_BEFORE_OUTPUT = 2


class Execution:
    """A request in a worker's hands, from the delivery to the last frame.

    Attributes:
        state: held (accepted, not started), running, ended.
        wanted: False once somebody told us to stop: its outcome is "cancelled" and no error.
        counts: False once another run of the request counts: it says nothing more and never acknowledges.
        handed_over: another worker goes on; its publisher, and not this worker, lets the message go.
        asks: it waits for its publisher's word before it starts.
        counted: its start is counted in the bucket ``runs``.
        error: what it ended with; ``retryable``: another try may do better.
    """

    __slots__ = (
        "asks", "began", "cancelled", "counted", "counts", "deadline", "entered", "error", "expired", "failure", "go",
        "handed_over", "pulled", "request", "retryable", "ring", "run", "seq", "span", "started_at", "trace",
        "state", "stop_reason", "task",
    )  # fmt: skip

    def __init__(self, request: Request, pulled: Pulled, run: str, ring: Ring, deadline: float) -> None:
        self.request = request
        self.pulled = pulled
        self.run = run
        self.ring = ring
        self.deadline = deadline  #: event-loop time
        self.began = time.monotonic()
        self.started_at = 0.0
        self.seq = 0
        self.state: Literal["held", "running", "ended"] = "held"
        self.entered = False  #: its task has had its first step
        self.cancelled = False
        self.expired = False
        self.handed_over = False
        self.stop_reason = ""
        self.failure = ""  #: the error that it ended with, in words
        self.error: ModelBusError | None = None
        self.retryable = False
        self.counts = True
        self.counted = False
        self.trace = Trace(request.traceparent, request.tracestate)  #: of the run, where it is traced
        self.span: Span | None = None
        self.asks = False
        self.go: asyncio.Future[bool] | None = None
        self.task: asyncio.Task[None] | None = None

    @property
    def has_output(self) -> bool:
        """More than `accepted` and `started` has been said."""
        return self.seq > _FRAMES_BEFORE_OUTPUT

    def next_seq(self) -> int:
        seq = self.seq
        self.seq = seq + 1
        return seq

    def stop(self, reason: str) -> None:
        """Aborts the engine's work, once: an engine that takes its time to let go is not disturbed in that."""
        if self.state != "ended" and not self.cancelled:
            self.cancelled, self.stop_reason = True, reason
            # A task that is cancelled before its first step never enters its own code, and would not end the run.
            if self.task is not None and self.entered:
                self.task.cancel()

    def expire(self) -> None:
        """The request's time is up."""
        self.expired = not self.cancelled
        self.stop("its time is up")

    def hand_over(self, why: str = "its worker was stopped") -> None:
        """Another worker goes on from here, if somebody still waits for it."""
        if self.state != "ended" and not self.cancelled:
            self.handed_over = True
            self.stop(why)

    def let_go(self) -> None:
        """Another run counts."""
        self.counts = False
        if self.go is not None and not self.go.done():
            self.go.set_result(False)
        self.stop("another run of the request counts")

    def stopped(self) -> tuple[ModelBusError, str]:
        """What a run that was stopped says, and its outcome."""
        if self.handed_over:
            return WorkerLost(self.stop_reason), "handed_over"
        if self.expired:
            seconds = self.request.budget_ms / 1000
            return DeadlineExceeded(f"no complete answer within {seconds:g} s"), "failed"
        return RequestCancelled(self.stop_reason), "cancelled"


async def execute(execution: Execution, task: Task, forms: Forms, outbox: Outbox) -> tuple[Usage, str, str]:
    """Runs a request on the engine behind ``forms`` and sends its frames, the last one included.

    Returns:
        (usage, outcome, code): what the usage event says; see ``UsageEvent`` for the outcomes.
    """
    request, ring = execution.request, execution.ring
    execution.state = "running"
    execution.started_at = time.monotonic()
    outbox.send(ring, Started(id=request.id, run=execution.run, seq=execution.next_seq()))
    usage = _Counter(request)
    outcome, retry = "failed", False
    # A timer only where the liveness loop, which looks at all deadlines, would be late by much.
    timer = None
    loop = asyncio.get_running_loop()
    if execution.deadline - loop.time() < TIMER_S:
        timer = loop.call_at(execution.deadline, execution.expire)
    try:
        finished = await _pump(execution, forms.answer(task, _engine_run(execution)), outbox, usage)
    except asyncio.CancelledError:
        if not execution.cancelled:
            raise
        error: ModelBusError
        error, outcome = execution.stopped()
    except ModelBusError as failure:
        error, retry = failure, failure.retryable
    except Exception as failure:  # an engine may raise anything; its words go to the client
        log.exception("request %s failed in the engine", request.id)
        error = EngineFailed(f"{type(failure).__name__}: {failure}")
    else:
        execution.state = "ended"
        if execution.counts:
            outbox.send(
                ring,
                Done(
                    id=request.id,
                    run=execution.run,
                    seq=execution.next_seq(),
                    usage=finished.usage,
                    engine_ms=(time.monotonic() - execution.started_at) * 1000,
                    upstream_model=finished.upstream_model,
                    system_fingerprint=finished.system_fingerprint,
                    rung=finished.rung,
                    attempts=finished.attempts,
                    grounding=finished.grounding,
                ),
            )
        return finished.usage, "done", ""
    finally:
        if timer is not None:
            timer.cancel()
    execution.state = "ended"
    execution.failure, execution.error, execution.retryable = error.message, error, retry
    spent = usage.usage()
    if execution.counts:
        frame = error.failed(
            id=request.id, run=execution.run, seq=execution.next_seq(), usage=spent, retry=retry,
            handover=outcome == "handed_over",
        )  # fmt: skip
        outbox.send(ring, frame)
    return spent, outcome, error.code


def _engine_run(execution: Execution) -> EngineRun:
    request = execution.request
    return EngineRun(
        id=request.id,
        deadline=execution.deadline,
        output_token_ids=request.output_token_ids,
        emitted_chars=request.emitted_chars,
        prompt_tokens=request.prompt_tokens,
        stream=request.stream,
        traceparent=execution.trace.traceparent,
        tracestate=execution.trace.tracestate,
        adapter=request.adapter,
        fail_fast=request.fail_fast,
    )


class _Counter:
    """What a run has used so far, for runs that end without the engine's own count."""

    __slots__ = ("attempted", "positions", "prompt_tokens")

    def __init__(self, request: Request) -> None:
        self.attempted: Usage | None = None  #: of all attempts, where there are several
        self.prompt_tokens = request.prompt_tokens
        self.positions = [len(ids) for ids in request.output_token_ids]

    def advance(self, output: Output) -> int:
        """Counts the tokens of an output and returns its choice's position."""
        positions = self.positions
        while len(positions) <= output.choice:
            positions.append(0)
        positions[output.choice] += len(output.token_ids) if output.tokens < 0 else output.tokens
        return positions[output.choice]

    def usage(self) -> Usage:
        if self.attempted is not None:
            return self.attempted
        return Usage(prompt_tokens=self.prompt_tokens, completion_tokens=sum(self.positions), estimated=True)


async def _pump(
    execution: Execution, outputs: AsyncIterator[EngineOutput], outbox: Outbox, counter: _Counter
) -> Finished:
    request_id, run, ring = execution.request.id, execution.run, execution.ring
    finished: Finished | None = None
    async with aclosing(outputs) as stream:  # type: ignore[type-var]  # an engine's methods are async generators
        async for output in stream:
            match output:
                case Output():
                    if not execution.counts:
                        continue
                    outbox.send(
                        ring,
                        Delta(
                            id=request_id,
                            run=run,
                            seq=execution.next_seq(),
                            choice=output.choice,
                            text=output.text,
                            token_ids=output.token_ids,
                            position=counter.advance(output),
                            finish_reason=output.finish_reason,
                            reasoning=output.reasoning,
                            tool_calls=output.tool_calls,
                            logprobs=output.logprobs,
                            refusal=output.refusal,
                            prompt_logprobs=output.prompt_logprobs,
                        ),
                    )
                case VectorBatch():
                    if execution.counts:
                        _send_vectors(execution, output, outbox)
                case Encoded():
                    if execution.counts:
                        _send_document(execution, output.data, outbox)
                case Prompt():
                    counter.prompt_tokens = output.tokens
                case Attempted():
                    counter.attempted = output.usage
                case Finished():
                    finished = output
    if finished is None:
        raise EngineFailed("the engine ended the answer without saying that it is complete")
    return finished


def _send_vectors(execution: Execution, batch: VectorBatch, outbox: Outbox) -> None:
    """Results in frames of at most half a MiB."""
    per_frame = max(1, FRAME_BYTES // (4 * max(1, batch.dimensions)))
    for at in range(0, len(batch.data), per_frame):
        outbox.send(
            execution.ring,
            Vectors(
                id=execution.request.id,
                run=execution.run,
                seq=execution.next_seq(),
                start=batch.start + at,
                dimensions=batch.dimensions,
                data=batch.data[at : at + per_frame],
                labels=batch.labels,
            ),
        )


def _send_document(execution: Execution, data: bytes, outbox: Outbox) -> None:
    for at in range(0, len(data), FRAME_BYTES):
        piece = data[at : at + FRAME_BYTES]
        document = Document(id=execution.request.id, run=execution.run, seq=execution.next_seq(), data=piece)
        outbox.send(execution.ring, document)


def usage_event(
    execution: Execution, *, deployment: str, usage: Usage, outcome: str, code: str, queue_ms: float
) -> UsageEvent:
    """The ledger's line for a run that has ended."""
    request = execution.request
    ran_ms = (time.monotonic() - execution.started_at) * 1000 if execution.started_at else 0.0
    return UsageEvent(
        id=request.id,
        run=execution.run,
        model=request.model,
        deployment=deployment,
        tenant=request.tenant,
        adapter=request.adapter.name if request.adapter is not None else "",
        usage=usage,
        outcome=outcome if execution.counts else "waste",
        code=code,
        at_ms=time.time_ns() // 1_000_000,
        queue_ms=queue_ms,
        run_ms=ran_ms,
    )
