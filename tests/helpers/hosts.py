"""Hosts for system tests: node processes with a home folder of their own, and what became of them."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import psutil
from modelbus_broker import names
from modelbus_broker.buckets import Bucket
from modelbus_broker.connection import Bus
from modelbus_broker.messages import Deployment, encode
from modelbus_broker.registry import Registry


class NodeProcess:
    """One node, as `modelbus start` would run it."""

    def __init__(self, home: Path, *arguments: str, prefix: Sequence[str] = ()) -> None:
        self.home = home
        home.mkdir(parents=True, exist_ok=True)
        self.log = home / "node.log"
        # Quick claims, so that tests need not wait for half a minute.
        command = [sys.executable, "-m", "modelbus_workers.node", "--home", str(home), "--claim-ttl-s", "3"]
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [*prefix, *command, "--renew-s", "0.7", *arguments],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip

    @property
    def id(self) -> str:
        return (self.home / "node.id").read_text().strip()

    def family(self) -> list[psutil.Process]:
        """The node and all that descends from it."""
        with contextlib.suppress(psutil.NoSuchProcess):
            node = psutil.Process(self.process.pid)
            return [node, *node.children(recursive=True)]
        return []

    def send(self, number: signal.Signals) -> None:
        os.kill(self.process.pid, number)

    async def ended(self, timeout_s: float = 25) -> int:
        await until(lambda: self.process.poll() is not None, "the node has ended", timeout_s)
        return int(self.process.returncode)

    async def close(self) -> None:
        if self.process.poll() is None:
            self.send(signal.SIGTERM)
            with contextlib.suppress(AssertionError):
                await self.ended(20)
        for process in self.family():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self.process.wait()


#: Starts a node with a name and arguments of the command line; see the fixture ``start_node``.
StartNode = Callable[..., NodeProcess]


async def until(condition: Callable[[], object], what: str, timeout_s: float = 25) -> None:
    """Waits for something that has to become true."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"still not so after {timeout_s:g} s: {what}"
        await asyncio.sleep(0.05)


def alive(processes: Sequence[psutil.Process]) -> list[psutil.Process]:
    """Those that still run; a zombie that waits for its parent does not."""
    found = []
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            if process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def freeze(pid: int, timeout_s: float = 25) -> None:
    """SIGSTOP; returns when none of its threads runs any more. On a busy machine one goes on for some ms after the signal."""
    os.kill(pid, signal.SIGSTOP)
    deadline = time.monotonic() + timeout_s
    while any(stat.read_text().rpartition(") ")[2][0] not in "Tt" for stat in Path(f"/proc/{pid}/task").glob("*/stat")):
        assert time.monotonic() < deadline, f"process {pid} does not stop"
        time.sleep(0.001)


async def wish(bus: Bus, name: str, **fields: object) -> Deployment:
    """Writes a deployment of the echo engine, as `deploy` does."""
    values: dict[str, object] = {"name": name, "model": name, "engine": "echo", "revision": "r1"}
    deployment = Deployment(**(values | fields))  # type: ignore[arg-type]
    await Bucket(bus, names.BUCKET_DEPLOYMENTS).put(names.deployment_key(name), encode(deployment))
    return deployment


async def unwish(bus: Bus, name: str) -> None:
    await Bucket(bus, names.BUCKET_DEPLOYMENTS).delete(names.deployment_key(name))


async def live_claims(bus: Bus) -> set[str]:
    entries = await Bucket(bus, names.BUCKET_CLAIMS).all()
    return {key for key, entry in entries.items() if not entry.deleted}


def placed(registry: Registry, model: str, revision: str = "r1") -> dict[int, str]:
    """Replica -> node of the workers that are ok."""
    return {w.replica: w.node for w in registry.workers_of(model) if w.revision == revision}
