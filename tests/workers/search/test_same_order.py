"""Both store engines give the same order, up to ties: nobody's answers change when a store moves to Elasticsearch."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
from modelbus_broker.messages.search import Chunk, CreateStore, Found, Fusion, Search, StoreRecord, Upsert
from modelbus_workers.search.base import StoreEngine
from modelbus_workers.search.service import SearchService

from tests.helpers.search import elastic_engine, embedded_engine, needs_elasticsearch, where

#: Of fused scores from 0 to 1: what differs less may stand in either order.
TIE = 0.001
DIMENSIONS = 24
WORDS = (
    "bus queue worker model token stream gateway vector search store engine index deploy node cluster 模型 部署 存储 检索 "
    "向量 服务 队列 消息 文档 问答 embedding rerank gpt_emb camelCase llm-1.5 running tested files"
).split()


def corpus(count: int, seed: int) -> list[Chunk]:
    chance = random.Random(seed)
    numbers = np.random.default_rng(seed)
    return [
        Chunk(
            id=f"chunk-{n:04}", text=" ".join(chance.choices(WORDS, k=chance.randint(5, 60))),
            vector=numbers.standard_normal(DIMENSIONS).astype("<f4").tobytes(), attributes={"n": n, "odd": n % 2 == 1},
        )
        for n in range(count)
    ]  # fmt: skip


def same_up_to_ties(one: Found, other: Found) -> bool:
    """Whether each hit of one list stands in the other where its score belongs. Ranks make no scores to compare."""
    if one.hits and one.hits[0].score < 0.1:
        return [hit.chunk.id for hit in one.hits] == [hit.chunk.id for hit in other.hits]
    scores = {hit.chunk.id: hit.score for hit in other.hits}
    last = min((hit.score for hit in other.hits), default=0.0)
    return len(one.hits) == len(other.hits) and all(
        abs(mine.score - theirs.score) < TIE and abs(mine.score - scores.get(mine.chunk.id, last)) < TIE
        for mine, theirs in zip(one.hits, other.hits, strict=True)
    )


@needs_elasticsearch
@pytest.mark.timeout(240)
async def test_both_engines_give_the_same_order_up_to_ties(tmp_path: Path) -> None:
    chunks = corpus(400, seed=7)
    chance, numbers = random.Random(8), np.random.default_rng(9)
    searches: list[Search] = []
    for n in range(40):
        text = " ".join(chance.choices(WORDS, k=3)) + (" unheard words here" if n % 3 == 0 else "")
        near = numbers.standard_normal(DIMENSIONS).astype("<f4").tobytes()
        fusion = [Fusion(), Fusion(kind="rrf"), Fusion(text_weight=0.8, vector_weight=0.2, cover=False)][n % 3]
        condition = [None, where("eq", "odd", True), where("lt", "n", 40)][n // 3 % 3]
        searches.append(Search(stores=["s"], text=text, vector=near, fusion=fusion, filter=condition))

    async def answers(engine: StoreEngine) -> list[Found]:
        service = SearchService(engine)
        await service.answer(CreateStore(record=StoreRecord(name="s")))
        for at in range(0, len(chunks), 100):
            await service.answer(Upsert(store="s", chunks=chunks[at : at + 100], searchable=at == 300))
        found = [await service.answer(search) for search in searches]
        return [reply for reply in found if isinstance(reply, Found)]

    async with embedded_engine(tmp_path) as embedded, elastic_engine() as elastic:
        ours, theirs = await answers(embedded), await answers(elastic)

    assert len(ours) == len(theirs) == len(searches)
    different = [
        (
            search,
            [(h.chunk.id, round(h.score, 4)) for h in one.hits],
            [(h.chunk.id, round(h.score, 4)) for h in other.hits],
        )
        for search, one, other in zip(searches, ours, theirs, strict=True)
        if not same_up_to_ties(one, other)
    ]
    assert different == []
    assert all(one.cover == other.cover for one, other in zip(ours, theirs, strict=True))
