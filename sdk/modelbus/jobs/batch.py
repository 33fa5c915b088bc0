"""Many jobs under one name: submitted at once, or at a pace; the same name and rows again take up what is there."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import itertools
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Sequence
from typing import Any, Generic, NamedTuple, TypeVar

import msgspec
from modelbus_broker import names
from modelbus_broker.asking import CallOptions
from modelbus_broker.errors import InvalidRequest, ModelBusError, NotFound, QueueFull
from modelbus_broker.jobs import KEPT_S, Ended, Jobs, JobStatus, State
from modelbus_broker.messages import Task
from modelbus_broker.once import body_hash

from ..hooks import JobCall
from .job import Job
from .submitting import submit_job

T = TypeVar("T")

#: Rows on their way into the queue, or waited for, at once.
AT_ONCE = 64
#: A queue that is full is tried again after this, unless it says when.
FULL_S = 1.0
_BASE32 = b"0123456789abcdefghjkmnpqrstvwxyz" * 8


class Progress(NamedTuple):
    """How far a map has come."""

    done: int  #: rows with an answer
    failed: int  #: rows with an error
    total: int


class Row(msgspec.Struct, Generic[T], frozen=True, kw_only=True):
    """What became of one row of a batch."""

    index: int
    id: str  #: of its job; "" when it did not get into the queue
    value: T | None = None
    error: ModelBusError | None = None

    def get(self) -> T:
        """The answer. Raises the row's error where there is none."""
        if self.error is not None:
            raise self.error
        assert self.value is not None
        return self.value


class RowOptions(msgspec.Struct, frozen=True, kw_only=True):
    """What is the same for all rows."""

    model: str
    name: str  #: of the batch; "" gives it one of its own
    options: CallOptions
    kept_s: int = KEPT_S
    labels: dict[str, str] = {}
    fresh: bool = False  #: nobody can have submitted them before


class Batch(Generic[T]):
    """The jobs of one batch, in the order of its rows."""

    def __init__(self, jobs: Jobs, name: str, ids: Sequence[str], read: Callable[[Ended], T]) -> None:
        self.name = name
        self.ids = list(ids)
        self._jobs, self._read = jobs, read

    def __repr__(self) -> str:
        return f"Batch({self.name!r}, {len(self.ids)} rows)"

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def jobs(self) -> list[Job[T]]:
        return [Job(self._jobs, job_id, self._read) for job_id in self.ids]

    async def results(self) -> list[Row[T]]:
        """Waits for all rows; what failed is in its row, the others are not lost for it."""
        return [row async for row in self]

    async def __aiter__(self) -> AsyncIterator[Row[T]]:
        """Rows in their order, each as soon as it and all before it have ended."""
        async for row in in_order((self._row(index, job_id) for index, job_id in enumerate(self.ids)), AT_ONCE):
            yield row

    async def _row(self, index: int, job_id: str) -> Row[T]:
        return await row_of(index, Job(self._jobs, job_id, self._read))

    async def status(self) -> list[JobStatus]:
        """How each row is now, in their order. Rows whose records are gone are left out."""
        return await self._of_each(self._jobs.status)

    async def cancel(self) -> list[JobStatus]:
        """Takes back all rows that have not ended."""
        return await self._of_each(self._jobs.cancel)

    async def _of_each(self, ask: Callable[[str], Coroutine[Any, Any, JobStatus]]) -> list[JobStatus]:
        async def one(job_id: str) -> JobStatus | None:
            with contextlib.suppress(NotFound):
                return await ask(job_id)
            return None

        found = [status async for status in in_order((one(job_id) for job_id in self.ids), AT_ONCE)]
        return [status for status in found if status is not None]


async def submit_batch(jobs: Jobs, tasks: Sequence[Task], row: RowOptions, read: Callable[[Ended], T]) -> Batch[T]:
    """Puts all rows into the queue. Where one is refused, what was submitted before stays, and the same call under the same
    name goes on.

    Raises:
        InvalidRequest: there are no rows.
        ModelBusError: as ``Jobs.submit``; a queue that is full is waited for.
    """
    if not tasks:
        raise InvalidRequest("a batch needs at least one row", param="rows")
    row = _named(row)
    submitting = (_submitted(jobs, task, row, index) for index, task in enumerate(tasks))
    ids = [job_id async for job_id in in_order(submitting, AT_ONCE)]
    return Batch(jobs, row.name, ids, read)


async def open_batch(jobs: Jobs, name: str, read: Callable[[Ended], T]) -> Batch[T]:
    """The batch of this name, whoever submitted it: the rows that are remembered, the newest of each place.

    Raises:
        NotFound: nothing is remembered of it.
    """
    newest: dict[int, tuple[int, str]] = {}
    for record in reversed(await jobs.records()):  # of those of one millisecond the one stored last is the newest
        if record.batch == name and record.submitted_ms >= newest.get(record.index, (0, ""))[0]:
            newest[record.index] = (record.submitted_ms, record.id)
    if not newest:
        raise NotFound(f"there is no batch {name!r}: it never was, or its time is over")
    return Batch(jobs, name, [newest[index][1] for index in sorted(newest)], read)


async def map_rows(
    jobs: Jobs,
    tasks: Sequence[Task],
    row: RowOptions,
    read: Callable[[Ended], T],
    *,
    concurrency: int,
    progress: Callable[[Progress], None] | None,
) -> list[Row[T]]:
    """Asks all rows, at most ``concurrency`` of them in the queue at a time, and returns their answers in order.

    A map with a name can be stopped, killed and called again: rows that were submitted go on meanwhile, and those that
    have been answered are not asked again. One without takes back what it has submitted when it is cancelled.

    Raises:
        InvalidRequest: ``concurrency`` is below 1.
    """
    if concurrency < 1:
        raise InvalidRequest(f"concurrency must be at least 1, not {concurrency}", param="concurrency")
    resumable = bool(row.name)
    row = _named(row)
    counts = {"done": 0, "failed": 0}
    open_jobs: dict[str, Job[T]] = {}

    async def one(index: int, task: Task) -> Row[T]:
        try:
            job_id = await _submitted(jobs, task, row, index)
        except ModelBusError as error:
            result: Row[T] = Row(index=index, id="", error=error)
        else:
            open_jobs[job_id] = job = Job(jobs, job_id, read)
            result = await row_of(index, job)
            open_jobs.pop(job_id, None)
        counts["failed" if result.error is not None else "done"] += 1
        if progress is not None:
            progress(Progress(counts["done"], counts["failed"], len(tasks)))
        return result

    rows = (one(index, task) for index, task in enumerate(tasks))
    try:
        return [result async for result in in_order(rows, concurrency)]
    except BaseException:
        if not resumable:
            with contextlib.suppress(ModelBusError):
                await Batch(jobs, row.name, list(open_jobs), read).cancel()
        raise


async def row_of(index: int, job: Job[T]) -> Row[T]:
    """A row's end, whatever it is."""
    try:
        return Row(index=index, id=job.id, value=await job.result())
    except ModelBusError as error:
        return Row(index=index, id=job.id, error=error)


async def in_order(work: Iterable[Coroutine[Any, Any, T]], at_once: int) -> AsyncIterator[T]:
    """Runs coroutines, ``at_once`` of them at a time, and yields what they return in their order.

    Args:
        work: each coroutine is made when there is room for it.
    """
    running: list[asyncio.Task[T]] = []
    waiting = iter(work)
    try:
        while True:
            ahead = sum(not task.done() for task in running)
            # What is done and not yet wanted holds no place, up to a bound on what is kept here.
            while ahead < at_once and len(running) < 16 * at_once and (following := next(waiting, None)) is not None:
                running.append(asyncio.create_task(following))
                ahead += 1
            if not running:
                return
            if not running[0].done():
                await asyncio.wait([task for task in running if not task.done()], return_when=asyncio.FIRST_COMPLETED)
                continue
            yield running.pop(0).result()
    finally:
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)


def row_id(tenant: str, batch: str, index: int, body: str, again: int = 0) -> str:
    """The id of a row's job: the same for the same row of the same batch, another one when what is asked has changed.

    Args:
        body: a hash of what is asked.
        again: how many jobs of this row came to nothing before.
    """
    origin = _token(f"{tenant}\0{batch}")
    return f"j{origin}-{0:011x}-{_token(f'{index} {again} {body}')}"


def _token(text: str) -> str:
    return hashlib.sha256(text.encode()).digest()[:12].translate(_BASE32).decode()


def _named(row: RowOptions) -> RowOptions:
    return row if row.name else msgspec.structs.replace(row, name=f"batch-{names.random_token(12)}", fresh=True)


async def _submitted(jobs: Jobs, task: Task, row: RowOptions, index: int) -> str:
    """The id of a row that is in the queue, or was before; raises as ``Jobs.submit``, but waits for a full queue.

    What failed, was cancelled, or is no longer kept is asked anew.
    """
    body = body_hash(row.model, task)
    for again in itertools.count():
        job_id = row_id(row.options.tenant, row.name, index, body, again)
        state = None if row.fresh else await _state(jobs, job_id)
        if state is None:
            break
        if state in ("waiting", "running", "done"):
            return job_id
    options = msgspec.structs.replace(row.options, id=job_id)
    call = JobCall(
        model=row.model, task=task, options=options, kept_s=row.kept_s, batch=row.name, index=index, labels=row.labels
    )
    while True:
        try:
            return (await submit_job(jobs, call)).id
        except QueueFull as error:
            await asyncio.sleep(error.retry_after_s or FULL_S)


async def _state(jobs: Jobs, job_id: str) -> State | None:
    try:
        return (await jobs.status(job_id)).state
    except NotFound:
        return None
