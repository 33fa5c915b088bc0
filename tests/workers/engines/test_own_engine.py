"""The engine of docs/engines.md: in a package of its own, found by its entry point, run by a real worker."""

from __future__ import annotations

import importlib.util
import re
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from modelbus_broker import names
from modelbus_broker.messages import Deployment
from modelbus_workers.engines.base import Engine, EngineConfig, engine_class

from tests.helpers.asking import begun
from tests.helpers.cluster import Cluster
from tests.workers.engines import contract

ROOT = Path(__file__).resolve().parents[3]
PAGE = (ROOT / "docs" / "engines.md").read_text()


def block(language: str) -> str:
    found = re.findall(rf"^```{language}\n(.*?)^```$", PAGE, re.M | re.S)
    assert len(found) == 1
    return str(found[0])


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The page's files, as an installer lays them down, for this process and those that it starts."""
    entry = re.search(r'^shout = "(.*)"$', block("toml"), re.M)
    assert entry is not None
    folder = tmp_path / "site"
    (folder / "shout-1.dist-info").mkdir(parents=True)
    (folder / "shout.py").write_text(block("python"))
    (folder / "shout-1.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: shout\nVersion: 1\n")
    (folder / "shout-1.dist-info" / "entry_points.txt").write_text(f"[modelbus.engines]\nshout = {entry[1]}\n")
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.setenv("PYTHONPATH", str(folder))
    yield folder
    sys.modules.pop("shout", None)


async def started(**params: str) -> Engine:
    engine = engine_class("shout")(EngineConfig(model="loud", params=params))
    await engine.start()
    return engine


@pytest.mark.parametrize("check", contract.CHECKS, ids=lambda check: check.__name__)
async def test_the_engine_of_the_page_keeps_the_contract(check: contract.Check, installed: Path) -> None:
    await check(await started())


async def test_a_worker_runs_it_and_another_goes_on_when_that_one_is_killed(installed: Path, cluster: Cluster) -> None:
    assert importlib.util.find_spec("shout") is not None
    deployment = Deployment(
        name="loud", model="loud", engine="shout", revision="1", replicas=2, engine_params={"pause_s": "0.02"}
    )
    await cluster.declare(deployment)
    workers = [cluster.start_worker(deployment, replica=n) for n in range(2)]
    await cluster.wait_ready("loud", 2)
    publisher = await cluster.publisher()
    said = "one two three four five six seven eight nine ten " * 10
    call, reading = await begun(publisher, "loud", said)
    next(worker for worker in workers if worker.id == names.parse_run(call.reception.run)[2]).send_signal(
        signal.SIGKILL
    )
    assert await reading == said.upper().strip()
    assert call.attempt.attempt == 2
