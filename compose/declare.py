"""Declares the streams and buckets of the bus, as often as it is run; MODELBUS_REPLICAS says how many copies."""

import asyncio
import os

from modelbus_broker.connection import Bus
from modelbus_broker.settings import bus_settings
from modelbus_broker.topology import declare_bus


async def main() -> None:
    async with await Bus.connect(bus_settings(), name="declare") as bus:
        await declare_bus(bus, replicas=int(os.environ.get("MODELBUS_REPLICAS", "1")))


if __name__ == "__main__":
    asyncio.run(main())
