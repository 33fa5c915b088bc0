"""Two rankings become one: by scaled scores, or by reciprocal ranks. Pure; the same for every engine."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import msgspec
from modelbus_broker.messages.search import Fusion


class Scored(msgspec.Struct, frozen=True):
    """A chunk in one ranking. ``key`` is its id; scores of one ranking compare with each other only."""

    key: str
    score: float


class Fused(msgspec.Struct, frozen=True, kw_only=True):
    """A chunk in the common ranking, with what it had in each. Ranks begin at 1."""

    key: str
    score: float
    text: float | None = None
    vector: float | None = None
    text_rank: int | None = None
    vector_rank: int | None = None


def fuse(text: Sequence[Scored], vector: Sequence[Scored], fusion: Fusion, *, cover: float = 1.0) -> list[Fused]:
    """The common ranking, the best first; equal scores in the order of the better rank, then of the id.

    One ranking alone keeps its own scores: BM25, or the cosine.

    Args:
        text, vector: the best first.
        cover: share of the query's different terms in the best hit by text, by which the text ranking's weight is
            multiplied: the less of the query it has found, the more of it is noise. Not for ``rrf``. docs/search.md has
            what this gives on sets with judgements.
    """
    text, vector = text[: fusion.window], vector[: fusion.window]
    text_weight, vector_weight = fusion.text_weight, fusion.vector_weight
    if fusion.kind == "minmax" and fusion.cover:
        text_weight *= cover
    scores: dict[str, float] = {}
    for ranking, weight in ((text, text_weight), (vector, vector_weight)):
        if not (text and vector):
            shares = {item.key: item.score for item in ranking}
        elif fusion.kind == "rrf":
            shares = {item.key: weight / (fusion.constant + rank) for rank, item in enumerate(ranking, 1)}
        else:
            shares = {key: weight * share for key, share in scaled(ranking).items()}
        for key, share in shares.items():
            scores[key] = scores.get(key, 0.0) + share
    by_text = {item.key: (rank, item.score) for rank, item in enumerate(text, 1)}
    by_vector = {item.key: (rank, item.score) for rank, item in enumerate(vector, 1)}
    nothing = (None, None)
    fused = [
        Fused(
            key=key, score=score, text_rank=by_text.get(key, nothing)[0], text=by_text.get(key, nothing)[1],
            vector_rank=by_vector.get(key, nothing)[0], vector=by_vector.get(key, nothing)[1],
        )
        for key, score in scores.items()
    ]  # fmt: skip
    return sorted(fused, key=_order)


def _order(item: Fused) -> tuple[float, float, str]:
    best_rank = min(item.text_rank or float("inf"), item.vector_rank or float("inf"))
    # Sums of shares in another order differ in the last bit: that is no difference.
    return (-round(item.score, 9), best_rank, item.key)


def scaled(ranking: Sequence[Scored]) -> dict[str, float]:
    """Scores from 0 (the last) to 1 (the first); all 1 where all are equal."""
    if not ranking:
        return {}
    low, high = min(item.score for item in ranking), max(item.score for item in ranking)
    span = high - low
    return {item.key: (item.score - low) / span if span > 1e-12 else 1.0 for item in ranking}


def coverage(query: Collection[str], text_terms: Collection[str]) -> float:
    """The share of the query's different terms that a text has; 0 without any."""
    wanted = set(query)
    return len(wanted & set(text_terms)) / len(wanted) if wanted else 0.0


def merge(rankings: Mapping[str, Sequence[Fused]]) -> list[tuple[str, Fused]]:
    """The rankings of several stores, by name, as one: by score. What is equal stays in the order of the stores."""
    found = [(store, item) for store, ranking in rankings.items() for item in ranking]
    return sorted(found, key=lambda pair: -round(pair[1].score, 9))
