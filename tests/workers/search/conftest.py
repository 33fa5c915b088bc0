"""Fixtures of the search tests: each store engine, the second on a real Elasticsearch where ``MODELBUS_TEST_ES`` names one."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from modelbus_workers.search.base import StoreEngine
from modelbus_workers.search.service import SearchService

from tests.helpers.search import ELASTICSEARCH, elastic_engine, embedded_engine, needs_elasticsearch


@pytest.fixture(params=["embedded", pytest.param(ELASTICSEARCH, marks=needs_elasticsearch)])
async def engine(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[StoreEngine]:
    """Each engine in turn: what is tested with it holds for all."""
    opened = elastic_engine() if request.param == ELASTICSEARCH else embedded_engine(tmp_path / "stores")
    async with opened as engine:
        yield engine


@pytest.fixture
def service(engine: StoreEngine) -> SearchService:
    return SearchService(engine)
