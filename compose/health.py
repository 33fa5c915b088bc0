"""The worker container's health check: its node's record is on the bus, where it lives no longer than 10 s unrenewed."""

import asyncio
import socket
import sys

from modelbus_broker.connection import Bus
from modelbus_broker.registry import Registry
from modelbus_broker.settings import bus_settings


async def main() -> int:
    async with await Bus.connect(bus_settings(), name="health") as bus:
        registry = Registry(bus)
        await registry.start()
        try:
            return 0 if any(node.host == socket.gethostname() for node in registry.nodes.values()) else 1
        finally:
            await registry.close()


if __name__ == "__main__":
    sys.exit(asyncio.run(main()))
