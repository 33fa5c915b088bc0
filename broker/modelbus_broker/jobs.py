"""Jobs: requests that outlive whoever asked. No publisher waits for one; its answer, or its error, is kept.

A job is an ordinary request in an ordinary queue, with ``detached`` set: its worker sends no frames, tries again by itself
what may succeed later, and writes how it ended into the bucket ``answers`` before it acknowledges the message. The first
who writes there says how the job ended, once and for all: a second run of it is waste, and a cancelled job stays that.
The record in the bucket ``jobs`` is written when the queue has stored the message, and says where it lies there.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Mapping, Sequence
from typing import Literal

import msgspec

from . import names
from .asking import CallOptions, check_room, make_request
from .buckets import Bucket
from .connection import JetStreamError
from .errors import (
    AnswerNotKept,
    BusUnavailable,
    Conflict,
    DeadlineExceeded,
    InvalidRequest,
    ModelBusError,
    NotFound,
    RequestCancelled,
    error_of,
)
from .kept import frames_of, read_kept
from .messages import (
    Deployment,
    Failed,
    Frame,
    JobRecord,
    KeptAnswer,
    Stop,
    Task,
    decode_job_record,
    encode,
)
from .publisher import Publisher
from .reading import read_batch
from .starts import Starts
from .storing import packed, remove_message
from .topology import depths

State = Literal["waiting", "running", "done", "failed", "cancelled", "gone"]

#: A job in one of these states will not change any more.
ENDED: frozenset[State] = frozenset({"done", "failed", "cancelled", "gone"})

#: How long an answer is kept if nobody says, and at most.
KEPT_S = 24 * 3600
MOST_KEPT_S = 30 * 24 * 3600
LEAST_KEPT_S = 60
#: How long a job may take if nobody says, and at most: a body that is too large for a message lies in the blob store,
#: which forgets after 25 hours.
MOST_BUDGET_S = 24 * 3600
#: The queue has so long to store a job.
STORE_S = 30.0
#: Between two looks at a job that is waited for. Its end is heard of at once; a look finds what was missed.
LOOK_S = 5.0
#: How old what is known of the depth of the queues may be.
DEPTH_S = 1.0
#: A job that has left its queue, and whose answer is not there, is looked at again after this before it is given up.
SETTLE_S = 1.0


class JobStatus(msgspec.Struct, frozen=True, kw_only=True):
    """How a job is.

    ``waiting``: in its queue, also between two tries. ``running``: a worker has started it. ``gone``: it has ended, and
    how is not known (any more): its answer was kept for ``kept_s``.
    """

    id: str
    state: State
    model: str
    submitted_ms: int = 0  #: Unix time
    ended_ms: int = 0  #: 0: it has not ended, or when is not known
    budget_ms: int = 0  #: it is not started later than this after it was submitted
    kept_s: int = 0
    lane: str = ""
    tenant: str = ""
    name: str = ""
    batch: str = ""
    index: int = 0
    labels: dict[str, str] = {}
    code: str = ""  #: of the error that it ended with
    message: str = ""  #: and its words


class Ended(msgspec.Struct, frozen=True, kw_only=True):
    """The frames of a job that is done."""

    id: str
    model: str
    frames: list[Frame]


class Jobs:
    """Submits jobs and reads what became of them, over the connection of one publisher."""

    def __init__(self, publisher: Publisher) -> None:
        self._publisher, self._bus = publisher, publisher.bus
        #: Stands for a publisher in the ids of these jobs; nobody listens there.
        self._origin = names.new_publisher_id("job")
        self._answers = Bucket(self._bus, names.BUCKET_ANSWERS)
        self._records = Bucket(self._bus, names.BUCKET_JOBS)
        self._starts = Starts(self._bus)
        self._depths: dict[str, int] = {}
        self._depths_at = 0.0

    async def submit(
        self,
        model: str,
        task: Task,
        options: CallOptions,
        *,
        kept_s: int = KEPT_S,
        name: str = "",
        batch: str = "",
        index: int = 0,
        labels: Mapping[str, str] | None = None,
    ) -> JobRecord:
        """Returns when the job is in its queue and can be found by its id: from then on it needs nobody.

        Args:
            options: ``id`` may be one of a job that was submitted before under the same id, or was about to be.
            kept_s: how long its answer is kept from its end on.

        Raises:
            InvalidRequest: a time is out of bounds.
            ModelNotFound: no deployment serves this model.
            QueueFull: the model's queue is at its limit.
            BusUnavailable: the bus did not store it in time.
        """
        if not LEAST_KEPT_S <= kept_s <= MOST_KEPT_S:
            raise InvalidRequest(
                f"an answer is kept from {LEAST_KEPT_S} s to {MOST_KEPT_S // 86400} days, not {kept_s} s",
                param="kept_s",
            )
        if not 0 <= options.budget_ms <= MOST_BUDGET_S * 1000:
            most = MOST_BUDGET_S * 1000
            raise InvalidRequest(
                f"budget_ms of a job may be 0 to {most} ms, not {options.budget_ms}", param="budget_ms"
            )
        options = msgspec.structs.replace(
            options,
            id=options.id or names.new_request_id(self._origin),
            detached=True,
            stream=False,
            answer_kept_s=kept_s,
        )
        model, options, deployments = self._publisher.resolved(model, options)
        await self._check_room(model, deployments, options)
        request = make_request(self._publisher.id, model, task, options, deployments)
        payload = await packed(self._bus, request, check=self._publisher.untyped)
        ack = await self._bus.js_publish(
            names.request_subject(model, options.lane, request.share),
            payload,
            msg_id=names.message_id(request.id, request.attempt),
            ttl_s=request.budget_ms // 1000 + 60,
            timeout_s=STORE_S,
        )
        record = JobRecord(
            id=request.id,
            model=model,
            submitted_ms=time.time_ns() // 1_000_000,
            budget_ms=request.budget_ms,
            kept_s=kept_s,
            stream=ack.stream,
            seq=ack.seq,
            lane=options.lane,
            tenant=options.tenant,
            name=name,
            batch=batch,
            index=index,
            labels=dict(labels or {}),
        )
        await self._store(record)
        return record

    async def status(self, job_id: str) -> JobStatus:
        """How a job is, whoever submitted it.

        Raises:
            InvalidRequest: the text is no job's id.
            NotFound: there is no such job (any more).
        """
        check_id(job_id)
        kept, record = await asyncio.gather(read_kept(self._bus, job_id), self._record(job_id))
        if record is None and kept is None:
            raise NotFound(
                f"there is no job {job_id}: it never was, or its time is over. `modelbus jobs list` shows those that are"
            )
        return await self._status(job_id, record, kept)

    async def ended(self, job_id: str, timeout_s: float | None = None) -> Ended:
        """Waits for a job's end, whoever submitted it, and returns what it has said.

        Raises:
            InvalidRequest: the text is no job's id.
            NotFound: there is no such job (any more).
            TimeoutError: it has not ended within ``timeout_s``; it goes on.
            AnswerNotKept: it has ended, and how is not known any more.
            ModelBusError: what it ended with.
        """
        check_id(job_id)
        changed = asyncio.Event()
        subject = names.bucket_subject(names.BUCKET_ANSWERS, job_id)
        subscription = await self._bus.subscribe(subject, lambda msg: changed.set())
        try:
            async with asyncio.timeout(timeout_s):
                while True:
                    changed.clear()
                    with contextlib.suppress(BusUnavailable):  # it comes back, and nothing is lost meanwhile
                        if (kept := await read_kept(self._bus, job_id)) is not None:
                            return await self._read(kept)
                        status = await self.status(job_id)
                        if status.state in ENDED:
                            return await self._read(await read_kept(self._bus, job_id), status)
                    with contextlib.suppress(TimeoutError):
                        async with asyncio.timeout(LOOK_S):
                            await changed.wait()
                    # What passes here is stored a moment later.
                    await asyncio.sleep(0.005)
        finally:
            await subscription.unsubscribe()

    async def cancel(self, job_id: str) -> JobStatus:
        """Takes a job back: out of its queue if it waits, off its worker if it runs. One that has ended stays as it is.

        Raises:
            InvalidRequest: the text is no job's id.
            NotFound: there is no such job (any more).
            BusUnavailable: the bus does not answer.
        """
        status = await self.status(job_id)
        if status.state in ENDED:
            return status
        # In this order: who dies here has cancelled it, whoever pulls it from now on does not run it.
        error = RequestCancelled("the job was cancelled by its id")
        await keep_error(self._answers, job_id, error, kept_s=status.kept_s or KEPT_S)
        record = await self._record(job_id)
        stop = encode(Stop(id=job_id, reason="cancelled by its id"))
        await self._bus.publish(names.control_subject(names.ALL_WORKERS), stop)
        if record is not None and status.state == "waiting":
            with contextlib.suppress(JetStreamError):  # it has just ended
                await remove_message(self._bus, record.stream, record.seq)
        return await self.status(job_id)

    async def find(
        self, *, model: str = "", batch: str | None = None, tenant: str | None = None, limit: int = 100
    ) -> list[JobStatus]:
        """The newest jobs first, with how they are.

        Args:
            batch: only the rows of this batch; "" only what is no row; None: all.
            tenant: only of this one; None: of all.
            limit: at most so many.

        Raises:
            BusUnavailable: the bus does not answer.
        """
        found = [
            record
            for record in await self.records()
            if (not model or record.model == model)
            and (batch is None or record.batch == batch)
            and (tenant is None or record.tenant == tenant)
        ]
        # Of those of one millisecond, which the clock cannot tell apart, the one stored last stays the first.
        found.sort(key=lambda record: (-record.submitted_ms, record.index))
        return await asyncio.gather(*(self._look(record) for record in found[:limit]))

    async def records(self) -> Sequence[JobRecord]:
        """All jobs that are remembered, the one stored last first; raises BusUnavailable."""
        entries = await self._records.all()
        found = []
        for entry in sorted(entries.values(), key=lambda entry: -entry.seq):
            if not entry.deleted:
                with contextlib.suppress(msgspec.MsgspecError):
                    found.append(decode_job_record(entry.value))
        return found

    # Parts

    async def _check_room(self, model: str, deployments: Sequence[Deployment], options: CallOptions) -> None:
        now = time.monotonic()
        if now - self._depths_at > DEPTH_S:
            self._depths, self._depths_at = await depths(self._bus), now
        token = names.model_token(model)
        check_room(model, deployments, options, self._publisher.registry, self._depths.get(token, 0))
        self._depths[token] = self._depths.get(token, 0) + 1

    async def _store(self, record: JobRecord) -> None:
        """The queue has the job: its record is written however long that takes, at most as long as storing it may."""
        until = time.monotonic() + STORE_S
        while True:
            try:
                ttl_s = record.budget_ms // 1000 + record.kept_s + 3600
                await self._records.put(record.id, encode(record), ttl_s=ttl_s)
                return
            except BusUnavailable:
                if time.monotonic() > until:
                    raise
                await asyncio.sleep(0.2)

    async def _record(self, job_id: str) -> JobRecord | None:
        entry = await self._records.get(job_id)
        return None if entry is None or entry.deleted else decode_job_record(entry.value)

    async def _look(self, record: JobRecord) -> JobStatus:
        return await self._status(record.id, record, await read_kept(self._bus, record.id))

    async def _status(self, job_id: str, record: JobRecord | None, kept: KeptAnswer | None) -> JobStatus:
        status = _of_record(job_id, record)
        if kept is None and record is not None:
            kept, state = await self._unanswered(record)
            if kept is None:
                if state == "gone" and time.time() * 1000 > record.submitted_ms + record.budget_ms:
                    late = _too_late(record)
                    return msgspec.structs.replace(status, state="failed", code=late.code, message=late.message)
                return msgspec.structs.replace(status, state=state)
        assert kept is not None
        return _of_answer(status, kept)

    async def _unanswered(self, record: JobRecord) -> tuple[KeptAnswer | None, State]:
        """What is known of a job whose answer was not there; it may come while we look."""
        for _ in range(2):
            queued = await self._is_queued(record)
            starts = await self._starts.read(record.id, 1)
            if queued:
                return None, "running" if starts else "waiting"
            if (kept := await read_kept(self._bus, record.id)) is not None:
                return kept, "done"
            await asyncio.sleep(SETTLE_S)
        return None, "gone"

    async def _is_queued(self, record: JobRecord) -> bool:
        """Its message stays in the queue until its worker has kept its answer."""
        found = await read_batch(self._bus, record.stream, ">", seq=record.seq, batch=1)
        return bool(found) and found[0].seq == record.seq

    async def _read(self, kept: KeptAnswer | None, status: JobStatus | None = None) -> Ended:
        if kept is None:
            assert status is not None
            if status.code == DeadlineExceeded.code:
                raise DeadlineExceeded(status.message)
            raise AnswerNotKept(
                f"the job {status.id} has left its queue and no answer of it is kept (any more): answers of it were to be "
                f"kept for {status.kept_s} s"
            )
        if kept.failed is not None:
            raise error_of(kept.failed)
        if kept.lost:
            raise AnswerNotKept(f"the job was answered, but its answer was not kept: {kept.lost}")
        return Ended(id=kept.id, model=kept.model, frames=await frames_of(self._bus, kept))


def check_id(job_id: str) -> None:
    """Raises InvalidRequest where the text cannot be the id of a request, and so of no job."""
    try:
        names.publisher_of(job_id)
        names.started_ms_of(job_id)
    except (ValueError, IndexError) as error:
        raise InvalidRequest(f"{job_id!r} is not the id of a job: those have the form jORIGIN-TIME-RANDOM") from error


async def keep_error(answers: Bucket, job_id: str, error: ModelBusError, *, kept_s: int, run: str = "") -> bool:
    """Says how a job ended that has no answer. False: it had ended before, and stays as it was.

    Raises:
        BusUnavailable: the bucket does not answer.
    """
    return await keep_failed(answers, job_id, error.failed(id=job_id, run=run, seq=0), kept_s=kept_s)


async def keep_failed(answers: Bucket, job_id: str, failed: Failed, *, kept_s: int) -> bool:
    """As :func:`keep_error`, of an error as it travels."""
    kept = KeptAnswer(id=job_id, run=failed.run, failed=failed, at_ms=time.time_ns() // 1_000_000)
    try:
        await answers.create(job_id, encode(kept), ttl_s=kept_s)
    except Conflict:
        return False
    return True


def _of_record(job_id: str, record: JobRecord | None) -> JobStatus:
    if record is None:
        return JobStatus(id=job_id, state="gone", model="", submitted_ms=names.started_ms_of(job_id))
    return JobStatus(
        id=job_id,
        state="waiting",
        model=record.model,
        submitted_ms=record.submitted_ms,
        budget_ms=record.budget_ms,
        kept_s=record.kept_s,
        lane=record.lane,
        tenant=record.tenant,
        name=record.name,
        batch=record.batch,
        index=record.index,
        labels=record.labels,
    )


def _of_answer(status: JobStatus, kept: KeptAnswer) -> JobStatus:
    if kept.failed is not None:
        state: State = "cancelled" if kept.failed.code == RequestCancelled.code else "failed"
        return msgspec.structs.replace(
            status, state=state, ended_ms=kept.at_ms, code=kept.failed.code, message=kept.failed.message
        )
    if kept.lost:
        return msgspec.structs.replace(
            status, state="gone", ended_ms=kept.at_ms, code=AnswerNotKept.code, message=kept.lost
        )
    return msgspec.structs.replace(status, state="done", ended_ms=kept.at_ms)


def _too_late(record: JobRecord) -> DeadlineExceeded:
    return DeadlineExceeded(f"no worker had begun with the job within {record.budget_ms / 1000:g} s")
