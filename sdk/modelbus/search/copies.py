"""A store as a file: JSON lines, the store's record first, then its chunks with their vectors. Any engine reads it back."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal

import msgspec
from modelbus_broker.errors import Conflict, InvalidRequest, NotFound
from modelbus_broker.messages.search import Chunk, StoreRecord

from ..model_client import ModelClient
from .asking import DEFAULT_SERVICE
from .store import PAGE, AsyncStore

#: Told after each page how many chunks are done.
Counted = Callable[[int], None]


class Head(msgspec.Struct, frozen=True, kw_only=True, tag="modelbus-store", tag_field="format"):
    """The first line."""

    version: Literal[1] = 1
    record: StoreRecord
    chunks: int  #: that follow


async def export_store(
    client: ModelClient, name: str, path: Path, *, service: str = DEFAULT_SERVICE, counted: Counted = lambda count: None
) -> int:
    """Writes a store to a file, which appears when it is complete. Returns how many chunks it holds.

    What is written to the store meanwhile may be in it or not.

    Raises:
        NotFound: there is no such store.
        OSError: the file cannot be written.
    """
    store = AsyncStore(name, client=client, service=service)
    status = await store.status()
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    count = 0
    try:
        with draft.open("wb") as file:
            file.write(msgspec.json.encode(Head(record=status.record, chunks=status.chunks)) + b"\n")
            async for chunk in store.chunks(vectors=True):
                file.write(msgspec.json.encode(chunk) + b"\n")
                count += 1
                if count % PAGE == 0:
                    counted(count)
            file.flush()
            os.fsync(file.fileno())
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)
    return count


async def restore_store(
    client: ModelClient,
    path: Path,
    name: str = "",
    *,
    service: str = DEFAULT_SERVICE,
    replace: bool = False,
    counted: Counted = lambda count: None,
) -> AsyncStore:
    """Makes a store of an exported file, with the vectors as they are: nothing is embedded.

    A restore that was interrupted goes on where it is started again with ``replace``.

    Args:
        name: of the store; "" is the one in the file.
        replace: writes over the chunks of a store that is there.

    Raises:
        Conflict: there is a store of that name, and ``replace`` does not say what to do.
        InvalidRequest: the file is no export, or is cut off.
        OSError: it cannot be read.
    """
    with path.open("rb") as file:
        lines = iter(file)
        head = _head(next(lines, b""), path)
        record = head.record
        store = AsyncStore(
            name or record.name, client=client, service=service, embedding_model=record.embedding_model,
            query_prefix=record.query_prefix, passage_prefix=record.passage_prefix, dimensions=record.dimensions,
            schema=record.schema, metadata=record.metadata, fusion=record.fusion,
        )  # fmt: skip
        if not replace and await _exists(store):
            raise Conflict(f"there is a store {store.name!r} already: --replace writes over its chunks")
        await store.create()
        count = 0
        for page in _pages(lines, path):
            # A chunk that had no vector, such as one with a title only, has none again.
            await store.write_as_it_is(page)
            count += len(page)
            counted(count)
    if count < head.chunks:
        raise InvalidRequest(f"{path} is cut off: {count} of its {head.chunks} chunks were there, and are restored")
    return store


async def _exists(store: AsyncStore) -> bool:
    try:
        await store.status()
    except NotFound:
        return False
    return True


def _head(line: bytes, path: Path) -> Head:
    try:
        return msgspec.json.decode(line, type=Head)
    except msgspec.MsgspecError as error:
        raise InvalidRequest(f"{path} is no export of a store: {error}") from error


def _pages(lines: Iterator[bytes], path: Path) -> Iterator[list[Chunk]]:
    page: list[Chunk] = []
    decoder = msgspec.json.Decoder(Chunk)
    for number, line in enumerate(lines, 2):
        try:
            page.append(decoder.decode(line))
        except msgspec.MsgspecError as error:
            raise InvalidRequest(f"{path}, line {number}: {error}; what came before it is restored") from error
        if len(page) == PAGE:
            yield page
            page = []
    if page:
        yield page
