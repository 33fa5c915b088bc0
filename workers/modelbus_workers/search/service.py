"""What a search service does with an operation: checks it, asks the engine, and puts the answer together.

Here rankings become hits: fusion, the coverage of the query, highlights, several stores in one answer. Engines know nothing
of it, so that the same question gets the same answer from all of them.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
from modelbus_broker.errors import Conflict, InvalidRequest
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
    ListStores,
    Operation,
    ReadChunks,
    Reply,
    ScoreParts,
    Search,
    StoreRecord,
    Stores,
    StoreStatus,
    UpdateStore,
    Upsert,
    Value,
    Written,
)
from modelbus_broker.names import random_token

from . import checks
from .base import Ranking, StoreEngine
from .fusion import Fused, coverage, fuse, merge
from .highlights import highlights
from .terms import TOKENIZER_VERSION, query_terms, terms

MAX_STORES = 32  #: in one search


class SearchService:
    """Operations on the stores of one engine."""

    def __init__(self, engine: StoreEngine) -> None:
        self.engine = engine
        #: Writes to a store one after another: what an upsert checks still holds when it is written.
        self._writing: dict[str, asyncio.Lock] = {}

    async def answer(self, operation: Operation) -> Reply:
        """Does it.

        Raises:
            InvalidRequest: it cannot be meant as it stands; nothing was done.
            NotFound: there is no such store.
            Conflict: there is one already.
            EngineFailed: the disk or the server behind the engine failed; nothing was acknowledged.
        """
        engine = self.engine
        match operation:
            case CreateStore():
                return await self._create(operation)
            case GetStore(store=store):
                return await engine.status(store)
            case ListStores():
                names = sorted(await engine.records())
                damaged = [self._unusable(name, words) for name, words in sorted(engine.damaged().items())]
                return Stores(stores=[*await asyncio.gather(*map(self._status, names)), *damaged])
            case UpdateStore():
                return await self._update(operation)
            case DropStore(store=store):
                async with self._alone(store):
                    return Written(chunks=await engine.drop(store))
            case Upsert():
                return await self._upsert(operation)
            case Delete():
                return await self._delete(operation)
            case Search():
                return await self._search(operation)
            case ReadChunks():
                return await self._read(operation)

    # Stores

    async def _status(self, store: str) -> StoreStatus:
        try:
            return await self.engine.status(store)
        except Exception as error:  # one damaged store does not hide the others
            return self._unusable(store, str(error))

    def _unusable(self, store: str, words: str) -> StoreStatus:
        return StoreStatus(record=StoreRecord(name=store, metadata={"error": words}), engine=self.engine.name)

    async def _create(self, operation: CreateStore) -> StoreStatus:
        wanted = operation.record
        checks.check_record(wanted)
        async with self._alone(wanted.name):
            record = msgspec.structs.replace(
                wanted, id=f"vs_{random_token(24)}", created_ms=time.time_ns() // 1_000_000, tokenizer=TOKENIZER_VERSION
            )
            try:
                await self.engine.create(record)
            except Conflict:
                if operation.must_be_new:
                    raise
                found = await self.engine.record(wanted.name)
                checks.check_model(found, wanted.embedding_model)
                if wanted.dimensions and found.dimensions and wanted.dimensions != found.dimensions:
                    words = checks.wrong_dimensions(found, "a vector", wanted.dimensions, found.dimensions)
                    raise InvalidRequest(words, param="dimensions") from None
            return await self.engine.status(wanted.name)

    async def _update(self, operation: UpdateStore) -> StoreStatus:
        async with self._alone(operation.store):
            record = await self.engine.record(operation.store)
            given = {
                name: value
                for name in ("metadata", "fusion", "schema")
                if (value := getattr(operation, name)) is not None
            }
            record = msgspec.structs.replace(record, **given)
            checks.check_record(record)
            await self.engine.update(record)
            return await self.engine.status(operation.store)

    # Chunks

    async def _upsert(self, operation: Upsert) -> Written:
        async with self._alone(operation.store):
            record = await self.engine.record(operation.store)
            if any(chunk.vector for chunk in operation.chunks):
                checks.check_model(record, operation.embedding_model)
            chunks = checks.clean_chunks(record, operation.chunks)
            return Written(
                chunks=await self.engine.upsert(operation.store, chunks, searchable=operation.searchable)
                if chunks
                else 0
            )

    async def _delete(self, operation: Delete) -> Written:
        if operation.filter is not None:
            checks.check_filter(operation.filter)
        async with self._alone(operation.store):
            deleted = await self.engine.delete(
                operation.store, ids=operation.ids, file_ids=operation.file_ids, filter=operation.filter,
                everything=operation.everything,
            )  # fmt: skip
            return Written(chunks=deleted)

    async def _read(self, operation: ReadChunks) -> Chunks:
        if operation.ids:
            if len(operation.ids) > checks.MAX_CHUNKS:
                raise InvalidRequest(f"at most {checks.MAX_CHUNKS} ids at once", param="ids")
            found = await self.engine.fetch(operation.store, operation.ids, vectors=operation.vectors)
            return Chunks(chunks=[found[id_] for id_ in dict.fromkeys(operation.ids) if id_ in found])
        if not 1 <= operation.limit <= checks.MAX_LIMIT:
            raise InvalidRequest(f"limit is 1 to {checks.MAX_LIMIT}, not {operation.limit}", param="limit")
        page = await self.engine.page(
            operation.store, after=operation.after, limit=operation.limit, vectors=operation.vectors
        )
        return Chunks(chunks=page)

    # Searching

    async def _search(self, search: Search) -> Found:
        checks.check_search(search)
        stores = list(dict.fromkeys(search.stores))
        if len(stores) > MAX_STORES:
            raise InvalidRequest(f"at most {MAX_STORES} stores in one search, not {len(stores)}", param="stores")
        records = [await self.engine.record(store) for store in stores]
        for record in records:
            if search.vector:
                checks.check_model(record, search.embedding_model)
                given = len(search.vector) // 4
                if record.dimensions and given != record.dimensions:
                    wrong = checks.wrong_dimensions(record, "the query's vector", given, record.dimensions)
                    raise InvalidRequest(wrong, param="vector")
        if not (search.text or search.vector):
            return await self._listing(search, stores)
        words = query_terms(search.text)
        fusion = search.fusion or records[0].fusion
        if fusion.window < search.limit:
            fusion = msgspec.structs.replace(fusion, window=search.limit)
        found = await asyncio.gather(*(self._ranked(store, search, words, fusion) for store in stores))
        ranked = merge({store: ranking for store, (ranking, _) in zip(stores, found, strict=True)})
        if search.score_threshold is not None:
            ranked = [pair for pair in ranked if pair[1].score >= search.score_threshold]
        ranked = ranked[: search.limit]
        hits = await self._hits(search, ranked, words)
        return Found(hits=_sorted(hits, search), cover=max((cover for _, cover in found), default=0.0))

    async def _ranked(self, store: str, search: Search, words: list[str], fusion: Fusion) -> tuple[list[Fused], float]:
        ranking = Ranking(terms=words, vector=search.vector, filter=search.filter, window=fusion.window)
        found = await self.engine.rank(store, ranking)
        cover = 0.0
        if found.text:
            best, chunk = found.text[0].key, found.best
            if chunk is None:
                chunk = (await self.engine.fetch(store, [best])).get(best)
            cover = coverage(words, terms(searched_text(chunk))) if chunk is not None else 1.0
        return fuse(found.text, found.vector, fusion, cover=cover), cover

    async def _listing(self, search: Search, stores: Sequence[str]) -> Found:
        if len(stores) > 1:
            raise InvalidRequest("a listing (a search without text and vector) is of one store", param="stores")
        chunks = await self.engine.listing(
            stores[0], filter=search.filter, sort=search.sort, limit=search.limit, offset=search.offset
        )
        if search.vectors:
            found = await self.engine.fetch(stores[0], [chunk.id for chunk in chunks], vectors=True)
            chunks = [found.get(chunk.id, chunk) for chunk in chunks]
        return Found(hits=[Hit(store=stores[0], chunk=chunk) for chunk in chunks])

    async def _hits(self, search: Search, ranked: Sequence[tuple[str, Fused]], words: Sequence[str]) -> list[Hit]:
        wanted: dict[str, list[str]] = {}
        for store, item in ranked:
            wanted.setdefault(store, []).append(item.key)
        fetched: dict[str, Mapping[str, Chunk]] = {
            store: await self.engine.fetch(store, ids, vectors=search.vectors) for store, ids in wanted.items()
        }
        hits: list[Hit] = []
        for store, item in ranked:
            chunk = fetched[store].get(item.key)
            if chunk is None:
                continue  # deleted meanwhile
            parts = ScoreParts(
                text=item.text, vector=item.vector, text_rank=item.text_rank, vector_rank=item.vector_rank
            )
            hit = Hit(store=store, chunk=chunk, score=item.score, scores=parts)
            if search.highlights and words:
                spans, passage = highlights(chunk.text, words)
                hit = msgspec.structs.replace(hit, highlights=spans, passage=passage)
            hits.append(hit)
        return hits

    def _alone(self, store: str) -> asyncio.Lock:
        return self._writing.setdefault(store, asyncio.Lock())


def searched_text(chunk: Chunk) -> str:
    """What a chunk is found by."""
    return f"{chunk.title}\n{chunk.text}" if chunk.title else chunk.text


def _sorted(hits: list[Hit], search: Search) -> list[Hit]:
    """The hits in the order that was asked for: numbers, texts, truth values, those without the attribute, as listings do."""
    for item in reversed(search.sort):
        groups: dict[str, list[tuple[Value, Hit]]] = {"number": [], "string": [], "boolean": []}
        absent: list[Hit] = []
        for hit in hits:
            value = _value(hit.chunk, item.key)
            if value is None:
                absent.append(hit)
            else:
                groups[checks.kind_of(value)].append((value, hit))
        hits = [hit for group in groups.values() for _, hit in _in_order(group, item.descending)] + absent
    return hits


def _in_order(group: list[tuple[Value, Hit]], descending: bool) -> list[tuple[Value, Hit]]:
    def key(pair: tuple[Value, Hit]) -> Any:
        # All values of a group are of one kind; texts by their UTF-8 bytes, as databases do.
        return pair[0].encode() if isinstance(pair[0], str) else pair[0]

    return sorted(group, key=key, reverse=descending)


def _value(chunk: Chunk, key: str) -> Value | None:
    match key:
        case "$id":
            return chunk.id
        case "$file_id":
            return chunk.file_id
        case "$ordinal":
            return chunk.ordinal
        case _:
            return chunk.attributes.get(key)
