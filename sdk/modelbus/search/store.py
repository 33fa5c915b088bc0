"""A store of chunks for asyncio programs: written, deleted and searched over the bus."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from typing import Literal, get_args

import msgspec
from modelbus_broker.asking import CallOptions
from modelbus_broker.errors import (
    DeadlineExceeded,
    InvalidRequest,
    ModelBusError,
    ModelNotFound,
    NotFound,
)
from modelbus_broker.messages.search import (
    Chunk,
    Chunks,
    CreateStore,
    Delete,
    DropStore,
    Found,
    Fusion,
    GetStore,
    Hit,
    Mode,
    Operation,
    ReadChunks,
    Search,
    StoreRecord,
    StoreStatus,
    UpdateStore,
    Upsert,
    ValueKind,
    Written,
)

from ..gathering import gathered
from ..model_client import ModelClient
from .asking import DEFAULT_SERVICE, R, ask
from .embedding import embed, embedded
from .items import (
    Item,
    Order,
    Vector,
    Where,
    batches,
    chunk_of,
    filter_of,
    must_be_unicode,
    packed,
    sort_of,
    whole_text,
)

UPSERTS_AT_ONCE = 4
PAGE = 200


class SearchResult(msgspec.Struct, frozen=True, kw_only=True):
    """Hits, the best first."""

    hits: list[Hit]
    mode: Mode | Literal["listing"]
    cover: float = 0.0  #: share of the query's terms in the best hit by text
    reranked: bool = False
    #: Why it is not, where a rerank model was named: it was too slow, or not there.
    rerank_error: str = ""

    @property
    def texts(self) -> list[str]:
        return [hit.chunk.text for hit in self.hits]


class AsyncStore:
    """A store by its name. Nothing is asked before the first call; the store is made when something is written first.

    Args:
        name: of the store.
        client: what asks; None: the connection that this process shares.
        service: the search service that has it.
        embedding_model: on the bus; embeds what is written without a vector, and queries. "": vectors are given, or there
            are none. It is the store's for life.
        query_prefix, passage_prefix: before texts that are embedded; models like e5 need "query: " and "passage: ".
        dimensions: of its vectors; 0: the first one says it.
        schema: attributes that chunks may have, and their kinds (string, number, boolean); empty: any.
        metadata: texts of the caller's own.
        fusion: how its two rankings become one, where a search says nothing.
        timeout_s: of one operation, waiting in the queue included.
    """

    def __init__(
        self,
        name: str,
        *,
        client: ModelClient | None = None,
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
        self.name = name
        self.service = service
        self.timeout_s = timeout_s
        self._client = client
        self._wanted = StoreRecord(
            name=name,
            embedding_model=embedding_model,
            dimensions=dimensions,
            query_prefix=query_prefix,
            passage_prefix=passage_prefix,
            schema=dict(schema or {}),
            metadata=dict(metadata or {}),
            fusion=fusion or Fusion(),
        )
        self._record: StoreRecord | None = None

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.name!r}, service={self.service!r})"

    @property
    def embedding_model(self) -> str:
        """As it was given; "": whatever the store has."""
        return self._wanted.embedding_model

    def namespace(self, name: str) -> AsyncStore:
        """A store of its own with the same settings, ``<store>:<name>``: a user's, a project's."""
        if not name:
            raise InvalidRequest("a namespace has a name", param="name")
        other = AsyncStore(f"{self.name}:{name}", client=self._client, service=self.service, timeout_s=self.timeout_s)
        other._wanted = msgspec.structs.replace(self._wanted, name=other.name)
        return other

    # The store itself

    async def create(self, *, must_be_new: bool = False) -> StoreStatus:
        """Makes it. One that is there is taken as it is.

        Raises:
            InvalidRequest: it is there, and was built with another embedding model; the message says what to do.
            Conflict: it is there, and ``must_be_new``.
            ModelBusError: as :func:`modelbus.search.asking.ask`.
        """
        status = await self._ask(CreateStore(record=self._wanted, must_be_new=must_be_new), StoreStatus)
        self._record = self._fitting(status.record)
        return status

    async def status(self) -> StoreStatus:
        """What it is and how much is in it.

        Raises:
            NotFound: nothing has been written to it yet.
        """
        status = await self._ask(GetStore(store=self.name), StoreStatus)
        self._record = status.record
        return status

    async def update(
        self,
        *,
        metadata: Mapping[str, str] | None = None,
        schema: Mapping[str, ValueKind] | None = None,
        fusion: Fusion | None = None,
    ) -> StoreStatus:
        """Changes what is given."""
        update = UpdateStore(
            store=self.name,
            metadata=None if metadata is None else dict(metadata),
            schema=None if schema is None else dict(schema),
            fusion=fusion,
        )
        return await self._ask(update, StoreStatus)

    async def drop(self) -> int:
        """Deletes it with all that is in it; returns how many chunks that were. One that is not there: 0."""
        self._record = None
        try:
            return (await self._ask(DropStore(store=self.name), Written)).chunks
        except NotFound:
            return 0

    # Chunks

    async def upsert(self, items: Item | Iterable[Item], *, lane: Literal["hi", "lo"] | None = None) -> list[str]:
        """Writes chunks over those with the same ids; embeds those that have a text and no vector.

        When it returns they are on disk and found by searches. When it raises, some may have been written: writing all of
        them again is harmless.

        Args:
            lane: of the embedding requests; None: ``lo``, for batches, where there are many texts.

        Returns:
            their ids, in the order of the items. One without an id gets one of its file, its place there and its text.

        Raises:
            InvalidRequest: one of them cannot be stored; the message names it and says what to do.
            ModelBusError: as :func:`modelbus.search.asking.ask`, and what the embedding model says.
        """
        given = [items] if isinstance(items, Chunk | Mapping) else list(items)
        chunks = [chunk_of(item) for item in given]
        record = await self._made()
        if record.embedding_model:
            chunks = await embedded(await self._asks(), record, chunks, lane)
        await self.write_as_it_is(chunks)
        return [chunk.id for chunk in chunks]

    async def write_as_it_is(self, chunks: Sequence[Chunk]) -> None:
        """The same without embedding anything: chunks that are complete, such as those of an export."""
        try:
            await self._write(chunks, await self._made())
        except NotFound:  # somebody has dropped it since this process saw it
            await self._write(chunks, await self._made())

    async def _write(self, chunks: Sequence[Chunk], record: StoreRecord) -> None:
        parts = list(batches(chunks))
        if not parts:
            return
        *first, last = (Upsert(store=self.name, chunks=part, embedding_model=record.embedding_model) for part in parts)
        await gathered(
            [self._ask(msgspec.structs.replace(part, searchable=False), Written) for part in first], UPSERTS_AT_ONCE
        )
        # What is searchable with the last is so with all before it.
        await self._ask(last, Written)

    async def delete(
        self,
        ids: str | Iterable[str] = (),
        *,
        file_id: str | Iterable[str] = (),
        filter: Where | None = None,
        everything: bool = False,
    ) -> int:
        """Deletes the chunks that any of these names; returns how many there were."""
        delete = Delete(
            store=self.name, ids=_listed(ids), file_ids=_listed(file_id), filter=filter_of(filter), everything=everything
        )  # fmt: skip
        return (await self._ask(delete, Written)).chunks

    async def get(self, ids: str | Iterable[str], *, vectors: bool = False) -> list[Chunk]:
        """Chunks by their ids, in that order; those that are not there are left out."""
        wanted = _listed(ids)
        found: list[Chunk] = []
        for start in range(0, len(wanted), PAGE):
            page = ReadChunks(store=self.name, ids=wanted[start : start + PAGE], vectors=vectors)
            found += (await self._ask(page, Chunks)).chunks
        return found

    async def chunks(self, *, vectors: bool = False) -> AsyncIterator[Chunk]:
        """All of them, in the order of their ids, a page at a time."""
        after = ""
        while True:
            page = ReadChunks(store=self.name, after=after, limit=PAGE, vectors=vectors)
            found = (await self._ask(page, Chunks)).chunks
            for chunk in found:
                yield chunk
            if len(found) < PAGE:
                return
            after = found[-1].id

    # Searching

    async def search(
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
        """The chunks that answer a query best: by its words and, where the store has vectors, by its meaning.

        Args:
            query: words.
            vector: of the query; None: the store's embedding model makes it of the words.
            mode: ``text`` or ``vector`` looks one way only; None: whatever the query and the store allow.
            filter: only chunks that it lets through.
            sort: an order for the hits; without a query and a vector, of the listing.
            fusion: how the two rankings become one; None: the store's setting.
            score_threshold: hits with less are left out. Scores of a hybrid search are 0 to 1.
            rerank: a rerank model on the bus: it orders the best ``rerank_window`` hits anew, and its scores are the hits'.
            rerank_timeout_s: when it has not answered by then the order stays as it was.
            also: more stores of the service, searched with this one.

        Raises:
            NotFound: there is no such store.
            InvalidRequest: the query cannot be meant as it stands, or its vector is of another model.
            ModelNotFound: there is no such rerank or embedding model, or no such service.
        """
        must_be_unicode(query, "the query", "query")
        if mode is not None and mode not in get_args(Mode):
            raise InvalidRequest(f"mode is {', '.join(get_args(Mode))}, or None, not {mode!r}", param="mode")
        record = await self._known()
        embeds = record.embedding_model and query and mode != "text" and vector is None
        if mode == "vector" and vector is None and not embeds:
            raise InvalidRequest(
                f"store {self.name!r} has no embedding model: give the query's vector, or search by text", param="mode"
            )
        found_by = packed(vector) if vector is not None and mode != "text" else b""
        if embeds:
            (found_by,) = await embed(await self._asks(), record.embedding_model, [query], prefix=record.query_prefix)
        search = Search(
            stores=[self.name, *also],
            text="" if mode == "vector" else query,
            vector=found_by,
            embedding_model=record.embedding_model if embeds else "",
            filter=filter_of(filter),
            limit=max(limit, rerank_window) if rerank else limit,
            sort=[] if rerank else sort_of(sort),
            fusion=fusion,
            score_threshold=None if rerank else score_threshold,
            highlights=highlights,
        )
        found = await self._ask(search, Found)
        way: Mode = "hybrid" if search.text and search.vector else "vector" if search.vector else "text"
        result = SearchResult(hits=found.hits, mode=way, cover=found.cover)
        if rerank:
            result = await self._reranked(result, query, rerank, rerank_timeout_s)
            kept = [hit for hit in result.hits if score_threshold is None or hit.score >= score_threshold]
            result = msgspec.structs.replace(result, hits=kept[:limit])
        return result

    async def find(
        self, *, filter: Where | None = None, sort: Order = (), limit: int = 100, offset: int = 0
    ) -> list[Chunk]:
        """Chunks that a filter lets through, in an order; without one by their ids."""
        search = Search(
            stores=[self.name], filter=filter_of(filter), sort=sort_of(sort), limit=limit, offset=offset, highlights=False
        )  # fmt: skip
        return [hit.chunk for hit in (await self._ask(search, Found)).hits]

    async def _reranked(self, result: SearchResult, query: str, model: str, timeout_s: float) -> SearchResult:
        if not query or not result.hits:
            return result
        client = await self._asks()
        texts = [whole_text(hit.chunk) for hit in result.hits]
        options = CallOptions(budget_ms=max(1, round(timeout_s * 1000)))
        try:
            async with asyncio.timeout(timeout_s):
                ranking = await client.rerank(model, query, texts, options=options)
        except (TimeoutError, DeadlineExceeded):
            words = f"the rerank model {model!r} did not answer within {timeout_s:g} s"
            return msgspec.structs.replace(result, rerank_error=words)
        except ModelNotFound:
            raise
        except ModelBusError as error:
            # The hits are there, in a good order: a model that fails does not take them away.
            return msgspec.structs.replace(result, rerank_error=error.message)
        hits = [
            msgspec.structs.replace(
                result.hits[document.index],
                score=document.score,
                scores=msgspec.structs.replace(result.hits[document.index].scores, rerank=document.score),
            )
            for document in ranking.documents
        ]
        return msgspec.structs.replace(result, hits=hits, reranked=True)

    # Asking

    async def _made(self) -> StoreRecord:
        """The store's record; makes the store where it is not there."""
        if self._record is None:
            await self.create()
        assert self._record is not None
        return self._record

    async def _known(self) -> StoreRecord:
        if self._record is None:
            await self.status()
        assert self._record is not None
        return self._fitting(self._record)

    def _fitting(self, record: StoreRecord) -> StoreRecord:
        """Raises: InvalidRequest: it was made for another embedding model than this one is for, or for none."""
        wanted, has = self._wanted.embedding_model, record.embedding_model
        if wanted and wanted != has:
            raise InvalidRequest(
                f"store {self.name!r} was built with {f'the embedding model {has!r}' if has else 'no embedding model'}, not "
                f"with {wanted!r}: their vectors do not compare. Use that one, or build the store anew",
                param="embedding_model",
            )
        return record

    async def _ask(self, operation: Operation, expected: type[R]) -> R:
        try:
            return await ask(await self._asks(), self.service, operation, expected, timeout_s=self.timeout_s)
        except NotFound:
            self._record = None  # somebody dropped it
            raise

    async def _asks(self) -> ModelClient:
        if self._client is None:
            from ..shared import shared_client

            return await shared_client()
        return self._client


def _listed(texts: str | Iterable[str]) -> list[str]:
    return [texts] if isinstance(texts, str) else list(texts)
