"""The Elasticsearch store engine: one index per store, behind an alias, so that it can be made anew while it serves.

The store's record stands in its index's mapping, so any number of workers share the stores and keep nothing of them.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
from elastic_transport import HttpxAsyncHttpNode
from elasticsearch import ApiError, AsyncElasticsearch, BadRequestError, NotFoundError
from elasticsearch.helpers import async_scan, async_streaming_bulk
from modelbus_broker.errors import ConfigurationError, Conflict, InvalidRequest, ModelBusError, NotFound
from modelbus_broker.messages.search import Chunk, Filter, Sort, StoreRecord, StoreStatus
from modelbus_broker.names import model_token

from ..base import Ranking, Rankings, StoreEngine
from ..checks import wrong_dimensions
from ..fusion import Scored
from ..terms import TOKENIZER_VERSION
from . import queries
from .failures import failed, is_missing_handler, reason, translated, without_password
from .queries import Json

log = logging.getLogger(__name__)

#: A record is read again after so long: another worker may have changed it.
_RECORD_S = 1.0
#: Of one bulk request; Elasticsearch refuses 100 MB.
_BULK_CHUNKS, _BULK_BYTES = 200, 10 << 20
#: A new generation that another worker fills is given up when it has not grown for so long, seconds.
_ABANDONED_S = 60.0


class ElasticSettings(msgspec.Struct, frozen=True, kw_only=True):
    """Where the cluster is. ``repr`` shows no secret."""

    url: str
    api_key: str = ""
    user: str = ""
    password: str = ""
    ca_certs: str = ""  #: PEM file that its certificate is checked with
    prefix: str = "mb"  #: of index names: services that share a cluster have different ones
    replicas: int = 0  #: copies of each index
    refresh: str = "1s"  #: after so long what was written is found by all workers; who writes and waits, waits for that
    timeout_s: float = 30.0  #: of one HTTP request

    def __repr__(self) -> str:
        return f"ElasticSettings(url={without_password(self.url)!r}, prefix={self.prefix!r}, replicas={self.replicas})"


class ElasticEngine(StoreEngine):
    """Stores on a cluster."""

    name = "elasticsearch"

    def __init__(self, settings: ElasticSettings) -> None:
        self._settings = settings
        self._server = without_password(settings.url)
        credentials: Json = {}
        if settings.api_key:
            credentials["api_key"] = settings.api_key
        elif settings.user:
            credentials["basic_auth"] = (settings.user, settings.password)
        if settings.ca_certs:
            if not Path(settings.ca_certs).is_file():
                raise ConfigurationError(f"ca_certs: there is no file {settings.ca_certs!r} on this host")
            credentials["ca_certs"] = settings.ca_certs
        self._client = AsyncElasticsearch(
            settings.url, node_class=HttpxAsyncHttpNode, request_timeout=settings.timeout_s, max_retries=3,
            retry_on_timeout=True, retry_on_status=(429, 502, 503, 504), **credentials,
        )  # fmt: skip
        self._version = (8, 0)
        self._cached: dict[str, tuple[float, StoreRecord]] = {}
        self._rebuilding: dict[str, asyncio.Lock] = {}

    async def start(self) -> None:
        with translated(self._server):
            nodes = (await self._client.nodes.info(metric="os"))["nodes"]
        versions = [tuple(map(int, node["version"].split("-")[0].split(".")[:2])) for node in nodes.values()]
        self._version = min(versions)  # type: ignore[assignment]
        if self._version[0] < 8:
            raise ConfigurationError(f"Elasticsearch at {self._server} is {self._version[0]}.x: 8 or newer is needed")

    async def close(self) -> None:
        await self._client.close()

    # Stores

    async def create(self, record: StoreRecord) -> None:
        alias = self._alias(record.name)
        with translated(self._server):
            if await self._client.indices.exists_alias(name=alias):
                raise Conflict(f"there is a store {record.name!r} already")
            try:
                await self._make_index(f"{alias}-1", record, aliases={alias: {}})
            except BadRequestError as error:
                if "resource_already_exists" not in reason(error):
                    raise
                raise Conflict(f"there is a store {record.name!r} already") from error

    async def _make_index(self, index: str, record: StoreRecord, *, aliases: Json | None = None) -> None:
        await self._client.indices.create(
            index=index, settings=queries.settings(self._version, replicas=self._settings.replicas, refresh=self._settings.refresh),
            mappings=queries.mappings(record), aliases=aliases or {},
        )  # fmt: skip

    async def records(self) -> dict[str, StoreRecord]:
        with translated(self._server):
            found = await self._client.indices.get(
                index=f"{self._settings.prefix}-*", features=["aliases", "mappings"], allow_no_indices=True
            )
        records = [queries.record_of(index["mappings"]) for index in found.body.values() if index.get("aliases")]
        return {record.name: record for record in records if record is not None}

    async def record(self, store: str) -> StoreRecord:
        known = self._cached.get(store)
        # Another worker's first vector may come at any time, and from then on vectors are searched.
        if known is not None and known[1].dimensions and time.monotonic() - known[0] < _RECORD_S:
            return known[1]
        record = (await self._read(store))[1]
        if record.tokenizer != TOKENIZER_VERSION:
            record = await self._rebuilt(store)
        self._cached[store] = (time.monotonic(), record)
        return record

    async def _read(self, store: str) -> tuple[str, StoreRecord]:
        """The index behind the store's alias, and the record in it."""
        try:
            with translated(self._server):
                try:
                    found = (await self._client.indices.get_mapping(index=self._alias(store))).body
                except NotFoundError:
                    found = {}
            for index, content in found.items():
                if (record := queries.record_of(content["mappings"])) is not None:
                    return str(index), record
        except ModelBusError:
            self._cached.pop(store, None)
            raise
        self._cached.pop(store, None)
        raise NotFound(f"there is no store {store!r}; `modelbus storage status` lists those that are", param="store")

    async def update(self, record: StoreRecord) -> None:
        await self._put_mapping(record, {})

    async def _put_mapping(self, record: StoreRecord, properties: Json) -> None:
        with translated(self._server):
            await self._client.indices.put_mapping(
                index=self._alias(record.name), properties=properties or None, meta=queries.meta(record)["_meta"]
            )
        self._cached[record.name] = (time.monotonic(), record)

    async def status(self, store: str) -> StoreStatus:
        self._cached.pop(store, None)
        record, alias = await self.record(store), self._alias(store)
        with translated(self._server):
            await self._client.indices.refresh(index=alias)
            vectors = {"vectors": {"filter": {"exists": {"field": "vec"}}}} if record.dimensions else {}
            files = {"filter": {"range": {"file_id": {"gt": ""}}}, "aggs": {"count": _distinct_files()}}
            counted = await self._client.search(
                index=alias, size=0, track_total_hits=True, aggs={"files": files, **vectors}
            )
            stats = await self._client.indices.stats(index=alias, metric="store")
        aggregations = counted["aggregations"]
        return StoreStatus(
            record=record, engine=self.name, chunks=counted["hits"]["total"]["value"],
            vectors=aggregations["vectors"]["doc_count"] if vectors else 0,
            files=aggregations["files"]["count"]["value"], bytes=stats["_all"]["total"]["store"]["size_in_bytes"],
        )  # fmt: skip

    async def drop(self, store: str) -> int:
        index, _ = await self._read(store)
        self._cached.pop(store, None)
        with translated(self._server):
            await self._client.indices.refresh(index=index)
            count = (await self._client.count(index=index))["count"]
            await self._client.indices.delete(index=index)
        return int(count)

    # Writing

    async def upsert(self, store: str, chunks: Sequence[Chunk], *, searchable: bool = True) -> int:
        await self._fix_dimensions(store, chunks)
        documents = await asyncio.to_thread(lambda: [queries.source(chunk) for chunk in chunks])
        actions = [{"_op_type": "index", "_id": document["chunk_id"], "_source": document} for document in documents]
        await self._bulk(self._alias(store), actions, refresh="wait_for" if searchable else "false")
        return len(chunks)

    async def _fix_dimensions(self, store: str, chunks: Sequence[Chunk]) -> None:
        """The first vector says how many dimensions the index has."""
        dimensions = next((len(chunk.vector) // 4 for chunk in chunks if chunk.vector), 0)
        record = await self.record(store)
        if not dimensions or record.dimensions == dimensions:
            return
        if record.dimensions:
            raise InvalidRequest(wrong_dimensions(record, "a vector", dimensions, record.dimensions), param="vector")
        fixed = msgspec.structs.replace(record, dimensions=dimensions)
        await self._put_mapping(fixed, {"vec": queries.vector_field(dimensions)})

    async def delete(
        self, store: str, *, ids: Sequence[str] = (), file_ids: Sequence[str] = (), filter: Filter | None = None,
        everything: bool = False,
    ) -> int:  # fmt: skip
        index, _ = await self._read(store)
        if ids and not (file_ids or filter or everything):
            return await self._delete_ids(index, list(dict.fromkeys(ids)))
        conditions: list[Json] = []
        if ids:
            conditions.append({"ids": {"values": list(ids)}})
        if file_ids:
            conditions.append({"terms": {"file_id": [file_id for file_id in file_ids if file_id]}})
        if filter is not None:
            conditions.append(queries.where(filter))
        if everything:
            conditions.append({"match_all": {}})
        if not conditions:
            return 0
        query = {"bool": {"should": conditions, "minimum_should_match": 1}}
        with translated(self._server):
            await self._client.indices.refresh(index=index)
            try:
                done = await self._client.options(request_timeout=600).delete_by_query(
                    index=index, query=query, conflicts="proceed", refresh=True
                )
                return int(done["deleted"])
            except ApiError as error:
                if not is_missing_handler(error):
                    raise
            found = async_scan(self._client, index=index, query={"query": query, "_source": False}, size=1000)
            return await self._delete_ids(index, [hit["_id"] async for hit in found])

    async def _delete_ids(self, index: str, ids: Sequence[str]) -> int:
        if not ids:
            return 0
        actions = [{"_op_type": "delete", "_id": id_} for id_ in ids]
        return await self._bulk(index, actions, refresh="wait_for")

    async def _bulk(self, index: str, actions: Sequence[Json], *, refresh: str) -> int:
        """Returns how many documents changed. One that is not there need not be deleted."""
        changed = 0
        first: tuple[str, int] | None = None
        with translated(self._server):
            async for ok, result in async_streaming_bulk(
                self._client, _each(actions), index=index, chunk_size=_BULK_CHUNKS, max_chunk_bytes=_BULK_BYTES,
                max_retries=5, initial_backoff=1, raise_on_error=False, raise_on_exception=True, refresh=refresh,
                require_alias=None,
            ):  # fmt: skip
                (outcome,) = result.values()
                if ok:
                    changed += 1
                elif outcome.get("status") != 404 or "error" in outcome:
                    error = outcome.get("error") or {}
                    words = (
                        f"{error.get('type', '')}: {error.get('reason', error)}"
                        if isinstance(error, dict)
                        else str(error)
                    )
                    first = first or (words, int(outcome.get("status", 500)))
        if first is not None:
            raise failed(first[0], first[1], self._server)
        return changed

    # Ranking and reading

    async def rank(self, store: str, ranking: Ranking) -> Rankings:
        record, alias = await self.record(store), self._alias(store)
        searches: list[Json] = []
        by_text, by_vector = bool(ranking.terms), bool(ranking.vector and record.dimensions)
        if by_text:
            searches += [{"index": alias}, queries.text_search(ranking)]
        if by_vector:
            rescore = self._version >= queries.RESCORES
            searches += [{"index": alias}, queries.vector_search(ranking, rescore=rescore)]
        if not searches:
            return Rankings()
        with translated(self._server):
            answered = (await self._client.msearch(searches=searches))["responses"]
        hits = [self._hits(store, response) for response in answered]
        text = _scored(hits[0], lambda score: score) if by_text else []
        # Elasticsearch's score of a cosine is (1 + cosine) / 2.
        vector = _scored(hits[-1], lambda score: 2.0 * score - 1.0) if by_vector else []
        return Rankings(text=text, vector=vector)

    def _hits(self, store: str, response: Json) -> list[Json]:
        error = response.get("error")
        if error is None:
            return response["hits"]["hits"]  # type: ignore[no-any-return]
        if error.get("type") == "index_not_found_exception":
            self._cached.pop(store, None)
            raise NotFound(f"store {store!r} is gone", param="store")
        causes = error.get("root_cause") or [error]
        raise failed(f"{error.get('type')}: {causes[0].get('reason')}", int(response.get("status", 500)), self._server)

    async def fetch(self, store: str, ids: Sequence[str], *, vectors: bool = False) -> Mapping[str, Chunk]:
        if not ids:
            return {}
        excludes = [] if vectors else ["vec"]
        with translated(self._server):
            found = await self._client.mget(index=self._alias(store), ids=list(ids), source_excludes=excludes or None)
        return {doc["_id"]: queries.chunk_of(doc["_source"]) for doc in found["docs"] if doc.get("found")}

    async def listing(
        self, store: str, *, filter: Filter | None, sort: Sequence[Sort], limit: int, offset: int = 0
    ) -> list[Chunk]:
        query = queries.where(filter) if filter is not None else {"match_all": {}}
        return await self._sources(store, query, queries.order(sort), limit, offset)

    async def page(self, store: str, *, after: str, limit: int, vectors: bool) -> list[Chunk]:
        query: Json = {"range": {"chunk_id": {"gt": after}}} if after else {"match_all": {}}
        return await self._sources(store, query, queries.order([]), limit, 0, vectors=vectors)

    async def _sources(
        self, store: str, query: Json, sort: list[Json], limit: int, offset: int, *, vectors: bool = False
    ) -> list[Chunk]:
        await self.record(store)
        with translated(self._server):
            found = await self._client.search(
                index=self._alias(store), query=query, sort=sort, size=limit, from_=offset, track_total_hits=False,
                source_excludes=None if vectors else ["vec"],
            )  # fmt: skip
        return [queries.chunk_of(hit["_source"]) for hit in found["hits"]["hits"]]

    # Generations

    async def _rebuilt(self, store: str) -> StoreRecord:
        """Its terms are of another tokenizer: a new generation is filled, then the alias moves to it, at once."""
        async with self._rebuilding.setdefault(store, asyncio.Lock()):
            index, record = await self._read(store)
            if record.tokenizer == TOKENIZER_VERSION:
                return record
            alias = self._alias(store)
            generation = int(index.rpartition("-")[2]) + 1
            new, renewed = f"{alias}-{generation}", msgspec.structs.replace(record, tokenizer=TOKENIZER_VERSION)
            log.warning("store %s is indexed anew for tokenizer %d", store, TOKENIZER_VERSION)
            with translated(self._server):
                try:
                    await self._make_index(new, renewed)
                except BadRequestError as error:
                    if "resource_already_exists" not in reason(error):
                        raise
                    return await self._rebuilt_elsewhere(store, new)
                # Writes wait outside: they would go to the old generation and be lost with it.
                await self._client.indices.put_settings(index=index, settings={"index.blocks.write": True})
                try:
                    await self._client.indices.refresh(index=index)
                    await self._copy(index, new)
                    await self._client.indices.update_aliases(
                        actions=[
                            {"remove": {"index": index, "alias": alias}},
                            {"add": {"index": new, "alias": alias}},
                        ]
                    )
                except BaseException:
                    await asyncio.shield(self._undo(index, new))
                    raise
                await self._client.indices.delete(index=index)
            return renewed

    async def _copy(self, old: str, new: str) -> None:
        await self._client.indices.put_settings(index=new, settings={"index.refresh_interval": "-1"})
        batch: list[Json] = []
        async for hit in async_scan(self._client, index=old, query={"query": {"match_all": {}}}, size=_BULK_CHUNKS):
            document = queries.source(queries.chunk_of(hit["_source"]))
            batch.append({"_op_type": "index", "_id": hit["_id"], "_source": document})
            if len(batch) == _BULK_CHUNKS:
                await self._bulk(new, batch, refresh="false")
                batch = []
        await self._bulk(new, batch, refresh="false")
        await self._client.indices.put_settings(index=new, settings={"index.refresh_interval": self._settings.refresh})
        await self._client.indices.refresh(index=new)

    async def _undo(self, old: str, new: str) -> None:
        await self._client.options(ignore_status=404).indices.delete(index=new)
        await self._client.options(ignore_status=404).indices.put_settings(
            index=old, settings={"index.blocks.write": None}
        )

    async def _rebuilt_elsewhere(self, store: str, new: str) -> StoreRecord:
        """Another worker fills the new generation. If it stands still that worker is gone, and this one begins again."""
        count, since = -1, time.monotonic()
        while True:
            record = (await self._read(store))[1]
            if record.tokenizer == TOKENIZER_VERSION:
                return record
            await self._client.options(ignore_status=404).indices.refresh(index=new)
            now = (await self._client.options(ignore_status=404).count(index=new)).body.get("count", -1)
            if now != count:
                count, since = now, time.monotonic()
            if time.monotonic() - since > _ABANDONED_S:
                log.warning("the new generation %s was given up by another worker: it is filled anew", new)
                await self._undo((await self._read(store))[0], new)
                raise ConfigurationError(f"store {store!r} was being indexed anew by a worker that is gone: try again")
            await asyncio.sleep(0.5)

    def _alias(self, store: str) -> str:
        return f"{self._settings.prefix}-{model_token(store)}"


async def _each(actions: Sequence[Json]) -> AsyncIterator[Json]:
    for action in actions:
        yield action


def _scored(hits: Sequence[Json], scale: Any) -> list[Scored]:
    return sorted((Scored(hit["_id"], scale(hit["_score"])) for hit in hits), key=lambda item: (-item.score, item.key))


def _distinct_files() -> Json:
    return {"cardinality": {"field": "file_id", "precision_threshold": 40_000}}
