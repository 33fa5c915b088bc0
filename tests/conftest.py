"""Fixtures for all tests: a real nats-server each, and real worker processes."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import AsyncIterator, Generator
from pathlib import Path
from typing import Any

import pytest
from modelbus_broker.connection import Bus
from modelbus_broker.registry import Registry
from modelbus_broker.server import EmbeddedServer, ServerSettings
from modelbus_broker.settings import BusSettings
from modelbus_broker.topology import declare_bus

from tests.helpers.cluster import Cluster

# Several tests run side by side: engines that wait for each other's threads only slow all of them down.
os.environ.setdefault("OMP_NUM_THREADS", "1")


# These run inside .venv-vllm, where tests/workers/engines/test_vllm_environment.py starts them.
collect_ignore = [] if importlib.util.find_spec("vllm") else ["workers/engines/test_vllm.py"]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Generator[None, Any, Any]:
    """In CI a test that skips because a part is missing has failed: everything must be installed there."""
    report = yield
    if os.environ.get("MODELBUS_CI") and report.skipped and not hasattr(report, "wasxfail"):
        report.outcome = "failed"
        report.longrepr = f"skipped in CI: {report.longrepr}"
    return report


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with tests that may take long come first, so that side by side none of them is left to run alone."""
    patience: dict[Path, float] = {}
    for item in items:
        marker = item.get_closest_marker("timeout")
        allowed = float(marker.args[0]) if marker is not None else 0.0
        patience[item.path] = max(allowed, patience.get(item.path, 0.0))
    items.sort(key=lambda item: -patience[item.path])


@pytest.fixture(autouse=True)
def isolated_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Every test has a home folder of its own and knows no bus but its own."""
    home = tmp_path / "home"
    monkeypatch.setenv("MODELBUS_HOME", str(home))
    for name in ("MODELBUS_ADDRESS", "MODELBUS_CREDS", "MODELBUS_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    return home


@pytest.fixture
async def server(tmp_path: Path) -> AsyncIterator[EmbeddedServer]:
    """A nats-server of this test's own."""
    async with EmbeddedServer(ServerSettings(store=tmp_path / "nats")) as server:
        yield server


@pytest.fixture
async def bus_url(server: EmbeddedServer) -> str:
    """The URL of a fresh server, with nothing declared."""
    return server.url


@pytest.fixture
async def bus(bus_url: str) -> AsyncIterator[Bus]:
    """A connection to a fresh server with all streams and buckets declared."""
    async with await Bus.connect(BusSettings(url=bus_url), name="test") as bus:
        await declare_bus(bus)
        yield bus


@pytest.fixture
async def registry(bus: Bus) -> AsyncIterator[Registry]:
    registry = Registry(bus)
    await registry.start()
    yield registry
    await registry.close()


@pytest.fixture
async def cluster(bus: Bus, server: EmbeddedServer, tmp_path: Path) -> AsyncIterator[Cluster]:
    """A bus and a way to start real worker processes on it; see tests/helpers/cluster.py."""
    cluster = Cluster(bus=bus, server=server, folder=tmp_path)
    yield cluster
    await cluster.close()
