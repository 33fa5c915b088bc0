"""A small provider that does on command what real ones do on bad days."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

from aiohttp import web

Handler = Callable[[web.Request, int], Awaitable[web.StreamResponse]]


class Provider:
    """Answers POSTs with ``script(request, number of the request)`` and remembers what it was sent."""

    def __init__(self) -> None:
        self.url = ""
        self.script: Handler = lambda request, number: say(request, "fine")
        self.bodies: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.paths: list[str] = []
        self.connections: set[object] = set()
        #: Streams whose client went away.
        self.left = 0
        self.models: web.Response | None = None

    async def post(self, request: web.Request) -> web.StreamResponse:
        self.bodies.append(await request.json())
        self.headers.append(dict(request.headers))
        self.paths.append(request.path_qs)
        self.connections.add(request.transport)
        try:
            return await self.script(request, len(self.bodies))
        except (ConnectionError, asyncio.CancelledError):
            self.left += 1
            raise

    async def get(self, request: web.Request) -> web.StreamResponse:
        return self.models or web.json_response({"object": "list", "data": [{"id": "m", "max_model_len": 4096}]})


@asynccontextmanager
async def running_provider() -> AsyncIterator[Provider]:
    provider = Provider()
    app = web.Application()
    app.router.add_post("/{path:.*}", provider.post)
    app.router.add_get("/v1/models", provider.get)
    runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0.1)
    await runner.setup()
    try:
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        provider.url = f"http://127.0.0.1:{runner.addresses[0][1]}/v1"
        yield provider
    finally:
        await runner.cleanup()


def chunk(text: str = "", finish: str | None = None, **choice: Any) -> dict[str, Any]:
    return {
        "object": "chat.completion.chunk",
        "model": "m-1",
        "choices": [{"index": 0, "delta": {"content": text}, "finish_reason": finish} | choice],
    }


USAGE: dict[str, Any] = {"choices": [], "usage": {"prompt_tokens": 7, "completion_tokens": 2, "total_tokens": 9}}


async def stream(
    request: web.Request, *events: Any, kind: str = "text/event-stream", cut: bool = False
) -> web.Response:
    """Sends events: dicts as JSON, bytes as they are, numbers as pauses in seconds."""
    response = web.StreamResponse(headers={"Content-Type": kind})
    await response.prepare(request)
    for event in events:
        match event:
            case float() | int():
                await asyncio.sleep(event)
            case bytes():
                await response.write(event)
            case _:
                await response.write(b"data: " + json.dumps(event).encode() + b"\n\n")
    if cut:
        assert request.transport is not None
        request.transport.abort()
        await asyncio.sleep(0)
    else:
        await response.write_eof()
    return response  # type: ignore[return-value]


async def say(request: web.Request, *texts: str) -> web.Response:
    return await stream(request, *map(chunk, texts), chunk(finish="stop"), USAGE, b"data: [DONE]\n\n")
