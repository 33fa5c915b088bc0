"""One gateway process: listens, serves, and stops in good order."""

from __future__ import annotations

import asyncio
import contextlib
import signal
from collections.abc import AsyncIterator, Callable

from aiohttp import web
from modelbus_broker import garbage
from modelbus_broker.connection import Bus
from modelbus_broker.errors import ConfigurationError, GatewayStopping
from modelbus_broker.scheduling import prefer_throughput

from .app import create_app
from .dispatch import shorten
from .gateway import GATEWAY
from .settings import GatewaySettings

#: What still runs when the gateway ends has so long to say so.
_CUT_S = 2.0
#: A request that was on its way over an open connection when the gateway stopped has come after so long.
_LATE_S = 0.3


@contextlib.asynccontextmanager
async def listening(
    settings: GatewaySettings, bus: Bus | None = None, *, reuse_port: bool = False
) -> AsyncIterator[web.Application]:
    """Serves while the block runs. At its end no new connection is taken, and running requests have
    ``shutdown_grace_s`` to come to their end; then they end with an error.

    Raises:
        ConfigurationError: the address cannot be listened on.
        BusUnavailable, AuthenticationFailed: the bus cannot be reached.
    """
    app = create_app(settings, bus)
    # Access logs cost more than the requests; /metrics counts them.
    runner = web.AppRunner(
        app,
        handler_cancellation=True,
        access_log=None,
        shutdown_timeout=_CUT_S,
        handle_signals=False,
    )
    try:
        await runner.setup()
        assert runner.server is not None
        shorten(runner.server, app)
        site = web.TCPSite(
            runner,
            settings.host,
            settings.port,
            ssl_context=settings.tls(),
            backlog=1024,
            reuse_port=reuse_port or None,
        )
        try:
            await site.start()
        except OSError as error:
            raise cannot_listen(settings, error) from error
        yield app
    finally:
        try:
            await _drain(runner, app, settings.shutdown_grace_s)
        finally:
            await runner.cleanup()


async def _drain(runner: web.AppRunner, app: web.Application, grace_s: float) -> None:
    """Stops listening and waits for the running requests; what outlives the grace hears why it ends."""
    for site in list(runner.sites):
        await site.stop()
    if (gateway := app.get(GATEWAY)) is None:
        return
    done = await gateway.traffic.ended(grace_s)
    if done and runner.server is not None and runner.server.connections:
        await asyncio.sleep(_LATE_S)
        done = await gateway.traffic.ended(grace_s)
    if not done:
        error = GatewayStopping(f"The gateway is stopping, and the answer was not complete after {grace_s:g} s.")
        await gateway.publisher.give_up(error)
        await gateway.traffic.ended(_CUT_S)


def cannot_listen(settings: GatewaySettings, error: OSError) -> ConfigurationError:
    return ConfigurationError(f"cannot listen on {settings.host} port {settings.port}: {error.strerror or error}")


async def serve(settings: GatewaySettings, ready: Callable[[], None], *, reuse_port: bool = False) -> None:
    """Serves until SIGTERM or SIGINT; a second one cuts what still runs. ``ready`` is called once it listens."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    async with listening(settings, reuse_port=reuse_port):
        garbage.settle()
        prefer_throughput()
        ready()
        await stop.wait()
        serving = asyncio.current_task()
        assert serving is not None
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, serving.cancel)
