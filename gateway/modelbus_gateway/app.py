"""The application: its route table, and what its routes share while it runs."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack

from aiohttp import web
from modelbus_broker.connection import Bus
from modelbus_broker.publisher import Publisher
from modelbus_broker.registry import Registry
from modelbus_broker.storing import PublisherSettings

from . import handlers
from .delivery import ClientWatch
from .edge import Traffic, edge
from .handlers import GATEWAY, Gateway
from .metrics import Metrics
from .settings import GatewaySettings


def create_app(
    settings: GatewaySettings, bus: Bus | None = None, *, publishing: PublisherSettings | None = None
) -> web.Application:
    """The gateway as an aiohttp application.

    Serve it with ``handler_cancellation=True``: that is how a client that hangs up cancels its request.

    Args:
        settings: see there.
        bus: a connection to use, which stays open when the app ends; None connects by the settings at startup.
        publishing: guarantees to switch off in a measurement.

    Raises:
        BusUnavailable, AuthenticationFailed: at startup, when the bus cannot be reached or knows no streams.
    """
    traffic = Traffic()
    metrics = Metrics(lambda: traffic.running)
    app = web.Application(middlewares=[edge(settings, metrics, traffic)], client_max_size=settings.max_body_bytes)

    async def lifetime(app: web.Application) -> AsyncIterator[None]:
        async with AsyncExitStack() as stack:
            connection = bus
            if connection is None:
                connection = await stack.enter_async_context(await Bus.connect(settings.bus, name="gateway"))
            registry = Registry(connection)
            stack.push_async_callback(registry.close)
            await registry.start()
            guarantees = publishing or PublisherSettings(orphan_grace_s=settings.orphan_grace_s)
            publisher = Publisher(connection, registry, kind="gateway", settings=guarantees)
            stack.push_async_callback(publisher.close)
            publisher.aborts.observe = metrics.aborted
            await publisher.start()
            watch = ClientWatch(
                keep_alive_comment_s=settings.keep_alive_comment_s,
                client_stall_s=settings.client_stall_s,
                headers_after_s=settings.headers_after_s,
            )
            stack.push_async_callback(watch.close)
            await watch.start()
            app[GATEWAY] = Gateway(settings, connection, registry, publisher, watch, metrics, traffic)
            yield

    app.cleanup_ctx.append(lifetime)
    app.add_routes([
        web.post("/v1/chat/completions", handlers.chat_completions),
        web.post("/v1/completions", handlers.completions),
        web.get("/v1/chat/completions/{id}/stream", handlers.chat_stream),
        web.get("/v1/completions/{id}/stream", handlers.completion_stream),
        web.post("/v1/embeddings", handlers.embeddings),
        web.post("/v1/rerank", handlers.rerank),
        web.post("/v1/score", handlers.score),
        web.post("/v1/classify", handlers.classify),
        web.get("/v1/models", handlers.models),
        web.get("/v1/models/{model:.+}", handlers.model),
        web.get("/health", handlers.health),
        web.get("/health/live", handlers.health),
        web.get("/health/ready", handlers.ready),
        web.get("/version", handlers.show_version),
        web.get("/metrics", handlers.metrics),
    ])  # fmt: skip
    return app
