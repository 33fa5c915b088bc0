"""A bus with models on it that a module of tests shares: started once, on a loop of its own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from modelbus.background import BackgroundLoop
from modelbus_broker.connection import Bus
from modelbus_broker.messages import Deployment
from modelbus_broker.server import EmbeddedServer, ServerSettings
from modelbus_broker.settings import BusSettings
from modelbus_broker.topology import declare_bus

from tests.helpers.cluster import Cluster


@contextmanager
def shared_bus(folder: Path, deployments: Mapping[str, Deployment], timeout_s: float = 120.0) -> Iterator[str]:
    """The URL of a bus on which these models are ready; the keys are the models' names."""
    loop = BackgroundLoop()

    async def start() -> tuple[EmbeddedServer, Bus, Cluster]:
        server = EmbeddedServer(ServerSettings(store=folder / "nats"))
        await server.__aenter__()
        bus = await Bus.connect(BusSettings(url=server.url), name="test")
        await declare_bus(bus)
        cluster = Cluster(bus=bus, server=server, folder=folder)
        for deployment in deployments.values():
            await cluster.declare(deployment)
            cluster.start_worker(deployment)
        for model in deployments:
            await cluster.wait_ready(model, 1, timeout_s)
        return server, bus, cluster

    async def stop(server: EmbeddedServer, bus: Bus, cluster: Cluster) -> None:
        await cluster.close()
        await bus.close()
        await server.__aexit__(None, None, None)

    parts = loop.run(start())
    try:
        yield parts[0].url
    finally:
        loop.run(stop(*parts))
        loop.stop()
