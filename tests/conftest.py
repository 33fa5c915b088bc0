"""Fixtures for all tests: a real nats-server each, and real worker processes."""

from __future__ import annotations

import importlib.util
import os
import signal
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
from tests.helpers.vllm_tests import VLLM_TESTS

# Several tests run side by side: engines that wait for each other's threads only slow all of them down.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# What a shell starts in the background ignores Ctrl-C, and so would all that the tests start and interrupt: a handler,
# unlike that, is not handed on.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


# These run inside .venv-vllm, where tests/workers/engines/test_vllm_environment.py starts them.
collect_ignore = [] if importlib.util.find_spec("vllm") else list(VLLM_TESTS)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Generator[None, Any, Any]:
    """In CI a test that skips because a part is missing has failed: everything must be installed there."""
    report = yield
    if os.environ.get("MODELBUS_CI") and report.skipped and not hasattr(report, "wasxfail"):
        report.outcome = "failed"
        report.longrepr = f"skipped in CI: {report.longrepr}"
    return report


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """What failed and passed when it was tried again: each is a test, or a promise, that does not hold every time."""
    for report in terminalreporter.stats.get("rerun", []):
        terminalreporter.section(f"failed first: {report.nodeid} ({report.when})", red=True)
        terminalreporter.line(report.longreprtext)
        for title, content in report.sections:
            terminalreporter.line(f"{title}: {content[-10_000:]}")


#: The files that take longest, in seconds with two cores. What is not named here takes a few.
_SECONDS = {
    "workers/engines/test_vllm_environment.py": 270,
    "system/test_failover.py": 170,
    "system/test_bus_failures.py": 120,
    "workers/engines/test_transformers_forms.py": 80,
    "system/chaos/test_chaos.py": 75,
    "system/test_cancelling.py": 60,
    "workers/engines/test_transformers.py": 50,
    "system/test_cli.py": 50,
    "system/test_hanging.py": 35,
    "gateway/test_batches.py": 35,
    "workers/engines/test_llama_cpp.py": 30,
    "workers/test_worker.py": 30,
    "system/test_seed_document.py": 25,
    "system/test_seed_python.py": 25,
    "system/test_rolling.py": 25,
    "system/test_jobs.py": 20,
    "system/test_poison.py": 20,
    "system/test_draining.py": 20,
    "system/test_storage.py": 20,
    "workers/test_ledger.py": 20,
    "workers/test_uncertain_runs.py": 20,
}


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files come first, so that side by side none of them is left to run alone at the end."""
    here = Path(__file__).parent
    missing = [name for name in _SECONDS if not (here / name).is_file()]
    assert not missing, f"tests/conftest.py tells of files that are gone: {missing}"
    items.sort(key=lambda item: -_SECONDS.get(item.path.relative_to(here).as_posix(), 0))


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
