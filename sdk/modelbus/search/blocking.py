"""A store of chunks for plain programs: the methods of ``AsyncStore``, each waiting for its result."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable, Iterator, Mapping
from typing import Literal

from modelbus_broker.messages.search import Chunk, Fusion, Mode, StoreStatus, ValueKind

from ..shared import background, connected
from .asking import DEFAULT_SERVICE, list_stores
from .items import Item, Order, Vector, Where
from .store import AsyncStore, SearchResult


class Store:
    """See :class:`modelbus.AsyncStore` for the arguments. ``aio`` is the same store for asyncio.

    The connection of this process is made on first use. It may be used from any thread.
    """

    def __init__(
        self,
        name: str,
        *,
        service: str = DEFAULT_SERVICE,
        embedding_model: str = "",
        query_prefix: str = "",
        passage_prefix: str = "",
        dimensions: int = 0,
        schema: Mapping[str, ValueKind] | None = None,
        metadata: Mapping[str, str] | None = None,
        fusion: Fusion | None = None,
        timeout_s: float = 60.0,
    ) -> None:
        self.aio = AsyncStore(
            name, service=service, embedding_model=embedding_model, query_prefix=query_prefix,
            passage_prefix=passage_prefix, dimensions=dimensions, schema=schema, metadata=metadata, fusion=fusion,
            timeout_s=timeout_s,
        )  # fmt: skip

    @classmethod
    def _of(cls, aio: AsyncStore) -> Store:
        store = cls(aio.name)
        store.aio = aio
        return store

    def __repr__(self) -> str:
        return f"Store({self.name!r}, service={self.aio.service!r})"

    @property
    def name(self) -> str:
        return self.aio.name

    def namespace(self, name: str) -> Store:
        """See :meth:`AsyncStore.namespace`."""
        return Store._of(self.aio.namespace(name))

    def create(self, *, must_be_new: bool = False) -> StoreStatus:
        """See :meth:`AsyncStore.create`."""
        return background.run(self.aio.create(must_be_new=must_be_new))

    def status(self) -> StoreStatus:
        """See :meth:`AsyncStore.status`."""
        return background.run(self.aio.status())

    def update(
        self,
        *,
        metadata: Mapping[str, str] | None = None,
        schema: Mapping[str, ValueKind] | None = None,
        fusion: Fusion | None = None,
    ) -> StoreStatus:
        """See :meth:`AsyncStore.update`."""
        return background.run(self.aio.update(metadata=metadata, schema=schema, fusion=fusion))

    def drop(self) -> int:
        """See :meth:`AsyncStore.drop`."""
        return background.run(self.aio.drop())

    def upsert(self, items: Item | Iterable[Item], *, lane: Literal["hi", "lo"] | None = None) -> list[str]:
        """See :meth:`AsyncStore.upsert`."""
        return background.run(self.aio.upsert(items, lane=lane))

    def delete(
        self,
        ids: str | Iterable[str] = (),
        *,
        file_id: str | Iterable[str] = (),
        filter: Where | None = None,
        everything: bool = False,
    ) -> int:
        """See :meth:`AsyncStore.delete`."""
        return background.run(self.aio.delete(ids, file_id=file_id, filter=filter, everything=everything))

    def get(self, ids: str | Iterable[str], *, vectors: bool = False) -> list[Chunk]:
        """See :meth:`AsyncStore.get`."""
        return background.run(self.aio.get(ids, vectors=vectors))

    def chunks(self, *, vectors: bool = False) -> Iterator[Chunk]:
        """See :meth:`AsyncStore.chunks`."""
        chunks = self.aio.chunks(vectors=vectors)
        while (chunk := background.run(_next(chunks))) is not None:
            yield chunk

    def search(
        self,
        query: str = "",
        *,
        vector: Vector | None = None,
        mode: Mode | None = None,
        filter: Where | None = None,
        limit: int = 10,
        sort: Order = (),
        fusion: Fusion | None = None,
        score_threshold: float | None = None,
        rerank: str = "",
        rerank_window: int = 50,
        rerank_timeout_s: float = 5.0,
        also: Iterable[str] = (),
        highlights: bool = True,
    ) -> SearchResult:
        """See :meth:`AsyncStore.search`."""
        search = self.aio.search(
            query, vector=vector, mode=mode, filter=filter, limit=limit, sort=sort, fusion=fusion,
            score_threshold=score_threshold, rerank=rerank, rerank_window=rerank_window,
            rerank_timeout_s=rerank_timeout_s, also=also, highlights=highlights,
        )  # fmt: skip
        return background.run(search)

    def find(self, *, filter: Where | None = None, sort: Order = (), limit: int = 100, offset: int = 0) -> list[Chunk]:
        """See :meth:`AsyncStore.find`."""
        return background.run(self.aio.find(filter=filter, sort=sort, limit=limit, offset=offset))


def stores(service: str = DEFAULT_SERVICE) -> list[StoreStatus]:
    """All stores of a service, by name.

    Raises:
        ModelNotFound: there is no such service.
    """
    return background.run(list_stores(connected(), service=service))


async def _next(chunks: AsyncIterator[Chunk]) -> Chunk | None:
    return await anext(chunks, None)
