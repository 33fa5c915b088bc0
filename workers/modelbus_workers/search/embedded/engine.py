"""The embedded store engine: all stores of one folder, each opened on its first use."""

from __future__ import annotations

import asyncio
import logging
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from modelbus_broker.errors import Conflict, EngineFailed, ModelBusError, NotFound
from modelbus_broker.messages.search import Chunk, Filter, Sort, StoreRecord, StoreStatus

from ..base import Ranking, Rankings, StoreEngine
from ..fusion import Scored
from .database import Database, Durability
from .folder import Folder
from .store import EmbeddedStore

log = logging.getLogger(__name__)

T = TypeVar("T")


class EmbeddedEngine(StoreEngine):
    """Owns a folder. Its threads do all that blocks."""

    name = "embedded"

    def __init__(self, folder: Path, *, durability: Durability = "full") -> None:
        self._folder = Folder(folder)
        self._durability: Durability = durability
        self._records: dict[str, StoreRecord] = {}
        self._damaged: dict[str, str] = {}  #: stores that could not be opened at the start, and why
        self._open: dict[str, EmbeddedStore] = {}
        self._changing: dict[str, asyncio.Lock] = {}
        self._threads = ThreadPoolExecutor(max_workers=4 + (os.cpu_count() or 1), thread_name_prefix="store")
        self._taking: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        self._folder.own()
        self._records = await self._run(self._read_records)

    def _read_records(self) -> dict[str, StoreRecord]:
        found: dict[str, StoreRecord] = {}
        for path in self._folder.existing():
            database = Database(path / "store.db", self._durability)
            try:
                database.check()
                record = database.record
                found[record.name] = record
            except (ModelBusError, OSError) as error:
                # The others are served all the same; whoever asks for this one gets the words.
                log.error("a store cannot be opened: %s", error)
                name = path.name.rpartition("-")[0]  # what it is called is in it; its folder says so for plain names
                self._damaged[name if self._folder.of(name) == path else path.name] = str(error)
            finally:
                database.close()
        return found

    async def close(self) -> None:
        # What the text indexes have not taken they take the next time.
        for task in self._taking:
            task.cancel()
        stores, self._open = list(self._open.values()), {}
        for store in stores:
            await store.idle.wait()
            await self._run(store.close)
        self._threads.shutdown()
        self._folder.close()

    async def records(self) -> dict[str, StoreRecord]:
        return {
            name: self._open[name].record if name in self._open else record for name, record in self._records.items()
        }

    def damaged(self) -> Mapping[str, str]:
        return self._damaged

    async def record(self, store: str) -> StoreRecord:
        return (await self._store(store)).record

    async def create(self, record: StoreRecord) -> None:
        async with self._alone(record.name):
            if record.name in self._records or self._folder.of(record.name).exists():
                raise Conflict(f"there is a store {record.name!r} already")
            await self._run(lambda: self._make(record))
            self._records[record.name] = record

    def _make(self, record: StoreRecord) -> None:
        draft = self._folder.draft()
        try:
            EmbeddedStore.make(draft, record, self._durability)
            self._folder.publish(draft, record.name)
        except BaseException:
            shutil.rmtree(draft, ignore_errors=True)
            raise

    async def update(self, record: StoreRecord) -> None:
        await self._on(record.name, lambda opened: opened.update(record))

    async def status(self, store: str) -> StoreStatus:
        return await self._on(store, lambda opened: opened.status())

    async def drop(self, store: str) -> int:
        try:
            opened = await self._store(store)
        except EngineFailed:  # it is damaged: nobody can say what was in it
            async with self._alone(store):
                await self._run(lambda: self._folder.remove(store))
                self._records.pop(store, None)
                self._damaged.pop(store, None)
            return 0
        async with self._alone(store):
            if self._open.get(store) is not opened:
                raise NotFound(f"store {store!r} is gone already", param="store")
            del self._records[store], self._open[store]
            await opened.idle.wait()
            chunks = (await self._run(opened.database.counts))[0]
            await self._run(opened.close)
            await self._run(lambda: self._folder.remove(store))
            return chunks

    async def upsert(self, store: str, chunks: Sequence[Chunk], *, searchable: bool = True) -> int:
        written = await self._on(store, lambda opened: opened.upsert(chunks))
        self._take_soon(store)
        return written

    async def delete(
        self, store: str, *, ids: Sequence[str] = (), file_ids: Sequence[str] = (), filter: Filter | None = None,
        everything: bool = False,
    ) -> int:  # fmt: skip
        deleted = await self._on(store, lambda opened: opened.delete(ids, file_ids, filter, everything))
        self._take_soon(store)
        return deleted

    async def rank(self, store: str, ranking: Ranking) -> Rankings:
        among = None
        if (condition := ranking.filter) is not None:
            among = await self._on(store, lambda opened: opened.database.matching(condition))
        # Side by side: tantivy and NumPy leave Python's lock to others while they work.
        (text, best), vector = await asyncio.gather(
            self._by_text(store, ranking, among), self._by_vector(store, ranking, among)
        )
        return Rankings(text=text, vector=vector, best=best)

    async def _by_text(
        self, store: str, ranking: Ranking, among: Sequence[int] | None
    ) -> tuple[list[Scored], Chunk | None]:
        if not ranking.terms:
            return [], None
        return await self._on(store, lambda opened: opened.by_text(ranking.terms, ranking.window, among))

    async def _by_vector(self, store: str, ranking: Ranking, among: Sequence[int] | None) -> list[Scored]:
        if not ranking.vector:
            return []
        return await self._on(store, lambda opened: opened.by_vector(ranking.vector, ranking.window, among))

    async def fetch(self, store: str, ids: Sequence[str], *, vectors: bool = False) -> Mapping[str, Chunk]:
        return await self._on(store, lambda opened: opened.database.fetch(ids, vectors=vectors))

    async def listing(
        self, store: str, *, filter: Filter | None, sort: Sequence[Sort], limit: int, offset: int = 0
    ) -> list[Chunk]:
        return await self._on(store, lambda opened: opened.database.listing(filter, sort, limit, offset))

    async def page(self, store: str, *, after: str, limit: int, vectors: bool) -> list[Chunk]:
        return await self._on(store, lambda opened: opened.database.page(after, limit, vectors=vectors))

    # Opening

    async def _on(self, name: str, work: Callable[[EmbeddedStore], T]) -> T:
        """Something done with a store by one of the threads. Who is cancelled does not wait for the thread; the store does."""
        opened = await self._store(name)
        opened.users += 1
        opened.idle.clear()
        loop = asyncio.get_running_loop()
        running = self._threads.submit(work, opened)
        running.add_done_callback(lambda _: loop.call_soon_threadsafe(_release, opened))
        return await asyncio.wrap_future(running)

    async def _store(self, name: str) -> EmbeddedStore:
        opened = self._open.get(name)
        if opened is not None:
            return opened
        async with self._alone(name):
            if name in self._open:
                return self._open[name]
            if not (self._folder.of(name) / "store.db").exists():
                raise NotFound(
                    f"there is no store {name!r}; `modelbus storage status` lists those that are", param="store"
                )
            store = EmbeddedStore(self._folder.of(name), self._durability)
            try:
                await self._run(store.open)
            except BaseException:
                await self._run(store.close)
                raise
            self._open[name] = store
        self._take_soon(name)
        return store

    def _alone(self, name: str) -> asyncio.Lock:
        """Opening, making and dropping a store, one at a time."""
        return self._changing.setdefault(name, asyncio.Lock())

    def _take_soon(self, store: str) -> None:
        """The text index catches up while nobody waits for it. Who searches meanwhile waits for the rest."""
        if not any(task.get_name() == store for task in self._taking):
            task = asyncio.create_task(self._take(store), name=store)
            self._taking.add(task)
            task.add_done_callback(self._taking.discard)

    async def _take(self, name: str) -> None:
        try:
            while (opened := self._open.get(name)) is not None and opened.dirty:
                await self._on(name, lambda store: store.take())
        except ModelBusError as error:
            log.error("%s", error)  # a search says it too

    async def _run(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._threads, work)


def _release(store: EmbeddedStore) -> None:
    store.users -= 1
    if not store.users:
        store.idle.set()
