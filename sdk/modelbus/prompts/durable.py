"""Prompt functions as jobs: asked here, answered whoever dies meanwhile, and read by id from any program."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Generic, TypeVar, cast

import msgspec
from modelbus_broker.errors import PromptError
from modelbus_broker.jobs import Ended, Jobs, JobStatus
from modelbus_broker.messages import Decision, Task

from ..answer_types import answer_of
from ..client import Client
from ..decisions.decision import asked
from ..decisions.output import DecisionType
from ..hooks import JobCall
from ..jobs import Batch, Job, Progress, Row
from ..jobs.batch import RowOptions, map_rows, submit_batch
from ..jobs.submitting import submit_job
from ..model_client import chat_task
from ..shared import across_loops, background, connected, shared_client
from ..structure import OutputType, Reply
from .llm import Target
from .running import RenderedCall

T = TypeVar("T")

#: One call of a function: its arguments by name, several by position, or the only one.
RowArguments = Mapping[str, Any] | tuple[Any, ...] | Any


def arguments(row: RowArguments) -> tuple[tuple[Any, ...], Mapping[str, Any]]:
    """What a row calls the function with."""
    if isinstance(row, Mapping):
        return (), row
    return (row if isinstance(row, tuple) else (row,)), {}


def task_of(call: RenderedCall) -> Task:
    """The call as one request, which its worker answers in the form that is asked for.

    Raises:
        PromptError: it needs more than one request, or this process.
    """
    needs = {
        "tools": call.tools is not None,
        "with_return_prefix": bool(call.prefix),
        "with_max_turns": call.max_turns > 1,
    }
    if named := [name for name, needed in needs.items() if needed]:
        raise PromptError(f"{call.name}: a job is one request and cannot have {', '.join(named)}")
    if isinstance(call.output, DecisionType):
        labels = call.output.labels
        return Decision(messages=asked(call.messages, "", labels), labels=[label.text for label in labels])
    fields = dict(call.sampling)
    if call.output.kind != "text":
        fields |= {"response_format": call.output.response_format(call.ladder), "ladder": call.ladder}
    return chat_task(call.messages, fields)


def reader_of(output: OutputType[T]) -> Callable[[Ended], T]:
    """Makes the value of a job's answer. It raises ``OutputError`` where that has not the form."""

    def read(ended: Ended) -> T:
        answer = answer_of(ended)
        if isinstance(output, DecisionType):
            return cast("T", output.decided(answer.choices, id=answer.id, model=answer.model, usage=answer.usage))
        refusal = answer.choices[0].refusal if answer.choices else ""
        return output.read(
            Reply(text=answer.text, finish_reason=answer.finish_reason, refusal=refusal, usage=answer.usage)
        )

    return read


async def jobs_here(target: Target) -> Jobs:
    """The jobs of the target's bus, for the loop that runs now.

    Raises:
        PromptError: its model is in this process, where nothing outlives it.
    """
    if target.client is None:
        await shared_client()
        return cast("Jobs", across_loops(connected().jobs))
    if not isinstance(target.client, Client):
        raise PromptError("jobs need a bus: a model in this process has none")
    return target.client.jobs


async def submit(jobs: Jobs, call: RenderedCall, read: Callable[[Ended], T]) -> Job[T]:
    """Returns when the job is in its queue."""
    job_call = JobCall(
        model=call.model,
        task=task_of(call),
        options=call.options,
        name=call.name.rpartition(".")[2],
        labels=_labels(call),
    )
    record = await submit_job(jobs, job_call)
    return Job(jobs, record.id, read)


async def batch(
    jobs: Jobs, calls: Sequence[RenderedCall], read: Callable[[Ended], T], *, name: str, kept_s: int
) -> Batch[T]:
    """See ``Client.batch``."""
    return await submit_batch(jobs, [task_of(call) for call in calls], _row(calls, name, kept_s), read)


async def map_calls(
    jobs: Jobs,
    calls: Sequence[RenderedCall],
    read: Callable[[Ended], T],
    *,
    name: str,
    kept_s: int,
    concurrency: int,
    progress: Callable[[Progress], None] | None,
) -> list[Row[T]]:
    """See ``Client.map``."""
    tasks = [task_of(call) for call in calls]
    if not tasks:
        return []
    row = _row(calls, name, kept_s)
    return await map_rows(jobs, tasks, row, read, concurrency=concurrency, progress=progress)


class BlockingBatch(Generic[T]):
    """A batch, for callers without an event loop; see :class:`modelbus.jobs.Batch`."""

    def __init__(self, batch: Batch[T]) -> None:
        self.name, self.ids = batch.name, batch.ids
        self._batch = batch

    def __repr__(self) -> str:
        return f"BlockingBatch({self.name!r}, {len(self.ids)} rows)"

    def __len__(self) -> int:
        return len(self.ids)

    def results(self) -> list[Row[T]]:
        """Waits for all rows; what failed is in its row, the others are not lost for it."""
        return background.run(self._batch.results())

    def status(self) -> list[JobStatus]:
        """How each row is now, in their order."""
        return background.run(self._batch.status())

    def cancel(self) -> list[JobStatus]:
        """Takes back all rows that have not ended."""
        return background.run(self._batch.cancel())


def _row(calls: Sequence[RenderedCall], name: str, kept_s: int) -> RowOptions:
    if not calls:
        raise PromptError("a batch needs at least one row")
    first = calls[0]
    options = msgspec.structs.replace(first.options, lane="lo")
    return RowOptions(model=first.model, name=name, options=options, kept_s=kept_s, labels=_labels(first))


def _labels(call: RenderedCall) -> dict[str, str]:
    labels = {"prompt": call.name, "version": call.version}
    return {name: value for name, value in labels.items() if value}
