"""What may be stored and asked: each check raises ``InvalidRequest`` that says what is wrong and what to do. Pure."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

import msgspec
from modelbus_broker.attributes import name_problem, value_problem
from modelbus_broker.errors import InvalidRequest
from modelbus_broker.messages.search import Chunk, Filter, Fusion, Search, Sort, StoreRecord, Value, ValueKind

#: Bytes of a chunk's text in UTF-8. A search finds chunks: one this long says where nothing is.
MAX_TEXT_BYTES = 1 << 20
MAX_CHUNKS = 10_000  #: of one upsert
MAX_ATTRIBUTES = 64
MAX_ID_BYTES = 500  #: Elasticsearch takes 512
MAX_LIMIT = 1000
MAX_DIMENSIONS = 4096
_MAX_DEPTH, _MAX_CONDITIONS, _MAX_VALUES = 16, 256, 10_000

#: Keys of filters and sorts that are no attributes, and the kind of their values.
BUILT_IN: dict[str, ValueKind] = {"$id": "string", "$file_id": "string", "$ordinal": "number"}

_STORE_NAME = re.compile(r"[^\s/\\\x00-\x1f\x7f](?:[^/\\\x00-\x1f\x7f]{0,118}[^\s/\\\x00-\x1f\x7f])?")


def kind_of(value: Value) -> ValueKind:
    """What an attribute is."""
    if isinstance(value, bool):
        return "boolean"
    return "string" if isinstance(value, str) else "number"


def check_record(record: StoreRecord) -> None:
    """A store that is to be made."""
    if not _STORE_NAME.fullmatch(record.name):
        raise InvalidRequest(
            f"{record.name!r} is no name for a store: up to 120 characters without slashes and control characters",
            param="store",
        )
    if not 0 <= record.dimensions <= MAX_DIMENSIONS:
        raise InvalidRequest(
            f"vectors have 1 to {MAX_DIMENSIONS} dimensions, not {record.dimensions}", param="dimensions"
        )
    for key in record.schema:
        _check_key(key, "schema")
    check_fusion(record.fusion)


def check_fusion(fusion: Fusion) -> None:
    for name in ("text_weight", "vector_weight", "constant"):
        number = getattr(fusion, name)
        if not (math.isfinite(number) and number >= 0):
            raise InvalidRequest(f"{name} is a number from 0, not {number}", param=name)
    if fusion.text_weight == fusion.vector_weight == 0:
        raise InvalidRequest("text_weight and vector_weight are both 0: nothing would be found", param="text_weight")
    if not 1 <= fusion.window <= MAX_LIMIT:
        raise InvalidRequest(f"window is 1 to {MAX_LIMIT}, not {fusion.window}", param="window")


def clean_chunks(record: StoreRecord, chunks: Sequence[Chunk]) -> list[Chunk]:
    """The chunks as they are stored: without NUL bytes, of an id that comes twice only the last.

    Raises:
        InvalidRequest: one of them cannot be stored; its id and what to do are named. None is stored then.
    """
    if len(chunks) > MAX_CHUNKS:
        raise InvalidRequest(f"{len(chunks)} chunks at once, at most {MAX_CHUNKS}: send them in parts", param="chunks")
    dimensions = record.dimensions
    kept: dict[str, Chunk] = {}
    for chunk in chunks:
        dimensions = _check_vector(chunk, dimensions, record)
        _check_chunk(chunk, record)
        if "\0" in chunk.text or "\0" in chunk.title:
            # SQLite, and tools that read C strings, would end the text there.
            chunk = msgspec.structs.replace(
                chunk, text=chunk.text.replace("\0", ""), title=chunk.title.replace("\0", "")
            )
        if not (chunk.text or chunk.title or chunk.vector):
            raise InvalidRequest(
                f"chunk {chunk.id!r} is empty: without a text, a title or a vector nothing could find it", param="text"
            )
        kept.pop(chunk.id, None)
        kept[chunk.id] = chunk
    return list(kept.values())


def _check_chunk(chunk: Chunk, record: StoreRecord) -> None:
    for name, text in (("id", chunk.id), ("file_id", chunk.file_id)):
        if "\0" in text or len(text.encode()) > MAX_ID_BYTES:
            raise InvalidRequest(f"{name} {text[:40]!r} has a NUL byte or more than {MAX_ID_BYTES} bytes", param=name)
    if not chunk.id:
        raise InvalidRequest("a chunk has no id: by its id it is replaced and deleted", param="id")
    for name, text in (("text", chunk.text), ("title", chunk.title)):
        if len(text) > MAX_TEXT_BYTES // 4 and len(text.encode()) > MAX_TEXT_BYTES:
            raise InvalidRequest(
                f"the {name} of chunk {chunk.id!r} has more than {MAX_TEXT_BYTES >> 20} MiB: split it, "
                "a chunk of 500 to 2000 characters is found best",
                param=name,
            )
    if len(chunk.attributes) > MAX_ATTRIBUTES:
        raise InvalidRequest(
            f"chunk {chunk.id!r} has {len(chunk.attributes)} attributes, at most {MAX_ATTRIBUTES}", param="attributes"
        )
    for key, value in chunk.attributes.items():
        _check_key(key, "attributes")
        _check_value(key, value)
        wanted = record.schema.get(key, "" if record.schema else kind_of(value))
        if wanted != kind_of(value):
            raise InvalidRequest(
                f"attribute {key!r} of chunk {chunk.id!r} is a {kind_of(value)}; the schema of store {record.name!r} "
                + (f"says {wanted}" if wanted else f"has only {', '.join(sorted(record.schema))}"),
                param="attributes",
            )


def _check_vector(chunk: Chunk, dimensions: int, record: StoreRecord) -> int:
    """Returns the store's dimensions, which the first vector sets."""
    if not chunk.vector:
        return dimensions
    given = check_vector(chunk.vector, f"the vector of chunk {chunk.id!r}")
    if dimensions and given != dimensions:
        raise InvalidRequest(
            wrong_dimensions(record, f"the vector of chunk {chunk.id!r}", given, dimensions), param="vector"
        )
    return given


def check_vector(vector: bytes, what: str) -> int:
    """Returns its dimensions."""
    import numpy as np

    count, rest = divmod(len(vector), 4)
    if rest or not 1 <= count <= MAX_DIMENSIONS:
        raise InvalidRequest(
            f"{what} is no list of 1 to {MAX_DIMENSIONS} float32 (it has {len(vector)} bytes)", param="vector"
        )
    norm = float(np.linalg.norm(np.frombuffer(vector, dtype="<f4").astype(np.float64)))
    if not math.isfinite(norm) or norm == 0.0:
        raise InvalidRequest(
            f"{what} is all zeros, or has a number that is not finite: it points nowhere", param="vector"
        )
    return count


def wrong_dimensions(record: StoreRecord, what: str, given: int, dimensions: int) -> str:
    """Words for a vector of another model than the store's."""
    model = f", made by the model {record.embedding_model!r}" if record.embedding_model else ""
    return (
        f"{what} has {given} dimensions, those of store {record.name!r} have {dimensions}{model}: use that model, "
        f"or build the store anew for the other one (drop it, or use another name)"
    )


def check_model(record: StoreRecord, embedding_model: str) -> None:
    """Vectors of two models do not compare, even where their dimensions agree."""
    if embedding_model and record.embedding_model and embedding_model != record.embedding_model:
        raise InvalidRequest(
            f"store {record.name!r} was built with the embedding model {record.embedding_model!r}, not with "
            f"{embedding_model!r}: their vectors do not compare. Use {record.embedding_model!r}, or build the store anew "
            "for the other one (drop it, or use another name)",
            param="embedding_model",
        )


def check_search(search: Search) -> None:
    """A search, but for its vector's dimensions, which its stores know."""
    if not search.stores:
        raise InvalidRequest("no store is named", param="stores")
    if not 1 <= search.limit <= MAX_LIMIT:
        raise InvalidRequest(f"limit is 1 to {MAX_LIMIT}, not {search.limit}", param="limit")
    if search.offset < 0:
        raise InvalidRequest(f"offset must not be negative: {search.offset}", param="offset")
    if search.offset > 10_000 - search.limit:
        raise InvalidRequest(
            f"offset and limit together are at most 10000, not {search.offset + search.limit}", param="offset"
        )
    if search.offset and (search.text or search.vector):
        raise InvalidRequest("offset is for listings; of a search take a larger limit", param="offset")
    if len(search.text) > 100_000:
        raise InvalidRequest("the query has more than 100000 characters: shorten it", param="text")
    if search.vector:
        check_vector(search.vector, "the query's vector")
    if search.fusion is not None:
        check_fusion(search.fusion)
    if search.filter is not None:
        check_filter(search.filter)
    check_sort(search.sort)


def check_sort(sort: Sequence[Sort]) -> None:
    if len(sort) > 8:
        raise InvalidRequest("a sort has at most 8 keys", param="sort")
    for item in sort:
        _check_filter_key(item.key, "sort")


def check_filter(condition: Filter) -> None:
    """A filter of any depth; see ``Filter`` for what it means."""
    _check_conditions([condition], _MAX_DEPTH, 0)


def _check_conditions(conditions: Sequence[Filter], depth: int, seen: int) -> int:
    if depth < 0:
        raise InvalidRequest(f"the filter is more than {_MAX_DEPTH} deep", param="filter")
    for condition in conditions:
        seen += 1
        if seen > _MAX_CONDITIONS:
            raise InvalidRequest(f"the filter has more than {_MAX_CONDITIONS} conditions: use `in`", param="filter")
        if condition.type in ("and", "or", "not"):
            _check_combination(condition)
            seen = _check_conditions(condition.filters, depth - 1, seen)
        else:
            _check_comparison(condition)
    return seen


def _check_combination(condition: Filter) -> None:
    if condition.key or condition.value is not None:
        raise InvalidRequest(f"{condition.type!r} takes filters, not a key or a value", param="filter")
    if not condition.filters:
        raise InvalidRequest(f"{condition.type!r} has no filters", param="filter")
    if condition.type == "not" and len(condition.filters) != 1:
        raise InvalidRequest("'not' takes one filter; put several into an 'and' or an 'or'", param="filter")


def _check_comparison(condition: Filter) -> None:
    _check_filter_key(condition.key, "filter")
    if condition.filters:
        raise InvalidRequest(f"{condition.type!r} takes a key and a value, not filters", param="filter")
    many = condition.type in ("in", "nin")
    if condition.value is None or many != isinstance(condition.value, list):
        raise InvalidRequest(
            f"{condition.type!r} on {condition.key!r} takes {'a list of values' if many else 'one value'}",
            param="filter",
        )
    values = condition.value if isinstance(condition.value, list) else [condition.value]
    if len(values) > _MAX_VALUES:
        raise InvalidRequest(f"'in' has more than {_MAX_VALUES} values", param="filter")
    for value in values:
        _check_value(condition.key, value)
        if condition.key in BUILT_IN and kind_of(value) != BUILT_IN[condition.key]:
            raise InvalidRequest(
                f"{condition.key} is a {BUILT_IN[condition.key]}, not a {kind_of(value)}", param="filter"
            )
        if condition.type in ("gt", "gte", "lt", "lte") and isinstance(value, bool):
            raise InvalidRequest(
                f"{condition.type!r} on {condition.key!r}: true and false have no order", param="filter"
            )


def _check_filter_key(key: str, param: str) -> None:
    if key.startswith("$"):
        if key not in BUILT_IN:
            raise InvalidRequest(f"there is no {key}: {', '.join(BUILT_IN)}, or the name of an attribute", param=param)
    else:
        _check_key(key, param)


def _check_key(key: str, param: str) -> None:
    if problem := name_problem(key):
        raise InvalidRequest(problem, param=param)


def _check_value(key: str, value: Value) -> None:
    if problem := value_problem(key, value):
        raise InvalidRequest(problem, param=key)
