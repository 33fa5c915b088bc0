"""Which of several collections a question is about, told by their descriptions: by their meaning, or by a model."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Mapping, Sequence
from typing import Literal

from modelbus_broker.asking import CallOptions

from ..model_client import ModelClient
from ..search.store import AsyncStore
from .judging import RELEVANT, relevances

#: ``auto``: by meaning, where there are more than ``FEW``; ``all``: no choice is made.
Route = Literal["auto", "all", "embedding", "model"]

#: So many collections are looked in without a choice, and so many are chosen by meaning.
FEW = 3

_ASK = "Is this the description of a collection in which the answer may stand?"


async def routed(
    client: ModelClient, stores: Sequence[AsyncStore], question: str, *, route: Route, model: str
) -> list[AsyncStore]:
    """The collections to look in, in their order. One without a description is always among them.

    Args:
        model: for the route ``model``: it says of each whether the answer may stand there. Where it finds none, all are.

    Raises:
        NotFound: one of them is not there.
        ModelBusError: what the model, or the embedding model of the first collection, says.
    """
    if route == "all" or len(stores) < 2 or (route == "auto" and len(stores) <= FEW):
        return list(stores)
    records = [status.record for status in await asyncio.gather(*(store.status() for store in stores))]
    described = {
        record.name: f"{record.name}: {record.metadata['description']}"
        for record in records
        if record.metadata.get("description")
    }
    if not described:
        return list(stores)
    if route == "model":
        scores = await relevances(client, model, question, list(described.values()), _ASK)
        chosen = {name for name, score in zip(described, scores, strict=True) if score >= RELEVANT} or set(described)
    else:
        first = records[0]
        if not first.embedding_model:
            return list(stores)
        texts = [first.query_prefix + question, *(first.passage_prefix + text for text in described.values())]
        vectors = (await client.embed(first.embedding_model, texts, options=CallOptions(wait=True))).vectors
        chosen = nearest(vectors[0], dict(zip(described, vectors[1:], strict=True)), FEW)
    return [store for store in stores if store.name in chosen or store.name not in described]


def nearest(vector: Sequence[float], among: Mapping[str, Sequence[float]], count: int) -> set[str]:
    """The names of the vectors with the largest cosines."""

    def cosine(other: Sequence[float]) -> float:
        length = math.sqrt(sum(x * x for x in other)) or 1.0
        return sum(x * y for x, y in zip(vector, other, strict=True)) / length

    return set(sorted(among, key=lambda name: -cosine(among[name]))[:count])
