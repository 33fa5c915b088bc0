"""Gateways in the test's own loop, listening on a real port, and as processes."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack
from typing import Any

import aiohttp
import openai
import pytest
from modelbus_broker.connection import Bus
from modelbus_gateway.server import listening
from modelbus_gateway.settings import GatewaySettings

from tests.helpers.cluster import Cluster
from tests.helpers.command_line import free_port
from tests.helpers.gateways import Start, started_gateways

StartGateway = Callable[..., Awaitable[str]]


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
    with started_gateways() as start_one:
        yield start_one
