"""The floor: an aiohttp server that does nothing but answer with given bytes. It is the mock upstream as well.

python -m tests.bench.bare ANSWERS      (ANSWERS: an Answers as JSON; prints its port when it is ready)
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import sys

import msgspec
import uvloop
from aiohttp import web


class Answers(msgspec.Struct, frozen=True, kw_only=True):
    """What the gateway under test answered, to be answered again. Bytes are base64."""

    plain: str
    first_event: str = ""
    event: str = ""  #: of each token
    last_events: str = ""
    tokens: int = 100
    interval_ms: float = 20.0


def create_app(answers: Answers) -> web.Application:
    plain, first, event, last = (
        base64.b64decode(part) for part in (answers.plain, answers.first_event, answers.event, answers.last_events)
    )
    interval_s = answers.interval_ms / 1000

    async def chat(request: web.Request) -> web.StreamResponse:
        body = await request.read()
        # Looking for the bytes is not decoding: the floor knows nothing of requests. A small one may ask for a stream.
        if len(body) < 1000 and b'"stream":true' in body.replace(b" ", b""):
            with contextlib.suppress(ConnectionResetError):
                return await stream(request)
        return web.Response(body=plain, content_type="application/json")

    async def stream(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        response.enable_chunked_encoding()
        await response.prepare(request)
        await response.write(first + event)
        now = asyncio.get_running_loop().time
        at = now()
        for _ in range(answers.tokens - 1):
            at += interval_s
            await asyncio.sleep(max(0.0, at - now()))
            await response.write(event)
        await response.write(last)
        return response

    async def models(_: web.Request) -> web.Response:
        return web.json_response({"object": "list", "data": [{"id": "chat", "object": "model", "owned_by": "bench"}]})

    app = web.Application(client_max_size=64 << 20)
    app.router.add_post("/v1/chat/completions", chat)
    app.router.add_get("/v1/models", models)
    return app


async def serve(answers: Answers) -> None:
    runner = web.AppRunner(create_app(answers), access_log=None, handler_cancellation=True)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0, backlog=2048)
    await site.start()
    print(runner.addresses[0][1], flush=True)
    await asyncio.Event().wait()


def main() -> None:
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(serve(msgspec.json.decode(sys.argv[1], type=Answers)))


if __name__ == "__main__":
    main()
