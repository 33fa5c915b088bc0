"""A search service with many chunks: the embedded engine, Elasticsearch and LanceDB side by side, and what the bus adds."""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import modelbus
import msgspec
import numpy as np
from modelbus_broker.messages.search import CreateStore, Search, StoreRecord, Upsert
from modelbus_workers.search.service import searched_text
from modelbus_workers.search.terms import query_terms, terms

from .plan import Line, Plan
from .search_process import BATCH, CHUNKS, DIMENSIONS, QUERIES, TENTH, Measured, Words, corpus, opened
from .stand import ROOT, Stand

LANCEDB = ROOT / ".venv-lancedb" / "bin" / "python"
_VECTORS_MIB = CHUNKS * DIMENSIONS * 4 / 2**20


async def search(stand: Stand, plan: Plan) -> list[Line]:
    """100,000 chunks of 384 dimensions, on each engine: load, searches, reopening, memory; then what the bus adds to a search.

    Elasticsearch is measured where MODELBUS_TEST_ES names one, LanceDB where ``make bench-setup`` has made .venv-lancedb.
    """
    folder = Path(tempfile.mkdtemp(prefix="modelbus-bench-"))
    try:
        ours = await _process(sys.executable, "-m", "tests.bench.search_process", str(folder / "alone"), str(CHUNKS))
        shutil.rmtree(folder / "alone")
        others: dict[str, Measured] = {}
        if url := os.environ.get("MODELBUS_TEST_ES"):
            others["Elasticsearch"] = await _process(
                sys.executable, "-m", "tests.bench.search_process", str(folder / "elastic"), str(CHUNKS), url
            )
        if LANCEDB.exists():
            await asyncio.to_thread(_written, folder / "lance")
            others["LanceDB"] = await _process(
                str(LANCEDB), str(ROOT / "tests" / "bench" / "lance_search.py"), str(folder / "lance")
            )
        direct, asked = await _bus(stand, folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return [*_lines(ours, others), _bus_line(direct, asked)]


async def _process(*command: str) -> Measured:
    print(f"  {' '.join(Path(part).name for part in command[:3])}", file=sys.stderr, flush=True)
    process = await asyncio.create_subprocess_exec(*command, cwd=ROOT, stdout=asyncio.subprocess.PIPE)
    out, _ = await process.communicate()
    if process.returncode:
        raise RuntimeError(f"the measuring process ended with {process.returncode}")
    return msgspec.json.decode(out, type=Measured)


def _lines(ours: Measured, others: dict[str, Measured]) -> list[Line]:
    def line(
        what: str, of: Callable[[Measured], float], show: Callable[[Measured], str], *, floor: tuple[str, float] | None = None,
        goal: str = "", most: float | None = None,
    ) -> Line:  # fmt: skip
        beside = [f"{name} {show(found)}" for name, found in others.items() if of(found)]
        ratios = [f"{name} {of(found) / of(ours):.2g} times" for name, found in others.items() if of(found)]
        if floor:
            beside.insert(0, floor[0])
            ratios.insert(0, f"{of(ours) / floor[1]:.2f} of it")
        return Line(
            what=what, modelbus=show(ours), other="; ".join(beside), result="; ".join(ratios), goal=goal,
            met=None if most is None else of(ours) <= most,
        )  # fmt: skip

    def searches(name: str) -> tuple[Callable[[Measured], float], Callable[[Measured], str]]:
        def times(found: Measured) -> tuple[float, float]:
            taken: tuple[float, float] = getattr(found, name)
            return taken

        return lambda found: times(found)[0], lambda found: f"{times(found)[0]:.1f} / {times(found)[1]:.1f} ms"

    product = (f"NumPy product {ours.floor[0]:.1f} / {ours.floor[1]:.1f} ms", ours.floor[0])
    return [
        line(
            f"search, {CHUNKS:,} chunks x {DIMENSIONS}: hybrid p50 / p95", *searches("hybrid"), floor=product,
            goal="10 ms or less", most=10,
        ),
        line("... text", *searches("text")),
        line("... vector", *searches("vector"), floor=product),
        line("... hybrid, filter of a tenth", *searches("filtered")),
        line("... written, every batch of 200 stored", lambda found: found.load_s, lambda found: f"{found.load_s:.0f} s"),
        line(
            "... written and found by text", lambda found: found.ready_s, lambda found: f"{found.ready_s:.0f} s",
            goal="60 s or less", most=60,
        ),
        line(
            "... reopened, to the first answer", lambda found: found.reopen_s, lambda found: f"{found.reopen_s:.2f} s",
            goal="1 s or less", most=1,
        ),
        line(
            "... memory", lambda found: found.rss_mib, lambda found: f"{found.rss_mib:.0f} MiB",
            floor=(f"the vectors {_VECTORS_MIB:.0f} MiB", _VECTORS_MIB),
        ),
        line("... disk", lambda found: found.disk_mib, lambda found: f"{found.disk_mib:.0f} MiB"),
    ]  # fmt: skip


def _written(folder: Path) -> None:
    """The same chunks and queries, for a process that has nothing of ours."""
    folder.mkdir()
    vectors = []
    with (folder / "texts.jsonl").open("w") as file:
        for chunk in itertools.chain.from_iterable(corpus(CHUNKS)):
            found = " ".join(terms(searched_text(chunk)))
            tenth = chunk.attributes["tenth"]
            print(json.dumps({"id": chunk.id, "tenth": tenth, "text": chunk.text, "terms": found}), file=file)
            vectors.append(np.frombuffer(chunk.vector, dtype="<f4"))
    np.save(folder / "vectors.npy", np.stack(vectors))
    words, numbers = Words(2), np.random.default_rng(2)
    asked = [" ".join(query_terms(words.text(n, 8))) for n in range(QUERIES)]
    np.save(folder / "queries.npy", np.stack([numbers.standard_normal(DIMENSIONS, dtype=np.float32) for _ in asked]))
    (folder / "queries.json").write_text(json.dumps({"terms": asked, "tenth": TENTH, "batch": BATCH}))


def _bus_line(direct: float, asked: float) -> Line:
    return Line(
        what="a hybrid search in a small store, over the bus: added p50",
        modelbus=f"{asked:.2f} ms",
        other=f"{direct:.2f} ms (in process)",
        result=f"+{asked - direct:.2f} ms",
        goal="2 ms or less",
        met=asked - direct <= 2,
    )


async def _bus(stand: Stand, folder: Path) -> tuple[float, float]:
    """p50 of the same searches in this process, and over the bus."""
    parts = list(corpus(2_000))
    words, numbers = Words(2), np.random.default_rng(2)
    texts = [words.text(n, 8) for n in range(QUERIES)]
    vectors = [numbers.standard_normal(DIMENSIONS, dtype=np.float32).tobytes() for _ in range(QUERIES)]
    engine, service = await opened(folder / "direct")
    await service.answer(CreateStore(record=StoreRecord(name="s")))
    await stand.search_service("storage", folder / "bus")
    async with modelbus.connect(stand.server.url) as client:
        store = modelbus.AsyncStore("s", client=client)
        for part in parts:
            await service.answer(Upsert(store="s", chunks=part))
            await store.upsert(part)

        async def directly(n: int) -> None:
            await service.answer(Search(stores=["s"], text=texts[n], vector=vectors[n]))

        async def over_the_bus(n: int) -> None:
            await store.search(texts[n], vector=vectors[n])

        direct, asked = await _p50(directly), await _p50(over_the_bus)
    await engine.close()
    return direct, asked


async def _p50(one: Callable[[int], Awaitable[None]]) -> float:
    """In ms, after some that warm up."""
    for n in range(20):
        await one(n)
    taken = []
    for n in range(QUERIES):
        began = time.perf_counter()
        await one(n)
        taken.append((time.perf_counter() - began) * 1000)
    return statistics.median(taken)
