"""The application: its route table, and what its routes share while it runs."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack

from aiohttp import web
from modelbus_broker.connection import Bus
from modelbus_broker.publisher import Publisher
from modelbus_broker.registry import Registry
from modelbus_broker.storing import PublisherSettings

from . import adapter_routes, handlers
from .batches import routes as batch_routes
from .delivery import ClientWatch
from .edge import Traffic, edge
from .files import routes as file_routes
from .gateway import GATEWAY, Gateway
from .metrics import Metrics
from .settings import GatewaySettings
from .vector_stores import routes as vector_routes
from .vector_stores.upkeep import keep_up


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
    metrics = Metrics(lambda: traffic.running, settings.price_table())
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
            gateway = app[GATEWAY] = Gateway(settings, connection, registry, publisher, watch, metrics, traffic)
            stack.callback(gateway.files.close)
            gateway.vector_stores.indexer.start()
            stack.push_async_callback(gateway.vector_stores.indexer.close)
            gateway.batches.start()
            stack.push_async_callback(gateway.batches.close)
            upkeep = asyncio.create_task(keep_up(gateway.vector_stores, gateway.files), name="upkeep")
            stack.callback(upkeep.cancel)
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
        web.post("/v1/decisions", handlers.decisions),
        web.post("/v1/files", file_routes.upload),
        web.get("/v1/files", file_routes.list_files),
        web.get("/v1/files/{file_id}", file_routes.retrieve),
        web.get("/v1/files/{file_id}/content", file_routes.content),
        web.delete("/v1/files/{file_id}", file_routes.delete),
        web.post("/v1/batches", batch_routes.create),
        web.get("/v1/batches", batch_routes.list_batches),
        web.get("/v1/batches/{batch_id}", batch_routes.retrieve),
        web.post("/v1/batches/{batch_id}/cancel", batch_routes.cancel),
        web.post("/v1/vector_stores", vector_routes.create),
        web.get("/v1/vector_stores", vector_routes.list_stores),
        web.get("/v1/vector_stores/{store_id}", vector_routes.retrieve),
        web.post("/v1/vector_stores/{store_id}", vector_routes.update),
        web.delete("/v1/vector_stores/{store_id}", vector_routes.delete),
        web.post("/v1/vector_stores/{store_id}/search", vector_routes.search),
        web.post("/v1/vector_stores/{store_id}/files", vector_routes.attach),
        web.get("/v1/vector_stores/{store_id}/files", vector_routes.list_files),
        web.get("/v1/vector_stores/{store_id}/files/{file_id}", vector_routes.retrieve_file),
        web.post("/v1/vector_stores/{store_id}/files/{file_id}", vector_routes.update_file),
        web.delete("/v1/vector_stores/{store_id}/files/{file_id}", vector_routes.delete_file),
        web.get("/v1/vector_stores/{store_id}/files/{file_id}/content", vector_routes.file_content),
        web.post("/v1/vector_stores/{store_id}/file_batches", vector_routes.create_batch),
        web.get("/v1/vector_stores/{store_id}/file_batches/{batch_id}", vector_routes.retrieve_batch),
        web.post("/v1/vector_stores/{store_id}/file_batches/{batch_id}/cancel", vector_routes.cancel_batch),
        web.get("/v1/vector_stores/{store_id}/file_batches/{batch_id}/files", vector_routes.list_batch_files),
        web.post("/v1/vector_stores/{store_id}/chunks", vector_routes.upsert_chunks),
        web.post("/v1/vector_stores/{store_id}/chunks/delete", vector_routes.delete_chunks),
        web.get("/v1/models", handlers.models),
        web.get("/v1/models/{model:.+}", handlers.model),
        web.get("/health", handlers.health),
        web.get("/health/live", handlers.health),
        web.get("/health/ready", handlers.ready),
        web.get("/version", handlers.show_version),
        web.get("/metrics", handlers.metrics),
    ])  # fmt: skip
    if settings.allow_adapter_updates:
        app.add_routes([
            web.post("/v1/load_lora_adapter", adapter_routes.load_lora_adapter),
            web.post("/v1/unload_lora_adapter", adapter_routes.unload_lora_adapter),
        ])  # fmt: skip
    return app
