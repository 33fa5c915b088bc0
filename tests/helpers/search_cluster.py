"""A bus with a search service and models for it, in real processes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from modelbus_broker.connection import Bus
from modelbus_broker.messages import Deployment
from modelbus_broker.server import EmbeddedServer, ServerSettings
from modelbus_broker.settings import BusSettings
from modelbus_broker.topology import declare_bus

from tests.helpers.cluster import Cluster, WorkerProcess


def search_deployment(folder: Path, service: str = "storage") -> Deployment:
    folder.mkdir(exist_ok=True)
    return Deployment(
        name=service, model=service, engine="search", revision="1", model_path=str(folder), exclusive=True, drain_s=5
    )


async def start_search(cluster: Cluster, folder: Path) -> WorkerProcess:
    deployment = search_deployment(folder)
    await cluster.declare(deployment)
    worker = cluster.start_worker(deployment)
    await cluster.wait_ready("storage", 1)
    return worker


@asynccontextmanager
async def search_cluster(folder: Path) -> AsyncIterator[Cluster]:
    """With an embedding model ``emb`` and a rerank model ``rerank`` that hangs on texts with "stuck"; both chat as well."""
    async with (
        EmbeddedServer(ServerSettings(store=folder / "nats")) as server,
        await Bus.connect(BusSettings(url=server.url), name="test") as bus,
    ):
        await declare_bus(bus)
        cluster = Cluster(bus=bus, server=server, folder=folder)
        try:
            await asyncio.gather(
                start_search(cluster, folder / "stores"),
                cluster.deploy_echo("emb", dimensions="16"),
                cluster.deploy_echo("rerank", hang_on="stuck"),
            )
            yield cluster
        finally:
            await cluster.close()
