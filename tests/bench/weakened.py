"""A gateway with guarantees switched off, to measure what each one costs. Nobody else can switch them off.

python -m tests.bench.weakened '{"url": ..., "port": ..., "publishing": {...}}'
"""

from __future__ import annotations

import asyncio
import sys

import msgspec
import uvloop
from aiohttp import web
from modelbus_broker.settings import BusSettings
from modelbus_broker.storing import PublisherSettings
from modelbus_gateway.app import create_app
from modelbus_gateway.dispatch import shorten
from modelbus_gateway.settings import GatewaySettings


class WeakenedGateway(msgspec.Struct, frozen=True, kw_only=True):
    url: str
    port: int
    publishing: PublisherSettings


async def serve(job: WeakenedGateway) -> None:
    app = create_app(GatewaySettings(bus=BusSettings(url=job.url), port=job.port), publishing=job.publishing)
    runner = web.AppRunner(app, handler_cancellation=True, access_log=None)
    await runner.setup()
    assert runner.server is not None
    shorten(runner.server, app)
    await web.TCPSite(runner, "127.0.0.1", job.port, backlog=1024).start()
    await asyncio.Event().wait()


def main() -> None:
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(serve(msgspec.json.decode(sys.argv[1], type=WeakenedGateway)))


if __name__ == "__main__":
    main()
