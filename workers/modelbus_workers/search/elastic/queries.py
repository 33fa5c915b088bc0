"""Index settings, filters, sorts and searches as Elasticsearch's JSON. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec
import numpy as np
from modelbus_broker.messages.search import Chunk, Filter, Sort, StoreRecord, Value, ValueKind

from ..base import Ranking
from ..checks import BUILT_IN, kind_of
from ..terms import terms

Json = dict[str, Any]

#: Attributes lie apart by kind, so that a key that is a text here and a number there breaks no mapping.
_KINDS: dict[ValueKind, str] = {"number": "n", "string": "s", "boolean": "b"}
_FIELD_TYPES: dict[str, Json] = {"s": {"type": "keyword"}, "n": {"type": "double"}, "b": {"type": "boolean"}}
_COLUMNS = {"$id": "chunk_id", "$file_id": "file_id", "$ordinal": "ordinal"}
#: The newest version in which raw vectors are kept out of ``_source`` unless that is turned off, and the first one that
#: scores candidates of a quantised index again by their whole vectors.
VECTORS_LEAVE_SOURCE, RESCORES = (9, 2), (8, 18)


def settings(version: tuple[int, int], *, replicas: int, refresh: str) -> Json:
    """Of a new index: one shard, so that its BM25 counts over all of the store."""
    index: Json = {"number_of_shards": 1, "number_of_replicas": replicas, "refresh_interval": refresh}
    if version >= VECTORS_LEAVE_SOURCE:
        index["mapping.exclude_source_vectors"] = False
    return {"index": index}


def mappings(record: StoreRecord) -> Json:
    """Of a new index. The store's record stands in ``_meta``."""
    plain = {"type": "text", "index": False}
    properties: Json = {
        "chunk_id": {"type": "keyword"},
        "file_id": {"type": "keyword"},
        "ordinal": {"type": "integer"},
        "start": {"type": "long", "index": False},
        "end": {"type": "long", "index": False},
        "title": plain,
        "text": plain,
        # Our own terms, ready-made: the whitespace analyzer is in every server.
        "terms": {"type": "text", "analyzer": "whitespace", "index_options": "freqs"},
        "attrs": {"type": "object", "dynamic": True},
    }
    if record.dimensions:
        properties["vec"] = vector_field(record.dimensions)
    templates = [
        {f"attributes_{kind}": {"path_match": f"attrs.{kind}.*", "mapping": mapping}}
        for kind, mapping in _FIELD_TYPES.items()
    ]
    return {
        "dynamic": False,
        "_source": {"excludes": ["terms"]},  # made again from the text
        "dynamic_templates": templates,
        "properties": properties,
        **meta(record),
    }


def vector_field(dimensions: int) -> Json:
    """The index type is named: what servers take by default has changed three times since 8.13."""
    return {
        "type": "dense_vector", "dims": dimensions, "index": True, "similarity": "cosine",
        "index_options": {"type": "int8_hnsw", "m": 16, "ef_construction": 100},
    }  # fmt: skip


def meta(record: StoreRecord) -> Json:
    return {"_meta": {"modelbus": msgspec.to_builtins(record)}}


def record_of(mapping: Json) -> StoreRecord | None:
    """What ``meta`` put into an index's mapping; None: it is none of ours."""
    found = mapping.get("_meta", {}).get("modelbus")
    return None if found is None else msgspec.convert(found, StoreRecord)


# Chunks


def source(chunk: Chunk) -> Json:
    """A chunk as a document."""
    attrs: dict[str, dict[str, Value]] = {}
    for key, value in chunk.attributes.items():
        attrs.setdefault(_KINDS[kind_of(value)], {})[key] = value
    document: Json = {
        "chunk_id": chunk.id, "file_id": chunk.file_id, "ordinal": chunk.ordinal, "start": chunk.start,
        "end": chunk.end, "title": chunk.title, "text": chunk.text, "attrs": attrs,
        "terms": " ".join(terms(f"{chunk.title}\n{chunk.text}" if chunk.title else chunk.text)),
    }  # fmt: skip
    if chunk.vector:
        document["vec"] = np.frombuffer(chunk.vector, dtype="<f4").tolist()
    return document


def chunk_of(document: Json) -> Chunk:
    """A chunk from a document's ``_source``."""
    attributes: dict[str, Value] = {}
    for values in document.get("attrs", {}).values():
        attributes.update(values)
    vector = document.get("vec")
    return Chunk(
        id=document["chunk_id"], text=document["text"], file_id=document["file_id"], ordinal=document["ordinal"],
        title=document["title"], start=document["start"], end=document["end"], attributes=attributes,
        vector=np.asarray(vector, dtype="<f4").tobytes() if vector else b"",
    )  # fmt: skip


# Searches


def text_search(ranking: Ranking) -> Json:
    query: Json = {"match": {"terms": {"query": " ".join(ranking.terms), "operator": "or"}}}
    if ranking.filter is not None:
        query = {"bool": {"must": [query], "filter": [where(ranking.filter)]}}
    return {"query": query, "size": ranking.window, "_source": False, "track_total_hits": False}


def vector_search(ranking: Ranking, *, rescore: bool) -> Json:
    """The filter is inside ``knn``: beside it, it would run after the nearest are chosen, and could leave none."""
    knn: Json = {
        "field": "vec",
        "query_vector": np.frombuffer(ranking.vector, dtype="<f4").tolist(),
        "k": ranking.window,
        "num_candidates": min(10_000, max(100, 4 * ranking.window)),
    }
    if ranking.filter is not None:
        knn["filter"] = where(ranking.filter)
    if rescore:
        knn["rescore_vector"] = {"oversample": 2.0}
    return {"knn": knn, "size": ranking.window, "_source": False, "track_total_hits": False}


def where(condition: Filter) -> Json:
    """See ``Filter`` for what it means."""
    match condition.type:
        case "and":
            return {"bool": {"filter": [where(item) for item in condition.filters]}}
        case "or":
            return _any([where(item) for item in condition.filters])
        case "not":
            return {"bool": {"must_not": [where(condition.filters[0])]}}
        case "eq" | "in":
            return _one_of(condition.key, _values(condition))
        case "ne" | "nin":
            return {"bool": {"must_not": [_one_of(condition.key, _values(condition))]}}
        case _:
            (value,) = _values(condition)
            return {"range": {_field(condition.key, kind_of(value)): {condition.type: value}}}


def order(sort: Sequence[Sort]) -> list[Json]:
    """Numbers, then texts, then truth values, then documents without the attribute; what is equal by id."""
    keys: list[Json] = []
    for item in sort:
        direction = "desc" if item.descending else "asc"
        if item.key in _COLUMNS:
            keys.append({_COLUMNS[item.key]: {"order": direction}})
            continue
        for kind in _KINDS:
            unmapped = _FIELD_TYPES[_KINDS[kind]]["type"]
            keys.append({_field(item.key, kind): {"order": direction, "missing": "_last", "unmapped_type": unmapped}})
    return [*keys, {"chunk_id": {"order": "asc"}}]


def _values(condition: Filter) -> list[Value]:
    value = condition.value
    assert value is not None
    return value if isinstance(value, list) else [value]


def _one_of(key: str, values: list[Value]) -> Json:
    parts: list[Json] = []
    for kind in dict.fromkeys(map(kind_of, values)):
        wanted = [value for value in values if kind_of(value) == kind]
        parts.append({"terms": {_field(key, kind): wanted}})
    return _any(parts)


def _any(parts: list[Json]) -> Json:
    if len(parts) == 1:
        return parts[0]
    return {"bool": {"should": parts, "minimum_should_match": 1}} if parts else {"match_none": {}}


def _field(key: str, kind: ValueKind) -> str:
    return _COLUMNS[key] if key in BUILT_IN else f"attrs.{_KINDS[kind]}.{key}"
