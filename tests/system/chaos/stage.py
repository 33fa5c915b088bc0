"""The parts that chaos is made with: three bus nodes, workers and gateways, all real processes."""

from __future__ import annotations

from contextlib import AsyncExitStack
from pathlib import Path
from typing import Self

from modelbus_broker.connection import Bus
from modelbus_broker.messages import Deployment
from modelbus_broker.registry import Registry

from tests.helpers.bus_nodes import BusNodes
from tests.helpers.cluster import Cluster, WorkerProcess
from tests.helpers.gateway_replicas import GatewayReplica

MODEL = "echo"
DEPLOYMENT = Deployment(
    name=MODEL, model=MODEL, engine="echo", revision="1", engine_params={"interval_ms": "20"}, replicas=4, slots=64,
    drain_s=0.5,
    # The kills are not the requests' fault.
    max_crashes=50,
)  # fmt: skip


class Stage:
    """Use it with ``async with``: at its start everything is ready, at its end everything has ended.

    Attributes:
        workers: those that shall live; one that was killed is replaced here.
    """

    def __init__(self, folder: Path, *, workers: int = 4, gateways: int = 3) -> None:
        self.folder = folder
        self.nodes = BusNodes(folder)
        self.workers: list[WorkerProcess] = []
        self.gateways: list[GatewayReplica] = []
        self.bus: Bus
        self.registry: Registry
        self._cluster: Cluster
        self._counts = workers, gateways
        self._stack = AsyncExitStack()

    async def __aenter__(self) -> Self:
        try:
            await self._open(*self._counts)
        except BaseException:
            await self._stack.aclose()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._stack.aclose()

    async def _open(self, workers: int, gateways: int) -> None:
        await self._stack.enter_async_context(self.nodes)
        self.bus = await self._stack.enter_async_context(await self.nodes.connect("chaos"))
        await self.nodes.declare(self.bus)
        self.registry = Registry(self.bus)
        await self.registry.start()
        self._stack.push_async_callback(self.registry.close)
        self._cluster = Cluster(bus=self.bus, server=self.nodes.servers[0], folder=self.folder, url=self.nodes.url)
        self._stack.push_async_callback(self._cluster.close)
        await self._cluster.declare(DEPLOYMENT)
        self.workers = [self._cluster.start_worker(DEPLOYMENT, replica=n) for n in range(workers)]
        await self._cluster.wait_ready(MODEL, workers, timeout_s=60)
        for number in range(gateways):
            gateway = GatewayReplica(
                self.nodes.url, self.folder / f"gateway-{number}.log", "--shutdown-grace", "2", "--log-level", "warning"
            )
            self.gateways.append(gateway)
            self._stack.push_async_callback(gateway.close)
            gateway.start()
        for gateway in self.gateways:
            await gateway.ready()

    async def replace(self, worker: WorkerProcess) -> None:
        """Starts a worker in place of one that has ended, and returns when it is ready."""
        index = self.workers.index(worker)
        new = self.workers[index] = self._cluster.start_worker(DEPLOYMENT, replica=index)
        while all(record.id != new.id for record in self.registry.workers_of(MODEL)):
            assert new.process.poll() is None, new.log()
            await self.registry.changed(1.0)
