"""What users give and get: chunks and filters in plain Python, vectors as numbers. Pure."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from sys import byteorder
from typing import Any

import msgspec
from modelbus_broker.errors import InvalidRequest
from modelbus_broker.messages.search import Chunk, Filter, Sort

#: A vector: numbers, or their float32 as little-endian bytes.
Vector = Sequence[float] | bytes
#: A chunk, or a mapping with its fields. Only ``text`` or ``vector`` is needed.
Item = Chunk | Mapping[str, Any]
#: A filter in the form of OpenAI's vector stores.
Where = Filter | Mapping[str, Any]
#: ``"year"``, ``"-year"`` for the largest first, or several of them.
Order = str | Sequence[str | Sort]

#: Of one upsert: a request larger than this would be split all the same.
BATCH_CHUNKS, BATCH_BYTES = 200, 4 << 20


def packed(vector: Vector) -> bytes:
    """As float32, little endian.

    Raises:
        InvalidRequest: it is no list of numbers.
    """
    if isinstance(vector, bytes | bytearray | memoryview):
        return bytes(vector)
    try:
        numbers = array("f", vector)
    except (TypeError, OverflowError) as error:
        raise InvalidRequest(f"a vector is a list of numbers: {error}", param="vector") from error
    if byteorder == "big":
        numbers.byteswap()
    return numbers.tobytes()


def chunk_of(item: Item) -> Chunk:
    """A chunk, with an id made of its file, its place there and its text where it has none.

    Raises:
        InvalidRequest: a field is not known or has the wrong type; ``param`` names it.
    """
    if isinstance(item, Chunk):
        chunk = item
    else:
        if not isinstance(item, Mapping):
            raise InvalidRequest(
                f"a chunk is a Chunk or a mapping like {{'id': 'a', 'text': '...'}}, not {str(item)[:60]!r}",
                param="items",
            )
        unknown = sorted(item.keys() - set(Chunk.__struct_fields__))
        if unknown:
            raise InvalidRequest(
                f"a chunk has no field {', '.join(map(str, unknown))}: it has {', '.join(Chunk.__struct_fields__)}; "
                "what is yours belongs into attributes",
                param=str(unknown[0]),
            )
        given = {**item, "vector": packed(item.get("vector") or b"")}
        given.setdefault("id", "")
        try:
            chunk = msgspec.convert(given, Chunk)
        except msgspec.ValidationError as error:
            raise InvalidRequest(f"chunk {given['id']!r}: {error}", param=_path(error)) from error
    for name in ("id", "text", "title", "file_id"):
        must_be_unicode(getattr(chunk, name), f"the {name} of chunk {chunk.id!r}", name)
    if not chunk.id:
        named = f"{chunk.file_id}\0{chunk.ordinal}\0{chunk.text}".encode() + chunk.vector
        chunk = msgspec.structs.replace(chunk, id=hashlib.sha256(named).hexdigest()[:32])
    return chunk


def whole_text(chunk: Chunk) -> str:
    """What a model reads of a chunk: title and text."""
    return f"{chunk.title}\n{chunk.text}" if chunk.title else chunk.text


def must_be_unicode(text: str, what: str, param: str) -> None:
    """Raises: InvalidRequest: it is no text, or half a surrogate pair is in it, which no message can carry."""
    if not isinstance(text, str):
        raise InvalidRequest(f"{what} is a text, not {str(text)[:60]!r}", param=param)
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InvalidRequest(f"{what} is no Unicode text: {error}", param=param) from error


def filter_of(where: Where | None) -> Filter | None:
    """Raises: InvalidRequest: it has another form."""
    if where is None or isinstance(where, Filter):
        return where
    try:
        return msgspec.convert(where, Filter)
    except msgspec.ValidationError as error:
        raise InvalidRequest(f"filter: {error}", param=_path(error) or "filter") from error


def sort_of(order: Order) -> list[Sort]:
    keys = [order] if isinstance(order, str) else list(order)
    return [
        key if isinstance(key, Sort) else Sort(key=key.removeprefix("-"), descending=key.startswith("-"))
        for key in keys
        if key
    ]


def batches(chunks: Iterable[Chunk]) -> Iterator[list[Chunk]]:
    """Chunks in parts that fit into a request."""
    batch: list[Chunk] = []
    size = 0
    for chunk in chunks:
        more = len(chunk.text) * 3 + len(chunk.vector)
        if batch and (len(batch) == BATCH_CHUNKS or size + more > BATCH_BYTES):
            yield batch
            batch, size = [], 0
        batch.append(chunk)
        size += more
    if batch:
        yield batch


def _path(error: msgspec.ValidationError) -> str:
    return str(error).partition(" - at `$.")[2].rstrip("`")
