from __future__ import annotations

import asyncio
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from modelbus_broker.messages import Deployment
from modelbus_broker.settings import BusSettings
from modelbus_workers.job import WorkerJob
from modelbus_workers.node.processes import Keeper, WorkerProcess, describe_end, log_path, tail
from modelbus_workers.node.room import Share

from tests.helpers.hosts import alive, until

#: A node that has started a worker whose child knows nothing of anybody.
_NODE = """
import subprocess, time
from modelbus_workers.node.processes import Keeper
keeper = Keeper()
keeper.start()
worker = subprocess.Popen(
    ["sh", "-c", "sleep 600 & echo $!; wait"], start_new_session=True, stdout=subprocess.PIPE, text=True
)
keeper.add(worker.pid)
print(worker.stdout.readline(), end="", flush=True)  # not before the keeper knows of it
time.sleep(600)
"""


async def test_children_of_a_worker_die_when_the_node_is_killed() -> None:
    node = await asyncio.create_subprocess_exec(sys.executable, "-c", _NODE, stdout=subprocess.PIPE)
    assert node.stdout is not None
    child = psutil.Process(int(await node.stdout.readline()))
    family = [*psutil.Process(node.pid).children(), child]
    assert alive([child]) == [child]
    node.kill()
    await node.wait()
    await until(lambda: not alive(family), "the worker, its child and the keeper have ended", 10)


async def test_a_keeper_that_was_killed_is_replaced_and_told_all() -> None:
    keeper = Keeper()
    keeper.start()
    worker = await asyncio.create_subprocess_exec("sleep", "600", start_new_session=True)
    keeper.add(worker.pid)
    # Children of earlier tests may be dead and still be listed.
    first = next(
        process for process in alive(psutil.Process().children()) if "keeper.py" in " ".join(process.cmdline())
    )
    first.kill()
    await until(lambda: not alive([first]), "the first keeper is dead", 10)
    for group in (1_000_000_001, 1_000_000_002):  # nobody's
        keeper.add(group)
        keeper.drop(group)
    keeper.close()  # without a farewell for the worker
    await asyncio.wait_for(worker.wait(), 10)


def _job() -> WorkerJob:
    deployment = Deployment(name="a/b", model="a/b", engine="echo", revision="r1")
    return WorkerJob(worker_id="w1", deployment=deployment, bus=BusSettings(url="nats://127.0.0.1:1"))


async def test_a_worker_that_cannot_work_leaves_its_words_in_its_log(tmp_path: Path) -> None:
    keeper, ended = Keeper(), asyncio.Event()
    keeper.start()
    worker = await WorkerProcess.start(_job(), Share(), tmp_path, keeper, ended.set)
    await asyncio.wait_for(ended.wait(), 30)
    assert worker.code not in (None, 0)
    assert "no bus answers" in worker.last_words()
    assert log_path(tmp_path, "a/b", 0).stat().st_mode & 0o777 == 0o600
    keeper.close()


async def test_a_worker_that_does_not_stop_is_killed_when_it_is_urgent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A stand-in that ignores SIGTERM, in place of the worker's module.
    package = tmp_path / "stubborn" / "modelbus_workers"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "worker.py").write_text(
        "import signal, time\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\nprint('up', flush=True)\ntime.sleep(600)\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(package.parent))
    keeper, hurry = Keeper(), asyncio.Event()
    keeper.start()
    worker = await WorkerProcess.start(_job(), Share(), tmp_path, keeper, lambda: None)
    await until(lambda: worker.last_words() == "up", "it ignores SIGTERM")
    stopping = asyncio.create_task(worker.stop(600, hurry))
    await asyncio.sleep(0.2)
    assert worker.code is None
    hurry.set()
    await asyncio.wait_for(stopping, 10)
    assert worker.code == -9
    keeper.close()


def test_the_tail_of_a_log_starts_where_the_worker_started(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_text("old\nfirst\nsecond\n")
    assert tail(path, 10, start=4) == ["first", "second"]
    assert tail(path, 1) == ["second"]
    assert tail(tmp_path / "absent", 1) == []


def test_ends_are_told_in_words() -> None:
    assert describe_end(1) == "it ended with status 1"
    assert describe_end(-9) == "it was ended by SIGKILL"
