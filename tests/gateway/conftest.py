"""Gateways in the test's own loop, listening on a real port, and as processes."""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack
from typing import Any

import aiohttp
import openai
import psutil
import pytest
from modelbus_broker.connection import Bus
from modelbus_gateway.server import listening
from modelbus_gateway.settings import GatewaySettings

from tests.helpers.cluster import Cluster

StartGateway = Callable[..., Awaitable[str]]


class GatewayProcess:
    """One ``python -m modelbus_gateway``."""

    def __init__(self, *arguments: str, environment: dict[str, str] | None = None) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.process = subprocess.Popen(
            [sys.executable, "-m", "modelbus_gateway", "--port", str(self.port), *arguments],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, **(environment or {})},
        )  # fmt: skip

    async def ready(self) -> None:
        assert self.process.stdout is not None
        line = await asyncio.wait_for(asyncio.to_thread(self.process.stdout.readline), 30)
        assert self.url in line

    async def ended(self) -> tuple[int, str]:
        """Exit status and what it wrote on standard error."""
        _, words = await asyncio.to_thread(self.process.communicate, timeout=30)
        return self.process.returncode, words

    def children(self) -> list[psutil.Process]:
        return list(psutil.Process(self.process.pid).children(recursive=True))


Start = Callable[..., GatewayProcess]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture
async def start_gateway(bus: Bus) -> AsyncIterator[StartGateway]:
    """Starts a gateway with these settings and gives its URL."""
    async with AsyncExitStack() as stack:

        async def start(**settings: Any) -> str:
            made = GatewaySettings(**{"bus": bus.settings, "port": free_port(), "shutdown_grace_s": 2.0, **settings})
            await stack.enter_async_context(listening(made))
            return made.address

        yield start


@pytest.fixture
async def url(start_gateway: StartGateway) -> str:
    """A gateway with nothing deployed yet."""
    return await start_gateway()


@pytest.fixture
async def echo_url(cluster: Cluster, start_gateway: StartGateway) -> str:
    """A gateway with the model ``echo``."""
    await cluster.deploy_echo()
    return await start_gateway()


@pytest.fixture
async def http() -> AsyncIterator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession() as session:
        yield session


@pytest.fixture
async def client(echo_url: str) -> AsyncIterator[openai.AsyncOpenAI]:
    """The openai package, talking to a gateway with the model ``echo``."""
    async with openai.AsyncOpenAI(base_url=f"{echo_url}/v1", api_key="any", max_retries=0) as client:
        yield client


@pytest.fixture
def start() -> Iterator[Start]:
    started: list[GatewayProcess] = []

    def start_one(*arguments: str, environment: dict[str, str] | None = None) -> GatewayProcess:
        started.append(GatewayProcess(*arguments, environment=environment))
        return started[-1]

    yield start_one
    for gateway in started:
        if gateway.process.poll() is None:
            gateway.process.kill()
        gateway.process.communicate()
