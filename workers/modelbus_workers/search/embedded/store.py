"""One embedded store: its database, its text index and its vectors, kept together. Blocking; threads call it."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Iterable, Sequence
from pathlib import Path

import msgspec
from modelbus_broker.messages.search import Chunk, Filter, StoreRecord, StoreStatus

from ..fusion import Scored
from .database import Change, Database, Durability
from .folder import size_of
from .text_index import TextIndex
from .vectors import VectorMatrix

log = logging.getLogger(__name__)

#: Exact search grows with each vector: beyond this a store is better off on Elasticsearch.
MANY_VECTORS = 150_000


class EmbeddedStore:
    """Writes are on disk when they return; the text index follows, at the latest with the next search."""

    def __init__(self, folder: Path, durability: Durability) -> None:
        self.folder = folder
        self.database = Database(folder / "store.db", durability)
        self._text = TextIndex(self.database, folder)
        self._vectors: VectorMatrix | None = None
        self._ids: dict[int, str] = {}  #: rid -> id: asked a hundred times by each search
        self._changing = threading.Lock()
        self._taking = threading.Lock()
        self._warned = False
        self._changes, self._taken = 1, 0  #: of the database; those that the text index has
        self.users = 0  #: threads that work with it; counted by the engine
        self.idle = asyncio.Event()
        self.idle.set()
        self.record = StoreRecord(name="")

    @classmethod
    def make(cls, folder: Path, record: StoreRecord, durability: Durability) -> None:
        """A new store in an empty folder."""
        Database.make(folder / "store.db", record, durability)

    def open(self) -> None:
        self.database.check()
        self.record = self.database.record
        self._text.open()
        self._ids = self.database.ids()
        if self.record.dimensions:
            self._vectors = VectorMatrix(self.record.dimensions, self.database.counts()[1])
            for part in self.database.vectors():
                self._vectors.add(part)

    def close(self) -> None:
        with self._taking, self._changing:
            self._text.close()
            self.database.close()

    @property
    def dirty(self) -> bool:
        """The text index lags behind."""
        return self._taken < self._changes

    def status(self) -> StoreStatus:
        chunks, vectors, files = self.database.counts()
        return StoreStatus(
            record=self.record,
            engine="embedded",
            chunks=chunks,
            vectors=vectors,
            files=files,
            bytes=size_of(self.folder),
        )

    def update(self, record: StoreRecord) -> None:
        with self._changing:
            self.database.set_meta("record", msgspec.json.encode(record).decode())
            self.record = record

    # Writing

    def upsert(self, chunks: Sequence[Chunk]) -> int:
        with self._changing:
            record = None
            first = next((chunk.vector for chunk in chunks if chunk.vector), b"")
            if first and not self.record.dimensions:
                record = msgspec.structs.replace(self.record, dimensions=len(first) // 4)
            change = self.database.upsert(chunks, record)
            self.record = record or self.record
            self._follow(change)
            return len(chunks)

    def delete(self, ids: Sequence[str], file_ids: Sequence[str], condition: Filter | None, everything: bool) -> int:
        with self._changing:
            change = self.database.delete(ids=ids, file_ids=file_ids, condition=condition, everything=everything)
            self._follow(change)
            return len(change.removed)

    def _follow(self, change: Change) -> None:
        self._changes += 1
        for rid in change.removed:
            self._ids.pop(rid, None)
        self._ids.update((rid, chunk.id) for rid, chunk in change.added)
        added = [(rid, chunk.vector) for rid, chunk in change.added if chunk.vector]
        if self._vectors is None and added:
            self._vectors = VectorMatrix(self.record.dimensions)
        if self._vectors is not None:
            if change.removed:
                self._vectors.remove(change.removed)
            if added:
                self._vectors.add(added)
            if len(self._vectors) > MANY_VECTORS and not self._warned:
                self._warned = True
                log.warning(
                    "store %s has %d vectors: exact search slows down with each, Elasticsearch is made for so many",
                    self.record.name, len(self._vectors),
                )  # fmt: skip

    def take(self) -> None:
        """Lets the text index catch up.

        Raises:
            EngineFailed: it cannot be written.
        """
        if self.dirty:
            with self._taking:
                # What is counted here is pending in the database already: it changes before the count does.
                changes = self._changes
                if self._taken < changes:
                    self._text.take()
                    self._taken = changes

    # Ranking

    def by_text(
        self, terms: Sequence[str], window: int, among: Sequence[int] | None
    ) -> tuple[list[Scored], Chunk | None]:
        """The best by text, and the first of them itself."""
        self.take()
        found = self._scored(self._text.search(terms, window, among))
        best = self.database.fetch([found[0].key], vectors=False).get(found[0].key) if found else None
        return found, best

    def by_vector(self, vector: bytes, window: int, among: Sequence[int] | None) -> list[Scored]:
        return self._scored(self._vectors.search(vector, window, among)) if self._vectors else []

    def _scored(self, found: Iterable[tuple[int, float]]) -> list[Scored]:
        """By score, then by id; what was deleted meanwhile is left out."""
        ids = self._ids
        kept = [Scored(key, score) for rid, score in found if (key := ids.get(rid)) is not None]
        return sorted(kept, key=lambda item: (-item.score, item.key))
