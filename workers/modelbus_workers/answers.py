"""Whole answers that are kept for those who ask again: in the bucket ``answers``, before the message is acknowledged.

In this order a request that was asked under an Idempotency-Key is either still in its queue or has an answer.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence

import msgspec
from modelbus_broker import names
from modelbus_broker.blobs import INLINE_LIMIT, get_blob, put_blob
from modelbus_broker.buckets import Bucket
from modelbus_broker.connection import Bus
from modelbus_broker.errors import BusUnavailable, ModelBusError
from modelbus_broker.messages import KeptAnswer, Request, decode_kept_answer, encode, encode_list

from .outbox import RING_BYTES, Ring

log = logging.getLogger(__name__)

AGAIN_S = 0.5


class AnswerKeeper:
    """Stores whole answers."""

    def __init__(self, bus: Bus) -> None:
        self._bus = bus
        self._bucket = Bucket(bus, names.BUCKET_ANSWERS)

    async def has(self, request_id: str) -> bool:
        """An answer is kept. Raises BusUnavailable."""
        entry = await self._bucket.get(request_id)
        return entry is not None and not entry.deleted and not decode_kept_answer(entry.value).lost

    async def keep(self, request: Request, ring: Ring, frames: Sequence[bytes]) -> None:
        """Returns when the answer is stored, however long the bus is away; or when it is known that it cannot be.

        Args:
            frames: of the run that completed it, encoded.
        """
        answer = KeptAnswer(id=request.id, run=ring.run, view=request.view)
        while True:
            try:
                try:
                    answer = await self._filled(answer, request, ring, frames)
                except BusUnavailable:
                    raise
                except ModelBusError as error:
                    log.warning("the answer of %s cannot be kept: %s", request.id, error.message)
                    answer = msgspec.structs.replace(answer, lost=f"it could not be kept: {error.message}")
                await self._bucket.put(request.id, encode(answer), ttl_s=request.answer_kept_s)
                return
            except BusUnavailable as error:
                log.warning("the answer of %s waits: %s", request.id, error.message)
                await asyncio.sleep(AGAIN_S)
            except ModelBusError as error:
                # Whoever asks again is told that there is no answer; the one who asked first has it.
                log.error("the answer of %s is not kept: %s", request.id, error.message)
                return

    async def _filled(self, answer: KeptAnswer, request: Request, ring: Ring, frames: Sequence[bytes]) -> KeptAnswer:
        if ring.first:
            return msgspec.structs.replace(answer, lost=f"it was larger than {RING_BYTES >> 20} MiB")
        earlier = request.earlier
        if request.earlier_blob is not None:
            earlier = await get_blob(self._bus, request.earlier_blob)
        before = [bytes(raw) for raw in msgspec.msgpack.decode(earlier, type=list[msgspec.Raw])] if earlier else []
        data = encode_list([*before, *frames])
        if len(data) <= INLINE_LIMIT:
            return msgspec.structs.replace(answer, frames=data)
        blob = await put_blob(self._bus, names.answer_blob(request.id), data)
        return msgspec.structs.replace(answer, blob=blob)
