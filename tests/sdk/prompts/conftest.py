"""One bus for each module of tests, with models of the engine echo."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator

import modelbus
import pytest

from tests.helpers.cluster import echo_deployment
from tests.helpers.prompting import shared_bus


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A bus with ``chat``, which repeats the user's last turn, and ``slow``, which takes its time for each word."""
    deployments = {"chat": echo_deployment("chat"), "slow": echo_deployment("slow", interval_ms="20", tokens="500")}
    with shared_bus(tmp_path_factory.mktemp("bus"), deployments) as url:
        yield url


@pytest.fixture
def connected(url: str) -> Iterator[None]:
    """This process shares one connection, as plain programs do."""
    modelbus.connect_cluster(url)
    yield
    modelbus.disconnect()


@pytest.fixture
async def client(url: str) -> AsyncIterator[modelbus.Client]:
    async with modelbus.connect(url) as client:
        yield client
