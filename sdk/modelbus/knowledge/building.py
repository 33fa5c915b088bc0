"""A folder becomes a store, and stays one: only what has changed is read, cut and embedded again.

A file's first chunk says when the file is complete, with which content and by which recipe. It is written with the others
without saying so, and again after them: whenever a build ends, however it does, the next one knows what is left to do. Chunks
whose text has not changed keep their ids, and with them their vectors.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import time
from collections.abc import Callable, Collection
from pathlib import Path

import msgspec
from modelbus_broker.errors import BusUnavailable, InvalidRequest, ModelBusError, ModelNotFound
from modelbus_broker.messages.search import Chunk, Value

from ..search.store import AsyncStore
from .chunking import CHUNKER, ChunkSettings, chunks_of
from .documents import READERS, check_size, files_of, read

FILES_AT_ONCE = 4
_PAGE = 1000


class BuildReport(msgspec.Struct, kw_only=True):
    """What a build has done."""

    folder: str = ""  #: its full path
    files: int = 0  #: that belong to the folder
    unchanged: int = 0
    written: int = 0
    removed: int = 0
    failed: dict[str, str] = msgspec.field(default_factory=dict)  #: path -> why
    chunks: int = 0  #: of the files that were written
    embedded: int = 0  #: of these; the others had their vector already
    seconds: float = 0.0


class _Known(msgspec.Struct, frozen=True):
    """What the store says of a file."""

    complete: bool
    version: str
    size: int
    changed_ns: str


#: Told after each file: the report so far, and how many files there are.
Progress = Callable[[BuildReport], None]


async def build(
    store: AsyncStore,
    folder: Path,
    *,
    extensions: Collection[str] = (),
    chunking: ChunkSettings | None = None,
    progress: Progress = lambda report: None,
) -> BuildReport:
    """Brings a store up to date with a folder. A file that cannot be read is in the report, and ends nothing.

    Raises:
        InvalidRequest: there is no such folder, or the store was built with another embedding model.
        ModelBusError: the search service or the embedding model cannot be asked. Building again goes on from there.
    """
    folder = await asyncio.to_thread(_folder, folder)
    began = time.monotonic()
    record = (await store.create()).record
    chunking = chunking or ChunkSettings()
    said = (READERS, CHUNKER, chunking.size, chunking.most, chunking.overlap, record.passage_prefix)
    recipe = hashlib.sha256(repr(said).encode()).hexdigest()[:12]
    known = await _known(store, str(folder))
    paths = await asyncio.to_thread(lambda: list(files_of(folder, extensions)))
    report = BuildReport(folder=str(folder), files=len(paths))
    waiting = iter(paths)

    async def work() -> None:
        for path in waiting:  # shared: each takes the next
            try:
                await _file(store, folder, path, recipe, chunking, known.get(str(path)), report)
            except (ModelNotFound, BusUnavailable):
                raise  # every file would fail with it
            except (ModelBusError, OSError) as error:
                report.failed[os.fsencode(path).decode(errors="replace")] = str(error)
            progress(report)

    try:
        async with asyncio.TaskGroup() as group:
            for _ in range(FILES_AT_ONCE):
                group.create_task(work())
    except ExceptionGroup as errors:
        raise errors.exceptions[0] from errors
    there = {str(path) for path in paths}
    for gone in known.keys() - there:
        await store.delete(file_id=gone)
        report.removed += 1
    report.seconds = time.monotonic() - began
    return report


def _folder(folder: Path) -> Path:
    folder = folder.expanduser().resolve()
    if not folder.is_dir():
        raise InvalidRequest(f"there is no folder {folder}", param="source_dir")
    return folder


async def _known(store: AsyncStore, root: str) -> dict[str, _Known]:
    """Path -> what the store has of the files of a folder, by their first chunks."""
    found: dict[str, _Known] = {}
    after = ""
    while True:
        condition = {
            "type": "and",
            "filters": [
                {"type": "eq", "key": "$ordinal", "value": 0},
                {"type": "eq", "key": "root", "value": root},
                {"type": "gt", "key": "$id", "value": after},
            ],
        }
        page = await store.find(filter=condition, sort="$id", limit=_PAGE)
        for chunk in page:
            of = chunk.attributes
            found[chunk.file_id] = _Known(
                bool(of.get("complete")),
                str(of.get("version", "")),
                int(of.get("size", 0)),
                str(of.get("changed_ns", "")),
            )
        if len(page) < _PAGE:
            return found
        after = page[-1].id


async def _file(
    store: AsyncStore, folder: Path, path: Path, recipe: str, chunking: ChunkSettings, known: _Known | None,
    report: BuildReport,
) -> None:  # fmt: skip
    if any("\ud800" <= char <= "\udfff" for char in str(path)):  # bytes of the name that are no text
        raise InvalidRequest("its name is no UTF-8: rename it")
    stat = await asyncio.to_thread(path.stat)
    changed_ns = str(stat.st_mtime_ns)
    done = known if known is not None and known.complete and known.version.endswith(recipe) else None
    if done is not None and (done.size, done.changed_ns) == (stat.st_size, changed_ns):
        report.unchanged += 1
        return
    check_size(stat.st_size)
    data = await asyncio.to_thread(path.read_bytes)
    version = f"{hashlib.sha256(data).hexdigest()[:32]}-{recipe}"
    if done is not None and done.version == version:
        report.unchanged += 1
        return
    file_id = str(path)
    chunks = await asyncio.to_thread(lambda: chunks_of(read(path, data), file_id, chunking))
    mark: dict[str, Value] = {"root": str(folder), "version": version, "complete": False}
    old = {chunk.id: chunk for chunk in await store.get([chunk.id for chunk in chunks], vectors=True)}
    report.embedded += sum(not (chunk.id in old and old[chunk.id].vector) for chunk in chunks)
    chunks = [_with(chunk, mark, old.get(chunk.id)) for chunk in chunks]
    of_file = {"type": "eq", "key": "$file_id", "value": file_id}
    if chunks:
        await store.upsert(chunks, lane="lo")
        left = {"type": "ne", "key": "version", "value": version}
        await store.delete(filter={"type": "and", "filters": [of_file, left]})
        complete: dict[str, Value] = {**mark, "complete": True, "size": stat.st_size, "changed_ns": changed_ns}
        (first,) = await store.get(chunks[0].id, vectors=True)  # its vector was made with the others
        await store.upsert(_with(first, complete, first), lane="lo")
    else:
        await store.delete(filter=of_file)
    report.written += 1
    report.chunks += len(chunks)


def _with(chunk: Chunk, attributes: dict[str, Value], old: Chunk | None) -> Chunk:
    """With these attributes too, and with the vector that it has in the store."""
    vector = old.vector if old is not None and not chunk.vector else chunk.vector
    return msgspec.structs.replace(chunk, attributes={**chunk.attributes, **attributes}, vector=vector)
