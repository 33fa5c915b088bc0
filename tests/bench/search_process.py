"""Many chunks in one store engine: how fast they are written, found and opened again, in a process of its own.

    python -m tests.bench.search_process FOLDER CHUNKS [URL]

measures the embedded engine in the folder, or Elasticsearch at the address. The floor of a vector search is one product of the
bare matrix with the query and the choice of the best, in NumPy, by turns with the searches: what slows the machine slows both.
"""

from __future__ import annotations

import asyncio
import itertools
import random
import statistics
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import msgspec
import numpy as np
import psutil
from modelbus_broker.messages.search import (
    Chunk,
    CreateStore,
    DropStore,
    Filter,
    Found,
    GetStore,
    Search,
    StoreRecord,
    StoreStatus,
    Upsert,
)
from modelbus_workers.search.base import StoreEngine
from modelbus_workers.search.embedded.engine import EmbeddedEngine
from modelbus_workers.search.service import SearchService

CHUNKS, DIMENSIONS, QUERIES, BATCH = 100_000, 384, 200, 200
TENTH = 3  #: a tenth of the chunks has it


class Measured(msgspec.Struct, frozen=True, kw_only=True):
    """Times are ms of one operation, unless they say otherwise; lists are (p50, p95)."""

    load_s: float
    ready_s: float  #: until the first search by text after the load has been answered
    reopen_s: float  #: from a closed folder to the first answer
    hybrid: tuple[float, float]
    text: tuple[float, float]
    vector: tuple[float, float]
    filtered: tuple[float, float]  #: hybrid, a tenth of the chunks let through
    floor: tuple[float, float] = (0.0, 0.0)  #: only of the embedded engine
    rss_mib: float  #: of the process that holds the index; 0 where it cannot be looked at
    disk_mib: float


class Words:
    """Texts of about 250 terms, half of them Chinese, words as often as words are (Zipf)."""

    def __init__(self, seed: int) -> None:
        self._chance = random.Random(seed)
        letters, alphabet = "abcdefghijklmnopqrstuvwxyz", random.Random(0)
        self._latin = ["".join(alphabet.choices(letters, k=alphabet.randint(3, 10))) for _ in range(30_000)]
        self._han = [chr(0x4E00 + n) for n in range(3_000)]
        self._latin_weights = list(itertools.accumulate(1 / (n + 10) for n in range(len(self._latin))))
        self._han_weights = list(itertools.accumulate(1 / (n + 10) for n in range(len(self._han))))

    def text(self, number: int, length: int = 0) -> str:
        if number % 2:
            return "".join(self._chance.choices(self._han, cum_weights=self._han_weights, k=length or 125))
        return " ".join(self._chance.choices(self._latin, cum_weights=self._latin_weights, k=length or 200))


def corpus(count: int) -> Iterator[list[Chunk]]:
    """In parts, as they would come over the bus."""
    words, numbers = Words(1), np.random.default_rng(1)
    for start in range(0, count, BATCH):
        vectors = numbers.standard_normal((BATCH, DIMENSIONS), dtype=np.float32)
        yield [
            Chunk(
                id=f"{n:08}", text=words.text(n), vector=vectors[n - start].tobytes(), file_id=f"file{n // 20}",
                attributes={"tenth": n % 10, "lang": "zh" if n % 2 else "en"},
            )
            for n in range(start, min(start + BATCH, count))
        ]  # fmt: skip


async def measured(folder: Path, count: int, url: str = "") -> Measured:
    words, numbers = Words(2), np.random.default_rng(2)
    texts = [words.text(n, 8) for n in range(QUERIES)]
    vectors = [numbers.standard_normal(DIMENSIONS, dtype=np.float32).tobytes() for _ in range(QUERIES)]
    parts = list(corpus(count))

    engine, service = await opened(folder, url)
    await service.answer(CreateStore(record=StoreRecord(name="s")))
    began = time.perf_counter()
    for part in parts:
        await service.answer(Upsert(store="s", chunks=part, searchable=part is parts[-1]))
    load_s = time.perf_counter() - began
    await service.answer(Search(stores=["s"], text=texts[0]))
    ready_s = time.perf_counter() - began
    del parts
    await engine.close()

    began = time.perf_counter()
    engine, service = await opened(folder, url)
    await service.answer(Search(stores=["s"], text=texts[0], vector=vectors[0]))
    reopen_s = time.perf_counter() - began

    def searching(**fields: object) -> Callable[[int], Awaitable[None]]:
        async def one(n: int) -> None:
            given = {"text": texts[n], "vector": vectors[n]} | fields
            found = await service.answer(Search(stores=["s"], **given))  # type: ignore[arg-type]
            assert isinstance(found, Found) and found.hits

        return one

    ways = {
        "hybrid": searching(), "text": searching(vector=b""), "vector": searching(text=""),
        "filtered": searching(filter=Filter(type="eq", key="tenth", value=TENTH)),
    }  # fmt: skip
    if isinstance(engine, EmbeddedEngine):
        ways["floor"] = _floor(engine, vectors)
    taken = await _alternating(ways)
    process = psutil.Process() if not url else listening(int(url.rsplit(":", 1)[1].strip("/")))
    status = await service.answer(GetStore(store="s"))
    assert isinstance(status, StoreStatus) and status.chunks == count
    found = Measured(
        load_s=load_s, ready_s=ready_s, reopen_s=reopen_s, **taken,
        rss_mib=process.memory_info().rss / 2**20 if process is not None else 0.0, disk_mib=status.bytes / 2**20,
    )  # fmt: skip
    if url:
        await service.answer(DropStore(store="s"))
    await engine.close()
    return found


def _floor(engine: EmbeddedEngine, vectors: list[bytes]) -> Callable[[int], Awaitable[None]]:
    """One product and the best 50 of it, on the very matrix that the engine searches."""
    rows = engine._open["s"]._vectors._rows  # type: ignore[union-attr]
    matrix = rows.matrix[: rows.count]

    async def one(n: int) -> None:
        scores = matrix @ np.frombuffer(vectors[n], dtype="<f4")
        best = np.argpartition(-scores, 49)[:50]
        best[np.argsort(-scores[best])]

    return one


async def opened(folder: Path, url: str = "") -> tuple[StoreEngine, SearchService]:
    engine: StoreEngine = EmbeddedEngine(folder)
    if url:
        from modelbus_workers.search.elastic.engine import ElasticEngine, ElasticSettings

        engine = ElasticEngine(ElasticSettings(url=url, prefix=f"bench-{folder.name}", timeout_s=300))
    await engine.start()
    return engine, SearchService(engine)


def listening(port: int) -> psutil.Process | None:
    """The process of this machine that listens there, if there is one that may be looked at."""
    for process in psutil.process_iter():
        try:
            if any(
                known.status == psutil.CONN_LISTEN and known.laddr.port == port for known in process.net_connections()
            ):
                return process
        except psutil.Error:
            continue
    return None


async def _alternating(ways: dict[str, Callable[[int], Awaitable[None]]]) -> dict[str, tuple[float, float]]:
    """p50 and p95 in ms of each, by turns, after some that warm up."""
    for n in range(20):
        for one in ways.values():
            await one(n)
    taken: dict[str, list[float]] = {name: [] for name in ways}
    for n in range(QUERIES):
        for name, one in ways.items():
            began = time.perf_counter()
            await one(n)
            taken[name].append((time.perf_counter() - began) * 1000)
    return {name: (statistics.median(times), statistics.quantiles(times, n=20)[-1]) for name, times in taken.items()}


if __name__ == "__main__":
    given = sys.argv[1:]
    found = asyncio.run(measured(Path(given[0]), int(given[1]), given[2] if len(given) > 2 else ""))
    sys.stdout.buffer.write(msgspec.json.encode(found))
