"""Batches as they stand in the bucket ``files``: ``batch.<id>``, ``open.<id>``, ``claim.<id>``.

The second is there while a batch is not over, the third while a gateway works on it, with its host and process.
"""

from __future__ import annotations

import contextlib
import os
import re
import socket
import time
from collections.abc import Callable

import msgspec
from modelbus_broker import names
from modelbus_broker.buckets import Bucket
from modelbus_broker.connection import Bus
from modelbus_broker.errors import Conflict, ModelBusError, NotFound
from modelbus_broker.messages import encode
from modelbus_broker.messages.files import BatchRecord, BatchStatus, decode_batch
from modelbus_broker.names import random_token

_ID = re.compile(r"batch_([0-9a-f]{11})[0-9a-z]{12}")
#: In one of these a batch does not change any more.
OVER: frozenset[BatchStatus] = frozenset(("failed", "completed", "expired", "cancelled"))
#: A gateway that has not renewed its claim for so long is taken for dead.
CLAIM_S = 10
#: A batch that is over is remembered for so long, as its files are if nobody says otherwise.
KEPT_S = 30 * 24 * 3600
#: A mark without a batch: whoever wrote it died before the batch was there.
_UNMADE_MS = 60_000
_ME = f"{socket.gethostname()}:{os.getpid()}".encode()


def now_ms() -> int:
    return time.time_ns() // 1_000_000


def new_batch_id() -> str:
    return f"batch_{now_ms():011x}{random_token(12)}"


def entered(record: BatchRecord, status: BatchStatus, **changes: object) -> BatchRecord:
    """The record in another status, from now on."""
    at_ms = {**record.at_ms, status: now_ms()}
    return msgspec.structs.replace(record, status=status, at_ms=at_ms, **changes)


class BatchRecords:
    """Reads and writes them."""

    def __init__(self, bus: Bus) -> None:
        self._bucket = Bucket(bus, names.BUCKET_FILES)

    async def get(self, batch_id: str) -> BatchRecord:
        """Raises NotFound: there is no such batch (any more)."""
        return (await self._found(batch_id))[0]

    async def all(self) -> list[BatchRecord]:
        """In no order."""
        return [decode_batch(entry.value) async for _, entry in self._bucket.under("batch.*")]

    async def create(self, record: BatchRecord) -> None:
        """The mark comes first: what is there is seen by some gateway."""
        await self._bucket.put(f"open.{record.id}", b"1")
        await self._bucket.create(f"batch.{record.id}", encode(record))

    async def change(self, batch_id: str, change: Callable[[BatchRecord], BatchRecord]) -> BatchRecord:
        """The record after the change. One that is over is not changed.

        Raises:
            NotFound: there is no such batch (any more).
        """
        while True:
            record, seq = await self._found(batch_id)
            if record.status in OVER:
                return record
            changed = change(record)
            ttl_s = KEPT_S if changed.status in OVER else 0
            try:
                await self._bucket.update(f"batch.{batch_id}", encode(changed), seq, ttl_s=ttl_s)
            except Conflict:
                continue  # changed meanwhile: once more, upon that
            return changed

    async def open(self) -> list[str]:
        """The ids of those that are not over, the oldest first."""
        return sorted([key.partition(".")[2] async for key, _ in self._bucket.under("open.*")])

    async def close(self, batch_id: str) -> None:
        """It is over, or never came to be."""
        await self._bucket.delete(f"open.{batch_id}")

    async def is_unmade(self, batch_id: str) -> bool:
        """Whether there is a mark and will be no batch."""
        made = _ID.fullmatch(batch_id)
        if made is not None and int(made[1], 16) > now_ms() - _UNMADE_MS:
            return False
        try:
            await self.get(batch_id)
        except NotFound:
            return True
        return False

    async def claim(self, batch_id: str) -> int:
        """This gateway works on it; gives what :meth:`renew` wants. Raises Conflict: another one does."""
        return await self._bucket.create(f"claim.{batch_id}", _ME, ttl_s=CLAIM_S)

    async def renew(self, batch_id: str, claim: int) -> int:
        """Raises Conflict: the claim was too old, and another gateway has it."""
        return await self._bucket.update(f"claim.{batch_id}", _ME, claim, ttl_s=CLAIM_S)

    async def release(self, batch_id: str, claim: int) -> None:
        """Another gateway may go on with it at once; without it, when the claim is too old."""
        with contextlib.suppress(ModelBusError, TimeoutError):
            await self._bucket.delete(f"claim.{batch_id}", claim)

    async def _found(self, batch_id: str) -> tuple[BatchRecord, int]:
        entry = await self._bucket.get(f"batch.{batch_id}") if _ID.fullmatch(batch_id) else None
        if entry is None or entry.deleted:
            raise NotFound(f"No such Batch object: {batch_id}", param="batch_id")
        return decode_batch(entry.value), entry.seq
