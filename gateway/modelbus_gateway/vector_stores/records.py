"""Vector stores, their files and batches as they stand in one bucket: ``store.<id>``, ``file.<store>.<file>``, ``batch.<store>.<id>``.

``making.<id>`` says in which search service a store is being made, until its record is there.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from typing import NoReturn

import msgspec
from modelbus_broker import names
from modelbus_broker.buckets import Bucket
from modelbus_broker.connection import Bus
from modelbus_broker.errors import Conflict, NotFound
from modelbus_broker.messages import encode
from modelbus_broker.messages.files import (
    FileBatchRecord,
    IndexFile,
    VectorStoreFileRecord,
    VectorStoreRecord,
    decode_file_batch,
    decode_vector_store,
    decode_vector_store_file,
)

#: What may be a part of a key; anything else is the id of nothing.
_TOKEN = re.compile(r"[A-Za-z0-9_-]{1,80}")
_DAY_MS = 24 * 3600 * 1000
#: A store's last activity is written down again after so long: expiry counts in days.
_ACTIVE_MS = 60_000


def now_ms() -> int:
    return time.time_ns() // 1_000_000


class VectorStoreRecords:
    """Reads and writes them."""

    def __init__(self, bus: Bus) -> None:
        self.bus = bus
        self.bucket = Bucket(bus, names.BUCKET_VECTOR_STORES)

    # Stores

    async def store(self, store_id: str) -> VectorStoreRecord:
        """Raises NotFound: there is no such store."""
        value = await self._value("store", store_id)
        return decode_vector_store(value[0]) if value else _none("VectorStore", store_id, "vector_store_id")

    async def stores(self) -> list[VectorStoreRecord]:
        """All, in no order."""
        return [decode_vector_store(entry.value) async for _, entry in self.bucket.under("store.*")]

    async def put_store(self, record: VectorStoreRecord) -> None:
        await self.bucket.put(f"store.{record.id}", encode(record))

    async def change_store(
        self, store_id: str, change: Callable[[VectorStoreRecord], VectorStoreRecord]
    ) -> VectorStoreRecord:
        """Raises NotFound: there is no such store."""
        while True:
            value = await self._value("store", store_id)
            if value is None:
                _none("VectorStore", store_id, "vector_store_id")
            record = change(decode_vector_store(value[0]))
            try:
                await self.bucket.update(f"store.{store_id}", encode(record), value[1])
            except Conflict:
                continue  # changed meanwhile: once more, upon that
            return record

    async def touch(self, record: VectorStoreRecord) -> None:
        """The store was used."""
        if record.expires_days and now_ms() - record.active_ms > _ACTIVE_MS:
            await self.change_store(record.id, lambda it: msgspec.structs.replace(it, active_ms=now_ms()))

    async def forget_store(self, store_id: str) -> None:
        """Deletes a store's records, its own last: until then it can be deleted again."""
        for pattern in (f"file.{store_id}.*", f"batch.{store_id}.*", f"store.{store_id}"):
            async for key, _ in self.bucket.under(pattern):
                await self.bucket.delete(key)

    async def announce_store(self, store_id: str, service: str) -> None:
        """A search service is about to have this store; a gateway that is killed before its record leaves this."""
        await self.bucket.put(f"making.{store_id}", service.encode())

    async def announced_stores(self) -> list[tuple[str, str]]:
        """Ids and search services of those that are being made, or were to be."""
        found = self.bucket.under("making.*")
        return [(key.partition(".")[2], entry.value.decode()) async for key, entry in found]

    async def forget_announcement(self, store_id: str) -> None:
        await self.bucket.delete(f"making.{store_id}")

    # Files

    async def file(self, store_id: str, file_id: str) -> VectorStoreFileRecord:
        """Raises NotFound: the store has no such file."""
        value = await self._value("file", store_id, file_id)
        return decode_vector_store_file(value[0]) if value else _none("VectorStoreFile", file_id, "file_id")

    async def files(self, store_id: str = "*", file_id: str = "*") -> list[VectorStoreFileRecord]:
        """Those of a store, or of a file in all stores; in no order."""
        found = self.bucket.under(f"file.{store_id}.{file_id}")
        return [decode_vector_store_file(entry.value) async for _, entry in found]

    async def put_file(self, record: VectorStoreFileRecord) -> None:
        await self.bucket.put(f"file.{record.store}.{record.file}", encode(record))

    async def change_file(
        self, store_id: str, file_id: str, change: Callable[[VectorStoreFileRecord], VectorStoreFileRecord | None]
    ) -> VectorStoreFileRecord:
        """The record after the change; ``None`` from ``change`` leaves it as it is.

        Raises:
            NotFound: the store has no such file.
        """
        while True:
            value = await self._value("file", store_id, file_id)
            if value is None:
                _none("VectorStoreFile", file_id, "file_id")
            record = decode_vector_store_file(value[0])
            changed = change(record)
            if changed is None:
                return record
            try:
                await self.bucket.update(f"file.{store_id}.{file_id}", encode(changed), value[1])
            except Conflict:
                continue
            return changed

    async def forget_file(self, store_id: str, file_id: str) -> None:
        await self.bucket.delete(f"file.{store_id}.{file_id}")

    async def enqueue(self, record: VectorStoreFileRecord, again: str = "") -> None:
        """Some gateway shall index the file. ``again`` tells a second call from the first, which would be taken for it."""
        await self.enqueue_task(IndexFile(store=record.store, file=record.file, revision=record.revision), again)

    async def enqueue_task(self, task: IndexFile, again: str) -> None:
        await self.bus.js_publish(names.INDEXING, encode(task), msg_id=f"{task.revision}{again}")

    # Batches

    async def batch(self, store_id: str, batch_id: str) -> FileBatchRecord:
        """Raises NotFound: the store has no such batch."""
        value = await self._value("batch", store_id, batch_id)
        return decode_file_batch(value[0]) if value else _none("VectorStoreFileBatch", batch_id, "batch_id")

    async def put_batch(self, record: FileBatchRecord) -> None:
        await self.bucket.put(f"batch.{record.store}.{record.id}", encode(record))

    async def _value(self, *key: str) -> tuple[bytes, int] | None:
        if not all(map(_TOKEN.fullmatch, key)):
            return None
        entry = await self.bucket.get(".".join(key))
        return (entry.value, entry.seq) if entry is not None and not entry.deleted else None


def expires_ms(record: VectorStoreRecord) -> int:
    """When a store expires, Unix time; 0: never."""
    return record.active_ms + record.expires_days * _DAY_MS if record.expires_days else 0


def has_expired(record: VectorStoreRecord) -> bool:
    return 0 < expires_ms(record) <= now_ms()


def _none(what: str, given: str, param: str) -> NoReturn:
    raise NotFound(f"No such {what} object: {given}", param=param)
