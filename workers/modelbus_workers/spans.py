"""What a worker says of a run to OpenTelemetry: how long it waited in its queue, and what the engine did; see
``modelbus.tracing``."""

from __future__ import annotations

from modelbus import tracing
from modelbus.tracing import Trace
from modelbus_broker.messages import Chat, Completion, Request, Task, Usage

from .execution import Execution


def begin(execution: Execution, task: Task, *, stored_ms: float) -> None:
    """The engine is about to get the request: its time in the queue is over, and its run begins.

    Args:
        stored_ms: when the queue stored it, by this host's clock.
    """
    if tracing.tracer() is None:
        return
    request = execution.request
    parent = Trace(request.traceparent, request.tracestate)
    said = _of(request, task)
    begun_ms = tracing.now_ms()
    waited = tracing.start(
        f"queue {request.model}", "consumer", trace=parent, attributes=said, start_ms=min(stored_ms, begun_ms)
    )
    tracing.end(waited, end_ms=begun_ms)
    own = {tracing.RUN: execution.run, tracing.WORKER: execution.run.split(".", 2)[2]}
    execution.span = tracing.start(
        f"{said[tracing.OPERATION]} {request.model}", "server", trace=parent, attributes=said | own, start_ms=begun_ms
    )
    execution.trace = tracing.trace_of(execution.span)


def finish(execution: Execution, usage: Usage, outcome: str, code: str) -> None:
    """The run has ended."""
    span, execution.span = execution.span, None
    if span is not None:
        attributes = tracing.answered_attributes(usage, id=execution.request.id) | {"modelbus.outcome": outcome}
        tracing.end(span, error=code or None, attributes=attributes)


def _of(request: Request, task: Task) -> dict[str, object]:
    operation = str(task.__struct_config__.tag)
    sampling = task.sampling if isinstance(task, (Chat, Completion)) else None
    labels = {f"{tracing.LABEL}.{name}": value for name, value in request.labels.items()}
    more = {tracing.ATTEMPT: request.attempt, tracing.TENANT: request.tenant, **labels}
    return tracing.asked_attributes(operation, request.model, sampling, **more)
