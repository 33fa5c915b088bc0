"""What only the embedded engine promises: nothing acknowledged is lost, whatever happens to its process or its files."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from modelbus_broker.errors import ConfigurationError, EngineFailed
from modelbus_broker.messages.search import (
    Chunk,
    Chunks,
    CreateStore,
    DropStore,
    Found,
    GetStore,
    ListStores,
    ReadChunks,
    Search,
    StoreRecord,
    Stores,
    StoreStatus,
    Upsert,
)
from modelbus_workers.search.embedded.engine import EmbeddedEngine
from modelbus_workers.search.embedded.vectors import VectorMatrix
from modelbus_workers.search.service import SearchService
from modelbus_workers.search.terms import TOKENIZER_VERSION

from tests.helpers.search import chunk, embedded_engine, ids, vector
from tests.workers.search.writer import BATCH, batch

ROOT = Path(__file__).resolve().parents[3]
WRITER = [sys.executable, "-m", "tests.workers.search.writer"]


async def filled(engine: EmbeddedEngine, chunks: list[Chunk], store: str = "s") -> SearchService:
    service = SearchService(engine)
    await service.answer(CreateStore(record=StoreRecord(name=store)))
    await service.answer(Upsert(store=store, chunks=chunks))
    return service


async def found(service: SearchService, store: str = "s", **fields: object) -> list[str]:
    reply = await service.answer(Search(stores=[store], **fields))  # type: ignore[arg-type]
    assert isinstance(reply, Found)
    return ids(reply)


async def test_a_writer_that_is_killed_loses_nothing_that_it_acknowledged(tmp_path: Path) -> None:
    acknowledged = -1
    for round_ in range(4):
        with subprocess.Popen(
            [*WRITER, "write", tmp_path, str(acknowledged + 1)], cwd=ROOT, stdout=subprocess.PIPE
        ) as writer:
            assert writer.stdout is not None
            for _ in range(5 + 7 * round_):
                acknowledged = int(writer.stdout.readline())
            writer.send_signal(signal.SIGKILL)
            acknowledged = max([acknowledged, *map(int, writer.stdout.read().split())])
        async with embedded_engine(tmp_path) as engine:
            service = SearchService(engine)
            for number in {0, acknowledged // 2, acknowledged}:
                wanted = [item.id for item in batch(number).chunks]
                assert sorted(await found(service, text=f"batch{number}", limit=100)) == sorted(wanted)
                nearest = await found(service, vector=batch(number).chunks[3].vector, limit=1)
                assert nearest == [wanted[3]]
            status = await service.answer(GetStore(store="s"))
            assert isinstance(status, StoreStatus)
            # Whole batches: one more may have been written and not acknowledged.
            assert status.chunks == status.vectors in [(acknowledged + n) * BATCH for n in (1, 2)]
            pages = await service.answer(ReadChunks(store="s", limit=1000))
            assert isinstance(pages, Chunks) and len(pages.chunks) == min(1000, status.chunks)


async def test_a_folder_has_one_owner(tmp_path: Path) -> None:
    async with embedded_engine(tmp_path):
        with pytest.raises(ConfigurationError, match=rf"belong to another process \(pid {os.getpid()}\).*one owner"):
            await EmbeddedEngine(tmp_path).start()
        ended = subprocess.run([*WRITER, "write", tmp_path, "0"], cwd=ROOT, capture_output=True, text=True)
        assert "an embedded store has one owner" in ended.stderr

    async with embedded_engine(tmp_path):
        pass  # it was let go

    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigurationError, match="cannot be used for stores"):
        await EmbeddedEngine(tmp_path / "file").start()


async def test_a_text_index_that_is_missing_damaged_or_older_is_made_anew(tmp_path: Path) -> None:
    chunks = [chunk(str(n), f"word{n} common", [1, n]) for n in range(50)]
    async with embedded_engine(tmp_path) as engine:
        assert len(await found(await filled(engine, chunks), text="common", limit=100)) == 50
    (folder,) = (tmp_path / "stores").iterdir()

    def text() -> Path:
        (only,) = folder.glob("text-*")
        return only

    def remove() -> None:
        shutil.rmtree(text())

    def damage() -> None:
        for file in text().iterdir():
            file.write_bytes(b"damaged")

    def grow_old() -> None:
        import sqlite3

        old = text().rename(folder / f"text-{TOKENIZER_VERSION - 1}-old")
        with sqlite3.connect(folder / "store.db") as database:
            database.execute("UPDATE meta SET value = ? WHERE key = 'text'", (old.name,))
        database.close()

    for harm in (remove, damage, grow_old):
        harm()
        async with embedded_engine(tmp_path) as engine:
            service = SearchService(engine)
            assert await found(service, text="word7") == ["7"]
            assert len(await found(service, text="common", limit=100)) == 50
        assert text().name.startswith(f"text-{TOKENIZER_VERSION}-")


async def test_a_damaged_store_says_so_and_the_others_are_served(tmp_path: Path) -> None:
    async with embedded_engine(tmp_path) as engine:
        await filled(engine, [chunk("1", "fine")], "s")
        await filled(engine, [chunk("1", "lost")], "broken")
    (broken,) = (tmp_path / "stores").glob("broken-*")
    for file in broken.glob("store.db*"):
        file.write_bytes(b"this is no database at all" * 1000)

    async with embedded_engine(tmp_path) as engine:
        service = SearchService(engine)
        assert await found(service, text="fine") == ["1"]
        with pytest.raises(EngineFailed, match="not a database.*storage drop"):
            await service.answer(GetStore(store="broken"))
        listed = await service.answer(ListStores())
        assert isinstance(listed, Stores) and [item.record.name for item in listed.stores] == ["s", "broken"]
        assert "not a database" in listed.stores[1].record.metadata["error"]
        # What the words say can be done: it is dropped, and made again.
        await service.answer(DropStore(store="broken"))
        await filled(engine, [chunk("1", "new")], "broken")
        assert await found(service, "broken", text="new") == ["1"]
        listed = await service.answer(ListStores())
        assert isinstance(listed, Stores) and all(not item.record.metadata for item in listed.stores)


async def test_a_full_disk_is_said_and_loses_nothing(tmp_path: Path) -> None:
    script = 'mount -t tmpfs -o size=24m tmpfs "$0" && exec "$@"'
    command = ["unshare", "-Urm", "sh", "-c", script, str(tmp_path), *WRITER, "fill", str(tmp_path)]
    ended = await asyncio.to_thread(subprocess.run, command, cwd=ROOT, capture_output=True, text=True, timeout=100)
    if "unshare" in ended.stderr or "mount:" in ended.stderr:
        pytest.skip(f"this machine mounts no small disk: {ended.stderr.strip()}")

    assert ended.returncode == 0, ended.stderr
    words, counts = ended.stdout.splitlines()
    assert "the disk is full: free some space there; nothing of this was stored" in words
    acknowledged, there, *in_batches = map(int, counts.split())
    assert acknowledged == there > 2 * BATCH
    assert in_batches == [BATCH, BATCH, BATCH]


def test_vectors_that_are_gone_are_not_found_and_their_room_is_used_again() -> None:
    matrix = VectorMatrix(2)
    matrix.add([(rid, vector(1, rid)) for rid in range(1, 5001)])
    size = matrix.nbytes

    matrix.remove(range(1, 4001))
    matrix.remove([1, 2, 3, 9999])

    assert len(matrix) == 1000 and matrix.nbytes < size
    assert [rid for rid, _ in matrix.search(vector(1, 0), 2)] == [4001, 4002]
    assert [rid for rid, _ in matrix.search(vector(1, 0), 5, among=[3, 4500, 4400, 9999])] == [4400, 4500]
    matrix.add([(6000, vector(3, 0))])
    ((rid, cosine),) = matrix.search(vector(2, 0), 1)
    assert rid == 6000 and cosine == pytest.approx(1.0)
