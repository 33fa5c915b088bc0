"""What a client notices of a lost worker, and how soon an engine notices that its client has gone."""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import aiohttp
from modelbus_broker import names
from modelbus_broker.connection import Msg
from modelbus_broker.messages import Frame, Started, UsageEvent, decode_frames, decode_usage_events

from .plan import Line, Plan
from .stand import QUESTION, Stand

STREAMS = 8
CANCELS = 300


class Watch:
    """What passes on the bus: which worker runs what, and how runs end."""

    def __init__(self) -> None:
        self.worker_of: dict[str, str] = {}  #: by request id
        self.started: asyncio.Queue[str] = asyncio.Queue()  #: ids
        self.ended: asyncio.Queue[UsageEvent] = asyncio.Queue()

    def frames(self, msg: Msg) -> None:
        frames: list[Frame] = decode_frames(msg.data)
        for frame in frames:
            self.worker_of[frame.id] = names.parse_run(frame.run)[2]
            if isinstance(frame, Started):
                self.started.put_nowait(frame.id)

    def usage(self, msg: Msg) -> None:
        for event in decode_usage_events(msg.data):
            self.ended.put_nowait(event)


@asynccontextmanager
async def watching(stand: Stand) -> AsyncIterator[Watch]:
    watch = Watch()
    subscriptions = [
        await stand.bus.subscribe(names.response_subject("*", "*"), watch.frames),
        await stand.bus.subscribe(names.USAGE, watch.usage),
    ]
    await stand.bus.flush()
    try:
        yield watch
    finally:
        for subscription in subscriptions:
            await subscription.unsubscribe()


class _Reader:
    """One stream: when its tokens came."""

    def __init__(self) -> None:
        self.id = ""
        self.times: list[float] = []

    async def read(self, session: aiohttp.ClientSession, url: str, model: str) -> None:
        async with session.post(url, json=_body(model, stream=True)) as response:
            self.id = response.headers["x-request-id"]
            async for data in response.content.iter_any():
                if b'"content":"' in data:
                    self.times.append(time.perf_counter())
                ended = data.endswith(b"[DONE]\n\n")
        if not ended:
            raise RuntimeError(f"the stream {self.id} was cut")


async def failover(stand: Stand, plan: Plan) -> list[Line]:
    """A worker is killed in the middle of 8 streams, with another one idle: the gap that their readers see."""
    await stand.model("steady")
    await stand.another_worker("steady")
    url = f"http://127.0.0.1:{await stand.gateway()}/v1/chat/completions"
    gaps: list[float] = []
    async with watching(stand) as watch, aiohttp.ClientSession() as session:
        for _ in range(plan.rounds):
            readers = [_Reader() for _ in range(STREAMS)]
            async with asyncio.TaskGroup() as group:
                for reader in readers:
                    group.create_task(reader.read(session, url, "steady"))
                while any(len(reader.times) < 20 for reader in readers):
                    await asyncio.sleep(0.02)
                victim = watch.worker_of[readers[0].id]
                lost = [reader for reader in readers if watch.worker_of[reader.id] == victim]
                await asyncio.to_thread(stand.kill_worker, "steady", victim)
                killed = time.perf_counter()
            for reader in lost:
                last = max(at for at in reader.times if at <= killed)
                gaps.append(min(at for at in reader.times if at > killed) - last)
            await stand.another_worker("steady")
    return [
        Line(
            what=f"worker killed in mid-stream, {len(gaps)} streams: gap between two tokens",
            modelbus=f"p50 {statistics.median(gaps):.2f} s, longest {max(gaps):.2f} s",
            other="",
            result=f"{max(gaps):.2f} s",
            goal="2 s or less",
            met=max(gaps) <= 2.0,
        )
    ]


async def cancel(stand: Stand, plan: Plan) -> list[Line]:
    """Clients of running requests hang up, of streams and plain ones in turn: until the engine has let go."""
    await stand.model("endless")
    url = f"http://127.0.0.1:{await stand.gateway()}/v1/chat/completions"
    took: list[float] = []
    async with watching(stand) as watch, aiohttp.ClientSession() as session:
        for number in range(CANCELS):
            client = asyncio.create_task(_hold(session, url, stream=number % 2 > 0))
            async with asyncio.timeout(30):
                id = await watch.started.get()
                await asyncio.sleep(0.01 * (number % 5))  # at any moment of the run
                began_ms = time.time_ns() / 1e6
                client.cancel()  # aiohttp closes the connection
                while (event := await watch.ended.get()).id != id:
                    pass
            if event.outcome != "cancelled":
                raise RuntimeError(f"{id} ended as {event.outcome}")
            took.append(event.at_ms - began_ms)
            await asyncio.gather(client, return_exceptions=True)
    p50, p99 = statistics.median(took), sorted(took)[int(0.99 * (len(took) - 1))]
    return [
        Line(
            what=f"{CANCELS} clients hang up: until the engine has let go",
            modelbus=f"p50 {p50:.0f} ms, p99 {p99:.0f} ms",
            other="",
            result=f"{p99:.0f} ms",
            goal="p99 500 ms or less",
            met=p99 <= 500,
        )
    ]


async def _hold(session: aiohttp.ClientSession, url: str, *, stream: bool) -> None:
    async with session.post(url, json=_body("endless", stream=stream)) as response:
        async for _ in response.content.iter_any():
            pass


def _body(model: str, *, stream: bool) -> dict[str, object]:
    return {"model": model, "messages": [{"role": "user", "content": QUESTION}], "stream": stream}
