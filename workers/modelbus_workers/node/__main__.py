"""`python -m modelbus_workers.node`: see ``--help``."""

from __future__ import annotations

import asyncio
import logging
import signal
import sys
from collections.abc import Sequence

from modelbus_broker.errors import ModelBusError

from .opening import running_node
from .settings import NodeSettings, parse


async def _main(settings: NodeSettings) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    async with running_node(settings) as node:

        def on_signal() -> None:
            if stop.is_set():
                node.hurry.set()  # asked twice: workers are killed
            stop.set()

        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, on_signal)
        logging.info("node %s offers %s", node.id, node.holdings.offer)
        await node.run(stop)


def main(arguments: Sequence[str] | None = None) -> int:
    """Exits 0 after SIGTERM or SIGINT, 1 with the reason on stderr when it cannot work."""
    try:
        settings = parse(sys.argv[1:] if arguments is None else arguments)
        logging.basicConfig(
            level=settings.log_level, format="%(asctime)s %(levelname)s %(name)s %(message)s", stream=sys.stderr
        )
        asyncio.run(_main(settings))
    except ModelBusError as error:
        sys.stderr.write(f"Error: {error}\n")
        return 1
    except KeyboardInterrupt:  # before the handlers were there
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
