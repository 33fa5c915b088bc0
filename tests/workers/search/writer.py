"""A process that writes to an embedded store until somebody kills it or the disk is full: ``python -m tests.workers.search.writer``.

It says each batch when it is acknowledged.
"""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

import numpy as np
from modelbus_broker.errors import EngineFailed
from modelbus_broker.messages.search import CreateStore, Found, GetStore, Search, StoreRecord, StoreStatus, Upsert
from modelbus_workers.search.embedded.engine import EmbeddedEngine
from modelbus_workers.search.service import SearchService

from tests.helpers.search import chunk

BATCH = 20


def batch(number: int, words: int = 10) -> Upsert:
    """The chunks of a batch: what it wrote can be told from its number."""
    chunks = [
        chunk(
            f"{number}-{n}", f"batch{number} " + " ".join(f"word{number + w}" for w in range(words)),
            np.random.default_rng(number * BATCH + n).standard_normal(8).tolist(),
        )
        for n in range(BATCH)
    ]  # fmt: skip
    return Upsert(store="s", chunks=chunks)


async def write(folder: Path, first: int) -> None:
    engine = EmbeddedEngine(folder)
    await engine.start()
    service = SearchService(engine)
    await service.answer(CreateStore(record=StoreRecord(name="s")))
    number = first
    while True:
        await service.answer(batch(number))
        print(number, flush=True)  # noqa: T201
        number += 1


async def fill(folder: Path) -> None:
    """Writes until the disk is full, makes room and writes once more. Says the error, the last batch, and what is there."""
    ballast = folder / "ballast"
    ballast.write_bytes(b"\1" * (8 << 20))
    engine = EmbeddedEngine(folder / "stores")
    await engine.start()
    service = SearchService(engine)
    await service.answer(CreateStore(record=StoreRecord(name="s")))
    number, words = 0, ""
    while not words:
        try:
            await service.answer(batch(number, words=400))
            number += 1
        except EngineFailed as error:
            words = error.message
    print(words, flush=True)  # noqa: T201
    ballast.unlink()
    await service.answer(batch(number))
    status = await service.answer(GetStore(store="s"))
    assert isinstance(status, StoreStatus)
    found = [await service.answer(Search(stores=["s"], text=f"batch{at}", limit=100)) for at in (0, number - 1, number)]
    hits = [len(reply.hits) for reply in found if isinstance(reply, Found)]
    print((number + 1) * BATCH, status.chunks, *hits, flush=True)  # noqa: T201
    await engine.close()


if __name__ == "__main__":
    how, where = sys.argv[1], Path(sys.argv[2])
    asyncio.run(write(where, int(sys.argv[3])) if how == "write" else fill(where))
