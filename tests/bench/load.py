"""The load generator: a process of its own that speaks HTTP/1.1 over raw sockets and costs as little as it can.

    python -m tests.bench.load JOB      (JOB: a LoadJob as JSON; prints a LoadResult as JSON)

Every server in the tables is driven by this same code, so its own cost is in all of them.
"""

from __future__ import annotations

import asyncio
import re
import resource
import sys
from pathlib import Path
from time import perf_counter  # uvloop's clock has steps of 1 ms
from typing import cast

import msgspec
import uvloop

_CONTENT = re.compile(rb'"content":\s?"[^"]')
_END_OF_CHUNKS = b"\r\n0\r\n\r\n"


class LoadJob(msgspec.Struct, frozen=True, kw_only=True):
    """What to send where. Each connection sends its next request when the answer to its last one is complete."""

    port: int
    body: str  #: path of a file with the JSON to post
    path: str = "/v1/chat/completions"
    host: str = "127.0.0.1"
    connections: int = 1
    seconds: float = 5.0  #: how long is measured
    warmup_s: float = 0.5  #: before it; the connections start spread over this time
    stream: bool = False
    once: bool = False  #: one request per connection, to its end, however long it takes
    numbered: bool = False  #: six zeros in the body become the number of the request
    requests: int = 0  #: so many in all, however long they take, and no warm-up


class LoadResult(msgspec.Struct, frozen=True, kw_only=True):
    """What came back while it was measured. Times in ms."""

    requests: int  #: complete and with status 200
    errors: int  #: other statuses, and connections that ended early
    requests_per_s: float
    p50_ms: float
    p99_ms: float
    frames: int = 0  #: server-sent events
    frames_per_s: float = 0.0
    first_p50_ms: float = 0.0  #: until the first token
    first_p99_ms: float = 0.0
    error: str = ""  #: the first one


class _Run:
    """What all connections share."""

    def __init__(self, job: LoadJob) -> None:
        body = Path(job.body).read_bytes()
        self.job = job
        self.request = (
            f"POST {job.path} HTTP/1.1\r\nHost: {job.host}:{job.port}\r\nContent-Type: application/json\r\n"
            f"Authorization: Bearer none\r\nContent-Length: {len(body)}\r\n\r\n"
        ).encode() + body
        self.loop = asyncio.get_running_loop()
        self.measuring = False
        self.sent = 0
        self.requests = self.errors = self.frames = self.ended = 0
        self.latencies: list[float] = []
        self.firsts: list[float] = []
        self.error = ""
        self.all_ended = asyncio.Event()

    def failed(self, why: str) -> None:
        self.errors += 1
        self.error = self.error or why

    def one_ended(self) -> None:
        self.ended += 1
        if self.ended == self.job.connections:
            self.all_ended.set()


class _Connection(asyncio.Protocol):
    """One keep-alive connection."""

    def __init__(self, run: _Run) -> None:
        self.run = run
        self.transport: asyncio.Transport | None = None
        self.buffer = b""
        self.sent = 0.0
        self.waiting_for_first = True
        self.in_body = False
        self.closing = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)  # uvloop's is no subclass

    def connection_lost(self, error: Exception | None) -> None:
        if not self.closing:
            self.run.failed(f"the connection ended: {error}")
            self.run.one_ended()

    def send(self) -> None:
        if self.transport is None or self.transport.is_closing():
            return
        if self.run.job.requests and self.run.sent >= self.run.job.requests:
            self.closing = True  # a server may end a connection that says nothing any more
            self.run.one_ended()
            return
        self.run.sent += 1
        self.buffer, self.in_body, self.waiting_for_first = b"", False, True
        self.sent = perf_counter()
        request = self.run.request
        if self.run.job.numbered:
            request = request.replace(b"000000", b"%06d" % self.run.sent)
        self.transport.write(request)

    def close(self) -> None:
        self.closing = True
        if self.transport is not None:
            self.transport.abort()

    def data_received(self, data: bytes) -> None:
        if self.in_body:
            self._events(data)
            return
        data = self.buffer + data if self.buffer else data
        end = data.find(b"\r\n\r\n")
        if end < 0:
            self.buffer = data
            return
        head = data[:end].lower()
        if data[9:12] != b"200":
            self.run.failed(data[:2000].decode(errors="replace"))
            self.close()
            self.run.one_ended()
            return
        at = head.find(b"content-length:")
        if at >= 0:
            length = int(head[at + 15 :].split(b"\r\n", 1)[0])
            if len(data) < end + 4 + length:
                self.buffer = data
                return
            self._complete()
        else:
            self.in_body = True
            # The four bytes stay before the body, so that an empty one ends like any other.
            self.buffer = b""
            self._events(data[end + 2 :])

    def _events(self, data: bytes) -> None:
        run = self.run
        # What a read cuts in two is seen whole in the next one: 7 bytes are kept, less than two events have.
        seen = self.buffer + data
        events = seen.count(b"data: {") - self.buffer.count(b"data: {")
        if run.measuring:
            run.frames += events
        if self.waiting_for_first and _CONTENT.search(seen):
            self.waiting_for_first = False
            if run.measuring:
                run.firsts.append(perf_counter() - self.sent)
        if seen.endswith(_END_OF_CHUNKS):
            self._complete()
        else:
            self.buffer = seen[-4096:] if self.waiting_for_first else seen[-7:]

    def _complete(self) -> None:
        run = self.run
        if run.measuring:
            run.requests += 1
            run.latencies.append(perf_counter() - self.sent)
        if run.job.once:
            run.one_ended()
        else:
            self.send()


async def load(job: LoadJob) -> LoadResult:
    """Runs the job.

    Raises:
        ConnectionError: nothing listens there.
    """
    run = _Run(job)
    connections = []
    for _ in range(job.connections):
        _, connection = await run.loop.create_connection(lambda: _Connection(run), job.host, job.port)
        connections.append(connection)
    began = run.loop.time()
    run.measuring = counted = job.once or bool(job.requests)
    for number, connection in enumerate(connections):
        run.loop.call_at(began + job.warmup_s * 0.9 * number / job.connections, connection.send)
    if counted:
        async with asyncio.timeout(None if job.requests else job.seconds + 60):
            await run.all_ended.wait()
        measured = run.loop.time() - began
    else:
        await asyncio.sleep(job.warmup_s)
        run.measuring, began = True, run.loop.time()
        await asyncio.sleep(job.seconds)
        run.measuring, measured = False, run.loop.time() - began
    for connection in connections:
        connection.close()
    return LoadResult(
        requests=run.requests,
        errors=run.errors,
        requests_per_s=run.requests / measured,
        p50_ms=_percentile(run.latencies, 0.50),
        p99_ms=_percentile(run.latencies, 0.99),
        frames=run.frames,
        frames_per_s=run.frames / measured,
        first_p50_ms=_percentile(run.firsts, 0.50),
        first_p99_ms=_percentile(run.firsts, 0.99),
        error=run.error,
    )


def _percentile(seconds: list[float], share: float) -> float:
    return sorted(seconds)[int(share * (len(seconds) - 1))] * 1000 if seconds else 0.0


def main() -> None:
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    job = msgspec.json.decode(sys.argv[1], type=LoadJob)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        print(msgspec.json.encode(runner.run(load(job))).decode())


if __name__ == "__main__":
    main()
