"""Whole answers that are kept for those who ask again: in the bucket ``answers``, before the message is acknowledged.

In this order a request that was asked under an Idempotency-Key is either still in its queue or has an answer. A job
(``Request.detached``) is answered once: what is there stays, and a later run is waste.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Sequence

import msgspec
from modelbus_broker import names
from modelbus_broker.blobs import INLINE_LIMIT, get_blob, put_blob
from modelbus_broker.buckets import Bucket
from modelbus_broker.connection import Bus
from modelbus_broker.errors import BusUnavailable, Conflict, ModelBusError
from modelbus_broker.jobs import keep_error
from modelbus_broker.kept import read_kept
from modelbus_broker.messages import KeptAnswer, Request, encode, encode_list

from .outbox import RING_BYTES, Ring

log = logging.getLogger(__name__)

AGAIN_S = 0.5
#: The blob store forgets after a day. What is kept for longer lies in the bucket itself, up to this size.
BLOBS_KEPT_S = 24 * 3600
LONG_LIMIT = 4 << 20


class AnswerKeeper:
    """Stores whole answers."""

    def __init__(self, bus: Bus) -> None:
        self._bus = bus
        self._bucket = Bucket(bus, names.BUCKET_ANSWERS)

    async def has(self, request_id: str) -> bool:
        """An answer is kept. Raises BusUnavailable."""
        kept = await read_kept(self._bus, request_id)
        return kept is not None and not kept.lost

    async def settled(self, request_id: str) -> bool:
        """How a job ended is known: there is an answer, an error, or it was cancelled. Raises BusUnavailable."""
        return await read_kept(self._bus, request_id) is not None

    async def keep(self, request: Request, ring: Ring, frames: Sequence[bytes]) -> bool:
        """Returns when the answer is stored, however long the bus is away; or when it is known that it cannot be.

        False: the request is a job, and how it ended was known before.

        Args:
            frames: of the run that completed it, encoded.
        """
        now_ms = time.time_ns() // 1_000_000
        answer = KeptAnswer(id=request.id, run=ring.run, view=request.view, model=request.model, at_ms=now_ms)
        while True:
            try:
                try:
                    answer = await self._filled(answer, request, ring, frames)
                except BusUnavailable:
                    raise
                except ModelBusError as error:
                    log.warning("the answer of %s cannot be kept: %s", request.id, error.message)
                    answer = msgspec.structs.replace(answer, lost=f"it could not be kept: {error.message}")
                if request.detached:
                    await self._bucket.create(request.id, encode(answer), ttl_s=request.answer_kept_s)
                else:
                    await self._bucket.put(request.id, encode(answer), ttl_s=request.answer_kept_s)
                return True
            except Conflict:
                return await self._is_of(request.id, ring.run)
            except BusUnavailable as error:
                log.warning("the answer of %s waits: %s", request.id, error.message)
                await asyncio.sleep(AGAIN_S)
            except ModelBusError as error:
                # Whoever asks again is told that there is no answer; the one who asked first has it.
                log.error("the answer of %s is not kept: %s", request.id, error.message)
                return True

    async def keep_error(self, request: Request, error: ModelBusError, run: str) -> bool:
        """As :meth:`keep`, for a job that has ended with an error."""
        while True:
            try:
                kept = await keep_error(self._bucket, request.id, error, kept_s=request.answer_kept_s, run=run)
                return kept or await self._is_of(request.id, run)
            except BusUnavailable as away:
                log.warning("the end of job %s waits: %s", request.id, away.message)
                await asyncio.sleep(AGAIN_S)
            except ModelBusError as refused:
                log.error("the end of job %s is not kept: %s", request.id, refused.message)
                return True

    async def _is_of(self, request_id: str, run: str) -> bool:
        """What is kept was kept by this very run, in a try whose acknowledgement was lost."""
        while True:
            try:
                kept = await read_kept(self._bus, request_id)
                return kept is not None and kept.run == run
            except BusUnavailable:
                await asyncio.sleep(AGAIN_S)

    async def _filled(self, answer: KeptAnswer, request: Request, ring: Ring, frames: Sequence[bytes]) -> KeptAnswer:
        if ring.first:
            return msgspec.structs.replace(answer, lost=f"it was larger than {RING_BYTES >> 20} MiB")
        earlier = request.earlier
        if request.earlier_blob is not None:
            earlier = await get_blob(self._bus, request.earlier_blob)
        before = [bytes(raw) for raw in msgspec.msgpack.decode(earlier, type=list[msgspec.Raw])] if earlier else []
        data = encode_list([*before, *frames])
        inline = INLINE_LIMIT
        if request.answer_kept_s > BLOBS_KEPT_S:
            inline = LONG_LIMIT
            if len(data) > inline:
                why = f"it was larger than {LONG_LIMIT >> 20} MiB, and what is larger is kept for 24 h at most"
                return msgspec.structs.replace(answer, lost=why)
        if len(data) <= inline:
            return msgspec.structs.replace(answer, frames=data)
        blob = await put_blob(self._bus, names.answer_blob(request.id), data)
        return msgspec.structs.replace(answer, blob=blob)
