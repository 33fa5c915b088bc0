"""Asking once: a request under an Idempotency-Key is run and paid for once, however often it is sent.

The key's record is created first, then the request is published. Who comes later under the same key takes up the
request that the record names: it runs, or its worker has kept the answer, or its publisher died before it published,
and then the later one publishes the same message.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
import time

import msgspec

from . import names
from .asking import CallOptions
from .attaching import Attaching
from .buckets import Bucket, Entry
from .calls import Call
from .errors import AnswerNotKept, BusUnavailable, Conflict, KeyReused, ModelBusError, StreamMoved, StreamNotResumable
from .messages import KeyRecord, Request, Task, decode_key_record, encode
from .publisher import Publisher

log = logging.getLogger(__name__)

#: How long the answer to a key is kept.
KEPT_S = 24 * 3600
#: Between two tries to write a record.
AGAIN_S = 0.2


def record_key(tenant: str, key: str) -> str:
    """Where the record of a tenant's key lies; keys are free text."""
    return hashlib.sha256(f"{tenant}\0{key}".encode()).hexdigest()


def body_hash(model: str, task: Task) -> str:
    """What was asked. How the answer is to be delivered, streamed or plain, is no part of it."""
    return hashlib.sha256(model.encode() + b"\0" + encode(task)).hexdigest()


class Once:
    """Publishes requests under keys for one publisher."""

    def __init__(self, publisher: Publisher, attaching: Attaching) -> None:
        self._publisher, self._attaching = publisher, attaching
        self._records = Bucket(publisher.bus, names.BUCKET_IDEMPOTENCY)

    async def submit(self, model: str, task: Task, options: CallOptions) -> tuple[Call, bool]:
        """The call of the request under ``options.idempotency_key``, and whether somebody had asked it before.

        A request that failed is asked anew: only answers are kept.

        Raises:
            KeyReused: something else was asked under this key.
            AnswerNotKept: it was answered, but the answer was too large to be kept.
            ModelBusError: as ``Publisher.submit``.
        """
        key, body = record_key(options.tenant, options.idempotency_key), body_hash(model, task)
        options = msgspec.structs.replace(
            options, id=names.new_request_id(self._publisher.id), answer_kept_s=KEPT_S, outlives=True
        )
        record = encode(KeyRecord(id=options.id, body=body))
        seq, until = 0, time.monotonic() + self._publisher.settings.accept_timeout_s
        while True:
            try:
                entry = await self._written(key, record, seq)
            except BusUnavailable:
                if time.monotonic() > until:
                    raise
                await asyncio.sleep(AGAIN_S)  # while a leader is chosen, as for a request without a key
                continue
            seq = entry.seq if entry is not None else 0
            if entry is None or entry.deleted:
                continue
            earlier = decode_key_record(entry.value)
            if earlier.id == options.id:
                return await self._publish(model, task, options, key, seq), False
            if earlier.body != body:
                raise KeyReused()
            if earlier.failed is None and (call := await self._take_up(model, task, options, earlier.id)) is not None:
                return call, True
            # It came to nothing: the record is replaced, by whoever is first.

    async def _written(self, key: str, record: bytes, seq: int) -> Entry | None:
        """Writes a record over the one with this sequence, if that is still the last. What is there then: ours too when
        an earlier try had written it and the answer was lost."""
        try:
            return Entry(value=record, seq=await self._records.update(key, record, seq))
        except Conflict:
            return await self._records.get(key)

    async def _take_up(self, model: str, task: Task, options: CallOptions, request_id: str) -> Call | None:
        """None: the earlier request came to nothing."""
        asked: Request = self._publisher.describe(model, task, msgspec.structs.replace(options, id=request_id))
        try:
            call = await self._attaching.take_up(
                request_id, model=asked.model, asked=asked, streams=options.stream, if_unread=True
            )
        except AnswerNotKept:
            raise
        except StreamNotResumable as error:
            log.info("request %s is asked anew: %s", request_id, error.message)
            return None
        return call if call.failure is None else None

    async def _publish(self, model: str, task: Task, options: CallOptions, key: str, seq: int) -> Call:
        try:
            call = await self._publisher.submit(model, task, options)
        except BusUnavailable:
            raise  # the queue may have it all the same: whoever comes next finds out
        except ModelBusError:
            with contextlib.suppress(ModelBusError):
                await self._records.delete(key, seq)
            raise
        record = KeyRecord(id=call.id, body=body_hash(model, task))
        call.on_failure = lambda error: self._note(key, seq, record, error)
        return call

    def _note(self, key: str, seq: int, record: KeyRecord, error: ModelBusError) -> None:
        """The request has failed: the next one under this key is asked anew."""
        if not isinstance(error, StreamMoved):
            failed = error.failed(id=record.id, run="", seq=0)
            self._publisher.spawn(self._store(key, seq, msgspec.structs.replace(record, failed=failed)))

    async def _store(self, key: str, seq: int, record: KeyRecord) -> None:
        with contextlib.suppress(ModelBusError):
            await self._records.update(key, encode(record), seq)
