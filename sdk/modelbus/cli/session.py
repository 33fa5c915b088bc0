"""A command's connection: the bus, what is deployed and alive, and a way to publish."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from typing import Any, TypeVar

import msgspec
from modelbus_broker.connection import Bus
from modelbus_broker.publisher import Publisher
from modelbus_broker.registry import Registry
from modelbus_broker.settings import bus_settings
from modelbus_broker.topology import declare_bus

T = TypeVar("T")


class Session(msgspec.Struct, frozen=True):
    """What a command works with."""

    bus: Bus
    registry: Registry
    publisher: Publisher


@asynccontextmanager
async def session(address: str = "", creds: str = "", *, declare: bool = False) -> AsyncIterator[Session]:
    """Connects for the time of one command; with ``declare`` it makes the streams that a fresh bus lacks.

    Raises:
        BusUnavailable: there is no bus, or nothing is declared on it.
        AuthenticationFailed: it refuses the credentials.
    """
    async with await Bus.connect(bus_settings(address, creds), name="modelbus command") as bus:
        if declare:
            await declare_bus(bus)
        registry = Registry(bus)
        publisher = Publisher(bus, registry, kind="sdk")
        try:
            await registry.start()
            await publisher.start()
            yield Session(bus, registry, publisher)
        finally:
            await publisher.close()
            await registry.close()


def run(main: Coroutine[Any, Any, T]) -> T:
    """Runs a command to its end."""
    # What the bus connection logs is for services; a command says what matters itself.
    logging.getLogger("modelbus_broker").setLevel(logging.ERROR)
    return asyncio.run(main)
