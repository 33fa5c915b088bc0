"""A proxy in front of a real Elasticsearch that speaks TLS if it shall, notes what is sent, and fails on command."""

from __future__ import annotations

import json
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
from aiohttp import web

_HOP_BY_HOP = {"host", "content-length", "transfer-encoding", "connection", "content-encoding", "accept-encoding"}


class FaultyElastic:
    """Passes everything on, but for what the fields say."""

    def __init__(self, server: str) -> None:
        self.server = server
        self.url = ""
        self.headers: list[dict[str, str]] = []  #: of every request
        self.busy = 0  #: so many of the next requests are answered with 429
        #: So many of the next bulk requests are stored but for their even documents, whose status is this:
        self.halved, self.status = 0, 429
        self.cut = 0  #: so many of the next bulk requests are stored, and their answers lost

    async def handle(self, request: web.Request) -> web.StreamResponse:
        self.headers.append({name.lower(): value for name, value in request.headers.items()})
        body = await request.read()
        if self.busy:
            self.busy -= 1
            return web.json_response({"error": {"type": "es_rejected_execution_exception", "reason": "full"}}, status=429, headers=_PRODUCT)  # fmt: skip
        if request.path.endswith("/_bulk") and self.halved:
            self.halved -= 1
            return await self._half(request, body)
        status, headers, answer = await self._pass_on(request, body)
        if request.path.endswith("/_bulk") and self.cut:
            self.cut -= 1
            assert request.transport is not None
            request.transport.abort()
        return web.Response(status=status, headers=headers, body=answer)

    async def _half(self, request: web.Request, body: bytes) -> web.Response:
        """Each action has a line and its document another."""
        lines = body.splitlines(keepends=True)
        pairs = [lines[n : n + 2] for n in range(0, len(lines), 2)]
        status, headers, answer = await self._pass_on(request, b"".join(b"".join(pair) for pair in pairs[1::2]))
        stored = iter(json.loads(answer)["items"])
        items: list[Any] = []
        for number, pair in enumerate(pairs):
            refused = {"type": "es_rejected_execution_exception", "reason": "rejected execution of a part"}
            id_ = json.loads(pair[0])["index"]["_id"]
            items.append(
                next(stored) if number % 2 else {"index": {"_id": id_, "status": self.status, "error": refused}}
            )
        return web.json_response({"took": 1, "errors": True, "items": items}, status=status, headers=_PRODUCT)

    async def _pass_on(self, request: web.Request, body: bytes) -> tuple[int, dict[str, str], bytes]:
        headers = {
            name: value
            for name, value in request.headers.items()
            if name.lower() not in _HOP_BY_HOP | {"authorization"}
        }
        async with (
            aiohttp.ClientSession() as session,
            session.request(request.method, f"{self.server}{request.path_qs}", data=body, headers=headers) as answered,
        ):
            kept = {name: value for name, value in answered.headers.items() if name.lower() not in _HOP_BY_HOP}
            return answered.status, kept, await answered.read()


#: By this the client knows that it speaks to Elasticsearch.
_PRODUCT = {"X-Elastic-Product": "Elasticsearch"}


@asynccontextmanager
async def faulty_elastic(server: str, certificate: Path | None = None) -> AsyncIterator[FaultyElastic]:
    """
    Args:
        certificate: PEM file with its key; None: plain HTTP.
    """
    proxy = FaultyElastic(server)
    application = web.Application(client_max_size=64 << 20)
    application.router.add_route("*", "/{path:.*}", proxy.handle)
    runner = web.AppRunner(application)
    await runner.setup()
    context = None
    if certificate is not None:
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        context.load_cert_chain(certificate)
    site = web.TCPSite(runner, "127.0.0.1", 0, ssl_context=context)
    await site.start()
    assert site._server is not None
    port = site._server.sockets[0].getsockname()[1]  # type: ignore[attr-defined]
    proxy.url = f"{'http' if context is None else 'https'}://127.0.0.1:{port}"
    try:
        yield proxy
    finally:
        await runner.cleanup()
