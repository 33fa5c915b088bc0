"""Three bus servers that replicate the streams, each of which can be killed and started again."""

from __future__ import annotations

import asyncio
import json
import socket
import urllib.error
import urllib.request
from pathlib import Path

from modelbus_broker.connection import Bus
from modelbus_broker.errors import ModelBusError
from modelbus_broker.server import ClusterSettings, EmbeddedServer, ServerSettings
from modelbus_broker.settings import BusSettings
from modelbus_broker.topology import declare_bus


class BusNodes:
    """A cluster of servers. Use it with ``async with``."""

    def __init__(self, folder: Path, count: int = 3) -> None:
        ports = free_ports(count)
        routes = [f"nats://127.0.0.1:{port}" for port in ports]
        self.servers = [
            EmbeddedServer(
                ServerSettings(
                    store=folder / f"n{index}",
                    cluster=ClusterSettings(name=f"n{index}", port=port, routes=routes),
                    start_timeout_s=60.0,
                )
            )
            for index, port in enumerate(ports)
        ]

    @property
    def url(self) -> str:
        return ",".join(server.url for server in self.servers)

    async def __aenter__(self) -> BusNodes:
        await asyncio.gather(*(server.start() for server in self.servers))
        return self

    async def __aexit__(self, *_: object) -> None:
        await asyncio.gather(*(server.stop() for server in self.servers))

    async def declare(self, bus: Bus, timeout_s: float = 60.0) -> None:
        """Declares all streams with a copy on each server, as soon as the servers have chosen a leader."""
        async with asyncio.timeout(timeout_s):
            while True:
                try:
                    await declare_bus(bus, replicas=len(self.servers))
                    return
                except ModelBusError:
                    await asyncio.sleep(0.2)

    async def connect(self, name: str) -> Bus:
        return await Bus.connect(BusSettings(url=self.url), name=name)

    async def in_sync(self, timeout_s: float = 120.0) -> None:
        """Until each server that runs has all that the others have."""
        async with asyncio.timeout(timeout_s):
            for server in self.servers:
                while server.running and not await asyncio.to_thread(_is_healthy, server):
                    await asyncio.sleep(0.1)

    async def leader_of(self, bus: Bus, stream: str, timeout_s: float = 60.0) -> EmbeddedServer:
        """The server that leads this stream."""
        async with asyncio.timeout(timeout_s):
            while True:
                try:
                    leader = (await bus.js_request(f"STREAM.INFO.{stream}"))["cluster"].get("leader")
                except ModelBusError:
                    leader = None
                for server in self.servers:
                    if server.settings.cluster and server.settings.cluster.name == leader and server.running:
                        return server
                await asyncio.sleep(0.1)


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on now."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [int(each.getsockname()[1]) for each in sockets]
    finally:
        for each in sockets:
            each.close()


def _is_healthy(server: EmbeddedServer) -> bool:
    """What the server's monitoring says: its streams and consumers are up to date."""
    try:
        (ports,) = server.settings.store.glob("*.ports")
        url = json.loads(ports.read_bytes())["monitoring"][0]
        with urllib.request.urlopen(f"{url}/healthz", timeout=5):
            return True
    except (ValueError, OSError, urllib.error.URLError):
        return False
