"""Real worker processes for tests, started the way a node starts them."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import msgspec
from modelbus_broker import names
from modelbus_broker.buckets import Bucket
from modelbus_broker.connection import Bus
from modelbus_broker.messages import Deployment, encode
from modelbus_broker.publisher import Publisher
from modelbus_broker.registry import Registry
from modelbus_broker.server import EmbeddedServer
from modelbus_broker.settings import BusSettings
from modelbus_broker.storing import PublisherSettings
from modelbus_broker.topology import declare_model
from modelbus_workers.job import WorkerJob


class WorkerProcess:
    """One ``python -m modelbus_workers.worker``."""

    def __init__(self, job: WorkerJob, log_file: Path, prefix: Sequence[str] = ()) -> None:
        self.id = job.worker_id
        self.deployment = job.deployment
        self.log_file = log_file
        with log_file.open("ab") as log:
            self.process = subprocess.Popen(
                [*prefix, sys.executable, "-m", "modelbus_workers.worker"],
                stdin=subprocess.PIPE, stdout=log, stderr=log,
            )  # fmt: skip
        assert self.process.stdin is not None
        self.process.stdin.write(msgspec.json.encode(job))
        self.process.stdin.close()

    def send_signal(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    async def wait(self, timeout_s: float = 30.0) -> int:
        """The exit code."""
        return await asyncio.to_thread(self.process.wait, timeout_s)

    def log(self) -> str:
        return self.log_file.read_text(errors="replace")


def echo_deployment(model: str = "echo", *, workers: int = 1, **params: str) -> Deployment:
    """A model on the echo engine. ``slots``, ``max_crashes`` and the times ``..._s`` are the deployment's."""
    slots, max_crashes = int(params.pop("slots", "0")), int(params.pop("max_crashes", "3"))
    times = {name: float(params.pop(name)) for name in list(params) if name.endswith("_s")}
    wish = Deployment(name=model, model=model, engine="echo", revision="1", replicas=workers, slots=slots)
    return msgspec.structs.replace(wish, engine_params=params, max_crashes=max_crashes, **times)


class Cluster:
    """A bus with workers on it. ``url`` names all servers where the bus has several."""

    def __init__(self, *, bus: Bus, server: EmbeddedServer, folder: Path, url: str = "") -> None:
        self.bus = bus
        self.server = server
        self._url = url
        self.folder = folder
        self.workers: list[WorkerProcess] = []
        self._publishers: list[tuple[Publisher, Registry, Bus]] = []

    @property
    def settings(self) -> BusSettings:
        return BusSettings(url=self._url or self.server.url)

    async def declare(self, deployment: Deployment) -> None:
        """Writes a deployment and makes its consumers, as deploy does; no node is told to start it."""
        await declare_model(self.bus, deployment.model, shares=deployment.shares)
        key = names.deployment_key(deployment.name)
        await Bucket(self.bus, names.BUCKET_DEPLOYMENTS).put(key, encode(deployment))

    def start_worker(
        self, deployment: Deployment, *, replica: int = 0, node: str = "test", prefix: Sequence[str] = ()
    ) -> WorkerProcess:
        """``prefix`` is a command that runs it, on another host for instance."""
        job = WorkerJob(
            worker_id=names.new_worker_id(),
            deployment=deployment,
            bus=self.settings,
            replica=replica,
            node=node,
            params=deployment.engine_params,
        )
        worker = WorkerProcess(job, self.folder / f"worker-{len(self.workers)}.log", prefix)
        self.workers.append(worker)
        return worker

    async def deploy_echo(self, model: str = "echo", *, workers: int = 1, **params: str) -> list[WorkerProcess]:
        """A model on the echo engine, with its workers ready; see ``echo_deployment``."""
        deployment = echo_deployment(model, workers=workers, **params)
        await self.declare(deployment)
        started = [self.start_worker(deployment, replica=n) for n in range(workers)]
        await self.wait_ready(model, workers)
        return started

    async def wait_ready(self, model: str, workers: int, timeout_s: float = 30.0) -> None:
        """Until so many workers of the model are ok."""
        registry = Registry(self.bus)
        await registry.start()
        try:
            end = time.monotonic() + timeout_s
            while len(registry.workers_of(model)) < workers:
                if time.monotonic() > end:
                    raise TimeoutError("\n".join(worker.log() for worker in self.workers))
                await registry.changed(1.0)
            compats = {worker.compat for worker in registry.workers_of(model) if worker.compat}
            await declare_model(self.bus, model, compats=sorted(compats))
        finally:
            await registry.close()

    async def all_pull(self, model: str, workers: int, timeout_s: float = 30.0) -> None:
        """Until so many workers wait for requests of lane hi: what is published then is spread over all of them."""
        consumer = f"CONSUMER.INFO.{names.STREAM_HI}.{names.consumer_name(model, 'hi', 0)}"
        async with asyncio.timeout(timeout_s):
            while (await self.bus.js_request(consumer))["num_waiting"] < workers:
                await asyncio.sleep(0.02)

    async def publisher(self, settings: PublisherSettings | None = None) -> Publisher:
        """A publisher with a connection of its own."""
        bus = await Bus.connect(self.settings, name="test-publisher")
        registry = Registry(bus)
        await registry.start()
        publisher = Publisher(bus, registry, kind="sdk", settings=settings)
        await publisher.start()
        self._publishers.append((publisher, registry, bus))
        return publisher

    async def close(self) -> None:
        for publisher, registry, bus in self._publishers:
            await publisher.close()
            await registry.close()
            await bus.close()
        for worker in self.workers:
            if worker.process.poll() is None:
                worker.process.send_signal(signal.SIGCONT)
                worker.process.terminate()
        for worker in self.workers:
            try:
                await worker.wait(10)
            except subprocess.TimeoutExpired:
                worker.process.kill()
                await worker.wait(10)
