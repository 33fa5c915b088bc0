"""Writing to clients, of whom some are slow and some have gone to sleep.

``write`` waits until the client's socket takes the bytes, and so holds up nothing but its own request. One watch
per gateway, and not a timer per write, looks after all of them once a second: it sends a comment on a stream
that has been silent, so that proxies do not cut it, and cuts a client that has taken nothing for too long.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping

from aiohttp import ClientConnectionResetError, web
from aiohttp.helpers import rfc822_formatted_time
from aiohttp.http import SERVER_SOFTWARE, HttpVersion11

from .events import KEEP_ALIVE

EVENT_STREAM = "text/event-stream; charset=utf-8"
#: A plain body above this size is delivered under the watch too.
LARGE_BODY = 256 * 1024
#: With so many bytes waiting in a client's socket its stream waits; aiohttp's own limit is the same.
ROOM_BYTES = 64 * 1024


class Delivery:
    """A response whose body goes out piece by piece. Its headers go out with the first piece, or before: ``begin``."""

    def __init__(self, request: web.Request, response: web.StreamResponse, watch: ClientWatch, *, events: bool) -> None:
        self.response = response
        self.comments = events  #: silence is filled with comments
        self.made_at = self.quiet_since = time.monotonic()
        self.over = False  #: nothing may be written any more
        self.writing_since = 0.0  #: 0: no write is waiting
        self.waiting_bytes = -1  #: in the socket's buffer, when the watch looked last
        self.wrote = False  #: something was written since the watch looked last
        self._request = request
        self._watch = watch
        self._lock = asyncio.Lock()

    def __enter__(self) -> Delivery:
        self._watch.open.add(self)
        return self

    def __exit__(self, *_: object) -> None:
        self.over = True
        self._watch.open.discard(self)

    @property
    def begun(self) -> bool:
        """The status and the headers are out."""
        return self.response.prepared

    @property
    def transport(self) -> asyncio.WriteTransport | None:
        return self._request.transport

    async def begin(self) -> None:
        """Sends the status and the headers now: no other answer is possible any more.

        Raises:
            ConnectionError: the client is gone.
        """
        async with self._lock:
            if not self.response.prepared and not self.over:
                await self.response.prepare(self._request)

    async def write(self, data: bytes) -> None:
        """Returns when the client's socket has room again.

        Raises:
            ConnectionError: the client is gone.
        """
        async with self._lock:
            self.writing_since = time.monotonic()
            try:
                if not self.response.prepared:
                    await self.response.prepare(self._request)
                await self.response.write(data)
            finally:
                self.writing_since, self.waiting_bytes = 0.0, -1
                self.quiet_since = time.monotonic()

    @property
    def takes_more(self) -> bool:
        """The headers are out and pieces can follow by :meth:`write_now`."""
        return self.response.prepared and self._request.version == HttpVersion11

    def write_now(self, data: bytes) -> bool:
        """Writes without waiting, after the first :meth:`write`; False when :meth:`room` should be waited for."""
        transport = self.transport
        if transport is None:
            return False
        transport.write(b"%x\r\n%b\r\n" % (len(data), data))  # a chunk of HTTP/1.1
        self.wrote = True
        return transport.get_write_buffer_size() < ROOM_BYTES

    async def room(self) -> None:
        """Returns when the client's socket has room again.

        Raises:
            ConnectionError: the client is gone.
        """
        async with self._lock:
            self.writing_since = time.monotonic()
            try:
                if self.transport is None:
                    raise ClientConnectionResetError("the client is gone")
                await self._request.writer.drain()
            finally:
                self.writing_since, self.waiting_bytes = 0.0, -1
                self.quiet_since = time.monotonic()

    async def end(self) -> web.StreamResponse:
        """Ends the body; waits for the client to take the rest."""
        self.comments = False
        async with self._lock:
            self.writing_since = time.monotonic()
            try:
                if not self.response.prepared:
                    await self.response.prepare(self._request)
                await self.response.write_eof()
            finally:
                self.writing_since = 0.0
        return self.response


class _Sent(web.StreamResponse):
    """Stands for a response that is out already: there is nothing that aiohttp should do, and nothing that differs."""

    _status = 200
    _keep_alive = True
    _eof_sent = True

    def __init__(self) -> None:  # the empty state of a response that is still to be sent has no use here
        pass


_SENT = _Sent()


def _send_json(request: web.Request, body: bytes, headers: Mapping[str, str]) -> web.StreamResponse:
    """Sends a small JSON body whose head and body go out in one write, put together by hand.

    aiohttp makes a dictionary of the headers and a text of the dictionary for every response; this was a third of
    what a plain answer costs at this end.
    """
    transport = request.transport
    if transport is None:
        raise ClientConnectionResetError("the client is gone")
    more = "".join([f"{name}: {value}\r\n" for name, value in headers.items()])
    head = (
        f"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n{more}Content-Length: {len(body)}\r\n"
        f"Date: {rfc822_formatted_time()}\r\nServer: {SERVER_SOFTWARE}\r\n\r\n"
    )
    transport.write(head.encode() + body)
    return _SENT


class ClientWatch:
    """Looks after the open deliveries of one gateway."""

    def __init__(
        self, *, keep_alive_comment_s: float, client_stall_s: float, headers_after_s: float = float("inf")
    ) -> None:
        self.open: set[Delivery] = set()
        self.stalled = 0  #: clients cut so far
        self._comment_s, self._stall_s = keep_alive_comment_s, client_stall_s
        self._headers_s = headers_after_s
        self._task: asyncio.Task[None] | None = None

    def event_stream(self, request: web.Request, headers: Mapping[str, str]) -> Delivery:
        # Buffering proxies (nginx) would hold back events without the last header.
        response = web.StreamResponse(
            headers={"Content-Type": EVENT_STREAM, "Cache-Control": "no-cache", "X-Accel-Buffering": "no", **headers}
        )
        return Delivery(request, response, self, events=True)

    async def deliver(self, request: web.Request, body: bytes, headers: Mapping[str, str]) -> web.StreamResponse:
        """Answers with a JSON body; a large one is watched."""
        if len(body) <= LARGE_BODY:
            if request.version == HttpVersion11 and request.keep_alive and request.method == "POST":
                return _send_json(request, body, headers)
            return web.Response(body=body, content_type="application/json", headers=headers)
        response = web.StreamResponse(headers={"Content-Type": "application/json", **headers})
        response.content_length = len(body)
        with Delivery(request, response, self, events=False) as delivery:
            view = memoryview(body)
            for start in range(0, len(body), LARGE_BODY):
                await delivery.write(bytes(view[start : start + LARGE_BODY]))
            return await delivery.end()

    async def start(self) -> None:
        self._task = asyncio.create_task(self._run(), name="client watch")

    async def close(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def _run(self) -> None:
        interval = min(1.0, self._comment_s / 2, self._stall_s / 4, max(0.05, self._headers_s / 2))
        writing: set[asyncio.Task[None]] = set()
        while True:
            await asyncio.sleep(interval)
            now = time.monotonic()
            for delivery in tuple(self.open):
                if delivery.wrote:
                    delivery.wrote, delivery.quiet_since = False, now
                if delivery.writing_since:
                    self._check_progress(delivery, now)
                    continue
                if not delivery.comments:
                    continue
                if now - delivery.quiet_since >= self._comment_s:
                    task = asyncio.create_task(_comment(delivery), name="keep-alive comment")
                elif not delivery.begun and now - delivery.made_at >= self._headers_s:
                    task = asyncio.create_task(_begin(delivery), name="headers")
                else:
                    continue
                writing.add(task)
                task.add_done_callback(writing.discard)

    def _check_progress(self, delivery: Delivery, now: float) -> None:
        transport = delivery.transport
        if transport is None:
            return  # gone: its write fails by itself
        waiting = transport.get_write_buffer_size()
        if waiting != delivery.waiting_bytes:
            delivery.waiting_bytes = waiting
            delivery.writing_since = now
        elif now - delivery.writing_since >= self._stall_s:
            self.stalled += 1
            transport.abort()


async def _comment(delivery: Delivery) -> None:
    try:
        if not delivery.over:  # an error may have been answered since
            await delivery.write(KEEP_ALIVE)
    except (ConnectionError, RuntimeError):
        pass  # the client went; its own task hears of it


async def _begin(delivery: Delivery) -> None:
    try:
        await delivery.begin()
    except (ConnectionError, RuntimeError):
        pass  # the client went; its own task hears of it
