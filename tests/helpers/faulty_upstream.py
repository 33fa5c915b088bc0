"""A provider of raw sockets that speaks the OpenAI protocol, and breaks it on command in every way we know."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, Literal

Fault = Literal[
    "none", "connection refused", "429 with Retry-After", "500", "503", "slow first byte", "silent after headers",
    "cut before the first token", "silent mid-stream", "cut mid-stream", "malformed chunk", "garbage JSON",
    "wrong content type", "empty answer", "no finish_reason", "duplicate done", "large chunk", "huge chunk",
    "truncated UTF-8", "never-ending stream", "error event mid-stream",
]  # fmt: skip

#: What it answers when nothing is wrong, and what of it comes before a fault in the middle.
ANSWER = "one zwölf 三 four"
HALF = "one zwölf"
#: A chunk that is larger than a message on the bus, and good.
LARGE = "a book " * 1_300_000
_WORDS = {
    "429 with Retry-After": "slow down, please",
    "500": "out of memory",
    "503": "overloaded",
    "error event mid-stream": "the GPU fell off the bus",
}


class FaultyUpstream:
    """One provider. ``fault`` says what happens to the next requests; ``asked`` counts those for an answer."""

    def __init__(self) -> None:
        self.fault: Fault = "none"
        self.asked = 0
        self.port = 0
        self._server: asyncio.Server | None = None
        self._connections: set[asyncio.StreamWriter] = set()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    async def breaks(self, fault: Fault) -> None:
        """Has this fault from now on."""
        self.fault, self.asked = fault, 0
        if fault == "connection refused":
            await self.close()
        elif self._server is None:
            await self.open()

    async def open(self) -> None:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", self.port)
        self.port = self._server.sockets[0].getsockname()[1]

    async def close(self) -> None:
        if self._server is not None:
            self._server.close()
            self._server = None
        for connection in list(self._connections):
            connection.transport.abort()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._connections.add(writer)
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                length = next((int(h[15:]) for h in head.lower().split(b"\r\n") if h.startswith(b"content-length:")), 0)
                await reader.readexactly(length)
                if head.startswith(b"GET"):
                    _send(writer, "200 OK", {"data": [{"id": "m"}]})
                    continue
                self.asked += 1
                await self._answer(reader, writer)
                await writer.drain()
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            self._connections.discard(writer)
            writer.close()

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        match self.fault:
            case "429 with Retry-After":
                _send(writer, "429 Too Many Requests", _error(self.fault), "Retry-After: 1")
            case "500":
                _send(writer, "500 Internal Server Error", _error(self.fault))
            case "503":
                _send(writer, "503 Service Unavailable", _error(self.fault))
            case "slow first byte":
                await reader.read()  # nothing more, until the client has had enough
            case "wrong content type":
                _send(writer, "200 OK", "<html>Welcome to the router</html>", kind="text/html")
            case "empty answer":
                _send(writer, "200 OK", "", kind="text/event-stream")
            case _:
                await self._stream(reader, writer)

    async def _stream(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n")
        match self.fault:
            case "silent after headers":
                await reader.read()  # nothing more, until the client has had enough
            case "cut before the first token":
                _cut(writer)
            case "large chunk":
                _event(writer, _chunk(LARGE))
                _end(writer, _chunk(finish="stop"))
                return
            case "huge chunk":
                _http_chunk(writer, b'data: {"choices":[{"index":0,"delta":{"content":"')
                for _ in range(20):
                    _http_chunk(writer, b"x" * (1 << 20))
                    await writer.drain()
                _http_chunk(writer, b'"}}]}\n\n')
                _end(writer, _chunk(finish="stop"))
                return
        for word in ("one", " zwölf"):
            _event(writer, _chunk(word))
            await writer.drain()
        await asyncio.sleep(0.02)
        match self.fault:
            case "silent mid-stream":
                await reader.read()  # nothing more, until the client has had enough
            case "cut mid-stream":
                _cut(writer)
            case "malformed chunk":
                writer.write(b"zzz\r\nnot a chunk")
                await writer.drain()
                await reader.read()  # nothing more, until the client has had enough
            case "garbage JSON":
                _event(writer, b'{"choices": [{"index": 0, "delta": {"content": ')
                _end(writer, _chunk(finish="stop"))
            case "no finish_reason":
                _end(writer)
            case "truncated UTF-8":
                _http_chunk(writer, b'data: {"choices":[{"index":0,"delta":{"content":" \xe4\xb8')
                writer.write(b"0\r\n\r\n")
            case "never-ending stream":
                for _ in range(100_000):
                    _event(writer, _chunk(" and"))
                    await writer.drain()
            case "error event mid-stream":
                _event(writer, json.dumps(_error(self.fault)).encode())
                writer.write(b"0\r\n\r\n")
            case "duplicate done":
                _event(writer, _chunk(ANSWER.removeprefix(HALF)))
                _event(writer, _chunk(finish="stop"))
                _event(writer, b"[DONE]")
                _end(writer, _chunk(finish="stop"))
            case _:
                _event(writer, _chunk(ANSWER.removeprefix(HALF)))
                _end(writer, _chunk(finish="stop"))


@asynccontextmanager
async def faulty_upstream() -> AsyncIterator[FaultyUpstream]:
    """One that answers well until told otherwise."""
    upstream = FaultyUpstream()
    await upstream.open()
    try:
        yield upstream
    finally:
        await upstream.close()


def _send(writer: asyncio.StreamWriter, status: str, body: Any, *headers: str, kind: str = "application/json") -> None:
    data = body.encode() if isinstance(body, str) else json.dumps(body).encode()
    head = [f"HTTP/1.1 {status}", f"Content-Type: {kind}", f"Content-Length: {len(data)}", *headers]
    writer.write("\r\n".join(head).encode() + b"\r\n\r\n" + data)


def _error(fault: str) -> dict[str, Any]:
    return {"error": {"message": _WORDS[fault], "type": "server_error"}}


def _chunk(text: str = "", finish: str | None = None) -> bytes:
    choice = {"index": 0, "delta": {"content": text}, "finish_reason": finish}
    return json.dumps({"object": "chat.completion.chunk", "choices": [choice]}, ensure_ascii=False).encode()


def _event(writer: asyncio.StreamWriter, document: bytes) -> None:
    _http_chunk(writer, b"data: " + document + b"\n\n")


def _end(writer: asyncio.StreamWriter, *documents: bytes) -> None:
    for document in (*documents, b"[DONE]"):
        _event(writer, document)
    writer.write(b"0\r\n\r\n")


def _http_chunk(writer: asyncio.StreamWriter, data: bytes) -> None:
    writer.write(b"%x\r\n%b\r\n" % (len(data), data))


def _cut(writer: asyncio.StreamWriter) -> None:
    writer.close()
    raise ConnectionResetError
