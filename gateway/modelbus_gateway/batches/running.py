"""Batches are worked on by whichever gateway has claimed them, row by row, as jobs.

A row's job has an id that is made of the batch, the row and what it asks, so a gateway that takes a batch up finds what was
asked before: it asks the rest, reads the answers that are kept, and writes the files anew. Nothing of a batch is lost when a
gateway is killed, and nothing is asked twice. The record is changed by compare-and-set: two gateways that believe to have
the same batch, because one stood still, do the same work, and one of them ends it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable

import msgspec
from modelbus.answers import AnswerBuilder
from modelbus.jobs.batch import row_id
from modelbus.structure.replies import summed
from modelbus_broker.adapters import resolve
from modelbus_broker.asking import CallOptions
from modelbus_broker.calls import Answer
from modelbus_broker.errors import (
    BusUnavailable,
    ConfigurationError,
    Conflict,
    EngineFailed,
    InvalidRequest,
    ModelBusError,
    NotFound,
    QueueFull,
    RequestCancelled,
    RequestTooLarge,
)
from modelbus_broker.jobs import MOST_BUDGET_S, Ended, Jobs
from modelbus_broker.messages import Task, Usage
from modelbus_broker.messages.files import BatchError, BatchRecord, BatchStatus
from modelbus_broker.once import body_hash
from modelbus_broker.publisher import Publisher
from modelbus_broker.registry import Registry

from ..checks import Need
from ..files.store import FileStore, Upload
from ..metrics import Metrics
from ..translate import check_needs
from .records import CLAIM_S, OVER, BatchRecords, entered, now_ms
from .rows import Line, Validation, answer_line, error_line, lines_of, read_body, read_line, unanswered_line

log = logging.getLogger(__name__)

#: Batches of one gateway process at the same time, and rows of one batch.
AT_ONCE, ROWS_AT_ONCE = 4, 256
#: Answers that are there are held back for earlier ones, at most so many.
_HELD = 4096
_LOOK_S, _PROGRESS_S = 3.0, 1.0
#: A bus that is away, or a queue that is full, is tried again after this.
_AGAIN_S = 1.0
#: A row's answer is looked for, for at least so long.
_LEAST_S = 5.0
#: A job may end so much later than its batch.
_LATER_S = 60.0
#: Answers of rows are kept until the batch is over, and some time more.
_KEPT_S = MOST_BUDGET_S + 3600
#: Its input is gone, or its answers have no room: trying again changes nothing.
_HOPELESS = (ConfigurationError, InvalidRequest, NotFound, RequestTooLarge)
_WHY = {"cancelling": "the batch was cancelled", "expired": "the batch has expired"}


class _Stopped(Exception):
    """A row is not to be answered any more."""


class _Row(msgspec.Struct):
    """What became of a row."""

    line: bytes  #: of one of the files
    answered: bool = False
    usage: Usage = Usage()


class BatchRunner:
    """The batches of one gateway process.

    Args:
        model: what a client's name of a model means on the bus.
        role: of answers to chats.
    """

    def __init__(
        self,
        records: BatchRecords,
        publisher: Publisher,
        files: FileStore,
        metrics: Metrics,
        *,
        model: Callable[[str], str],
        role: str,
    ) -> None:
        self.records = records
        self.jobs = Jobs(publisher)
        self.registry: Registry = publisher.registry
        self.files = files
        self.metrics = metrics
        self.model = model
        self.role = role
        self._wake = asyncio.Event()
        self._running: dict[str, asyncio.Task[None]] = {}
        self._looking: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._looking = asyncio.create_task(self._look(), name="batches")

    def wake(self) -> None:
        """There is something to do, which need not wait for the next look."""
        self._wake.set()

    async def close(self) -> None:
        """What is not done goes to another gateway at once."""
        tasks = [task for task in (self._looking, *self._running.values()) if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _look(self) -> None:
        while True:
            try:
                for batch_id in await self.records.open():
                    if len(self._running) >= AT_ONCE:
                        break
                    if batch_id not in self._running:
                        await self._take(batch_id)
            except (ModelBusError, TimeoutError) as error:
                log.info("batches: %s", error or "the bus does not answer")
            except Exception:
                log.exception("looking for batches failed")
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_LOOK_S):
                    await self._wake.wait()
            self._wake.clear()

    async def _take(self, batch_id: str) -> None:
        try:
            claim = await self.records.claim(batch_id)
        except Conflict:
            return  # another gateway has it
        task = asyncio.create_task(self._work(batch_id, claim), name=f"batch {batch_id}")
        self._running[batch_id] = task
        task.add_done_callback(lambda _: self._running.pop(batch_id, None))

    async def _work(self, batch_id: str, claim: int) -> None:
        """Until the batch is over, or the claim is lost."""
        working = asyncio.create_task(self._advance(batch_id), name=f"rows of {batch_id}")
        try:
            while not working.done():
                await asyncio.wait([working], timeout=CLAIM_S / 3)
                if not working.done():
                    with contextlib.suppress(BusUnavailable, TimeoutError):  # it comes back; the claim may be lost then
                        claim = await self.records.renew(batch_id, claim)
            await working
        except Conflict:
            log.warning("%s goes on at another gateway: this one stood still", batch_id)
        except (ModelBusError, TimeoutError) as error:
            log.warning("%s waits: %s", batch_id, error or "the bus does not answer")
            await asyncio.sleep(_AGAIN_S)
        except Exception:
            log.exception("%s failed, and is tried again", batch_id)
            await asyncio.sleep(_LOOK_S)
        finally:
            working.cancel()
            await asyncio.gather(working, return_exceptions=True)
            await self.records.release(batch_id, claim)

    async def _advance(self, batch_id: str) -> None:
        try:
            record = await self.records.get(batch_id)
        except NotFound:
            if await self.records.is_unmade(batch_id):
                await self.records.close(batch_id)
            return
        if record.status == "validating":
            record = await self._validate(record)
        if record.status not in OVER:
            await _Run(self, record).run()
            record = await self.records.get(batch_id)
        await self._tidy(record)
        await self.records.close(batch_id)

    async def _validate(self, record: BatchRecord) -> BatchRecord:
        validation = Validation(record.endpoint)
        try:
            async for number, text in self.lines(record):
                validation.take(number, text)
        except NotFound as error:
            return await self.fail(record, error)
        validation.end()

        def begin(found: BatchRecord) -> BatchRecord:
            if validation.errors:
                return entered(found, "failed", errors=validation.errors, total=validation.total)
            cancelled = found.status == "cancelling"
            found = msgspec.structs.replace(found, total=validation.total)
            return found if cancelled else entered(found, "in_progress")

        return await self.records.change(record.id, begin)

    async def _tidy(self, record: BatchRecord) -> None:
        """Takes away what gateways have written that did not come to end the batch."""
        for file_id in set(record.written) - {record.output_file, record.error_file}:
            try:
                await self.files.delete(await self.files.get(file_id))
            except NotFound:
                continue  # it was never ended, or is gone already
            except BusUnavailable:
                raise
            except ModelBusError as error:  # where it lies nobody answers
                log.warning("file %s of %s stays until it expires: %s", file_id, record.id, error.message)

    async def fail(self, record: BatchRecord, error: ModelBusError) -> BatchRecord:
        """Nothing can become of it."""
        wrong = BatchError(code=error.code, message=error.message, param=error.param or None)
        log.warning("%s failed: %s", record.id, error.message)
        return await self.records.change(record.id, lambda it: entered(it, "failed", errors=[wrong]))

    async def lines(self, record: BatchRecord) -> AsyncIterator[tuple[int, bytes]]:
        """Of its input file, see ``lines_of``. Raises NotFound: it is gone."""
        file = await self.files.get(record.input_file)
        async for numbered in lines_of(self.files.content(file)):
            yield numbered


class _Run:
    """One go through all rows of a batch."""

    def __init__(self, runner: BatchRunner, record: BatchRecord) -> None:
        self._runner = runner
        self._record = record
        #: Why no more rows are asked.
        self._stop: BatchStatus | None = "cancelling" if record.status == "cancelling" else None
        self._asked: dict[str, None] = {}  #: ids of jobs that have not ended
        self._completed = self._failed = 0
        self._usages: list[Usage] = []
        self._uploads: dict[str, Upload] = {}
        self._busy = 0  #: rows that have no answer yet
        self._ended = asyncio.Event()  #: one of them has

    async def run(self) -> None:
        progress = asyncio.create_task(self._tell(), name=f"progress of {self._record.id}")
        try:
            await self._answer_all()
            progress.cancel()
            await self._end()
        except _HOPELESS as error:
            await self._runner.fail(self._record, error)
        except EngineFailed as error:  # where the files lie there is no room, or nobody answers
            if self._left_s() > 0:
                raise
            await self._runner.fail(self._record, error)
        finally:
            progress.cancel()
            await asyncio.gather(progress, return_exceptions=True)
            for upload in self._uploads.values():
                await upload.drop()

    async def _answer_all(self) -> None:
        """Rows are answered side by side and written in their order."""
        rows: deque[asyncio.Task[_Row]] = deque()
        try:
            async for number, text in self._runner.lines(self._record):
                while True:
                    await self._write_first(rows)
                    if self._busy < ROWS_AT_ONCE and len(rows) < _HELD:
                        break
                    self._ended.clear()
                    if not rows[0].done():
                        await self._ended.wait()
                self._busy += 1
                rows.append(asyncio.create_task(self._row(number, read_line(text))))
            while rows:
                await asyncio.wait([rows[0]])
                await self._write_first(rows)
        finally:
            for row in rows:
                row.cancel()
            await asyncio.gather(*rows, return_exceptions=True)

    async def _write_first(self, rows: deque[asyncio.Task[_Row]]) -> None:
        """Those that come next and are there."""
        while rows and rows[0].done():
            row = rows.popleft().result()
            what = "output" if row.answered else "errors"
            if what not in self._uploads:
                self._uploads[what] = self._runner.files.upload(None)
            await self._uploads[what].write(row.line)
            self._completed += row.answered
            self._failed += not row.answered
            self._usages.append(row.usage)

    async def _row(self, number: int, line: Line) -> _Row:
        job = ""
        try:
            asked = read_body(self._record.endpoint, line, self._runner.role)
            model = self._runner.model(asked.model)
            target, adapter = resolve(self._runner.registry, model)
            needs = [*([Need("model", "adapters")] if adapter is not None else []), *asked.translation.needs]
            check_needs(needs, asked.model, self._runner.registry.workers_of(target))
            task = asked.translation.task
            job = row_id("", self._record.id, number, body_hash(model, task))
            answer = await self._answered(model, number, job, asked.translation.timeout_s, task)
            return _Row(answer_line(line, job, asked.body(answer, job)), True, answer.usage)
        except _Stopped:
            return self._taken_back(line, job)
        except RequestCancelled as error:
            return self._taken_back(line, job) if self._stop else _Row(error_line(line, job, error))
        except ModelBusError as error:
            return _Row(error_line(line, job, error))
        except Exception:
            log.exception("row %d of %s", number, self._record.id)
            return _Row(error_line(line, job, ModelBusError("The gateway failed on this request; its log says why.")))
        finally:
            self._busy -= 1
            self._ended.set()

    def _taken_back(self, line: Line, job: str) -> _Row:
        code = "batch_expired" if self._stop == "expired" else "batch_cancelled"
        return _Row(unanswered_line(line, job, code, f"{_WHY[self._stop or 'cancelling']} before this was answered"))

    async def _answered(self, model: str, number: int, job: str, timeout_s: float, task: Task) -> AnswerBuilder:
        """Raises _Stopped, and what the job ended with."""
        new = await self._submitted(model, number, job, timeout_s, task)
        self._asked[job] = None
        try:
            ended = await self._end_of(job)
        finally:
            self._asked.pop(job, None)
        answer = AnswerBuilder()
        for frame in ended.frames:
            if isinstance(frame, Answer):
                answer.add(frame)
        if new:
            self._runner.metrics.tokens(model, answer.usage)
        return answer

    async def _end_of(self, job: str) -> Ended:
        while True:
            try:
                # One that has ended is read, however late it is.
                async with asyncio.timeout(max(_LEAST_S, self._left_s())):
                    return await self._runner.jobs.ended(job)
            except (BusUnavailable, TimeoutError):
                if self._left_s() <= 0:
                    self._stop = self._stop or "expired"
                    await self._take_back([job])
                    raise _Stopped from None
            await asyncio.sleep(_AGAIN_S)

    async def _submitted(self, model: str, number: int, job: str, timeout_s: float, task: Task) -> bool:
        """The row's job is in its queue; False: it was asked before. Waits for a bus that is away and for a full queue."""
        jobs = self._runner.jobs
        while True:
            try:
                with contextlib.suppress(NotFound):
                    await jobs.status(job)
                    return False
                if self._left_s() <= 0:
                    self._stop = self._stop or "expired"
                if self._stop is not None:
                    raise _Stopped
                # Of the batch's end it hears from the batch, which says so in its own words.
                budget_s = min(self._left_s() + _LATER_S, MOST_BUDGET_S, timeout_s or MOST_BUDGET_S)
                options = CallOptions(id=job, lane="lo", budget_ms=max(1, int(budget_s * 1000)))
                await jobs.submit(model, task, options, kept_s=_KEPT_S, batch=self._record.id, index=number)
                return True
            except (QueueFull, BusUnavailable, TimeoutError) as error:
                log.debug("row %d of %s waits: %s", number, self._record.id, error)
            await asyncio.sleep(_AGAIN_S)

    def _left_s(self) -> float:
        return (self._record.expires_ms - now_ms()) / 1000

    async def _tell(self) -> None:
        """Writes down how far it is, and hears whether it is to stop."""
        said = (-1, -1)
        while True:
            try:
                counts = self._completed, self._failed
                if counts == said:
                    record = await self._runner.records.get(self._record.id)
                else:
                    record = await self._runner.records.change(self._record.id, self._counted)
                    said = counts
                if record.status == "cancelling" and self._stop is None:
                    self._stop = "cancelling"
                    await self._take_back(list(self._asked))
            except (ModelBusError, TimeoutError) as error:
                log.info("%s: %s", self._record.id, error or "the bus does not answer")
            await asyncio.sleep(_PROGRESS_S)

    def _counted(self, found: BatchRecord) -> BatchRecord:
        """Whoever takes a batch up counts from the beginning, and what was said stays until that is more."""
        completed, failed = max(found.completed, self._completed), max(found.failed, self._failed)
        return msgspec.structs.replace(found, completed=completed, failed=failed)

    async def _take_back(self, jobs: Iterable[str]) -> None:
        async def one(job: str) -> None:
            with contextlib.suppress(ModelBusError, TimeoutError):
                await self._runner.jobs.cancel(job)

        await asyncio.gather(*map(one, jobs))

    async def _end(self) -> None:
        written = [upload.id for upload in self._uploads.values()]

        def begin(found: BatchRecord) -> BatchRecord:
            found = found if found.status == "cancelling" else entered(found, "finalizing")
            return msgspec.structs.replace(found, written=[*found.written, *written])

        if (await self._runner.records.change(self._record.id, begin)).status in OVER:
            return  # another gateway has ended it
        output, errors = await self._file("output"), await self._file("errors")

        def end(found: BatchRecord) -> BatchRecord:
            over: BatchStatus = "cancelled" if found.status == "cancelling" else "completed"
            return entered(
                found, "expired" if self._stop == "expired" else over, output_file=output, error_file=errors,
                completed=self._completed, failed=self._failed, usage=summed(self._usages),
            )  # fmt: skip

        await self._runner.records.change(self._record.id, end)

    async def _file(self, what: str) -> str:
        """The id of the output or of the errors; "" if there are none."""
        upload = self._uploads.get(what)
        if upload is None:
            return ""
        name = f"{self._record.id}_{what}.jsonl"
        record = await upload.end(name, "batch_output", self._record.output_lives_s)
        del self._uploads[what]
        return record.id
