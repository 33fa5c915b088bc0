"""Cancelling a request by its id, from any process.

The id names the publisher, which is told: whoever waits there gets ``request_cancelled``. A publisher that is gone, or
no longer knows the id, is done without: all workers are told to stop and to remember the id, and its messages are
taken out of the queues.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

import msgspec

from . import names
from .connection import Bus, JetStreamError, Msg, NoResponders
from .errors import InvalidRequest
from .messages import Cancel, Cancelled, Stop, decode_cancelled, encode
from .reading import read_stream
from .storing import remove_message

#: A publisher takes the message back, which may take its time, and waits for the engine to let go.
PUBLISHER_S = 8.0
#: The worker that has a request says so at once, ...
WORKER_S = 0.5
#: ... and says it again when the engine has let go.
LET_GO_S = 2.5
#: A message is looked for among those that are not older than its id; clocks may differ by so much.
CLOCKS_MS = 600_000
#: Where requests wait.
_QUEUES = ((names.STREAM_RE, "mb.re.*.*"), (names.STREAM_HI, "mb.req.*.hi.*"), (names.STREAM_LO, "mb.req.*.lo.*"))


async def cancel(bus: Bus, request_id: str) -> Cancelled:
    """Cancels a request, whoever published it, and says what had become of it until then.

    "unknown" is a request that has ended, or of which nobody has ever heard.

    Raises:
        InvalidRequest: the text is no request id.
        BusUnavailable: the bus does not answer.
    """
    try:
        publisher = names.publisher_of(request_id)
        started_ms = names.started_ms_of(request_id)
    except ValueError as error:
        raise InvalidRequest(f"{request_id!r} is not a request id: it has the form PUBLISHER-TIME-RANDOM") from error
    with contextlib.suppress(NoResponders, TimeoutError, msgspec.MsgspecError):
        told = encode(Cancel(id=request_id))
        msg = await bus.request(names.control_subject(publisher), told, timeout_s=PUBLISHER_S)
        answer = decode_cancelled(msg.data)
        if answer.was != "unknown":
            return answer
    return await _without_publisher(bus, request_id, started_ms)


async def _without_publisher(bus: Bus, request_id: str, started_ms: int) -> Cancelled:
    async with _worker_of(bus, request_id) as (heard, stopped):
        # In this order: what is pulled from now on is known to be unwanted, the rest is still in its queue.
        queued = await _remove_messages(bus, request_id, started_ms)
        answer = await _first(heard, WORKER_S)
        if answer is not None:
            return await _first(stopped, LET_GO_S) or answer
        return Cancelled(id=request_id, was="queued" if queued else "unknown", stopped=queued)


@contextlib.asynccontextmanager
async def _worker_of(
    bus: Bus, request_id: str
) -> AsyncIterator[tuple[asyncio.Future[Cancelled], asyncio.Future[Cancelled]]]:
    """Tells all workers to stop. The futures: what the one that has it says at once, and when its engine has let go."""
    loop = asyncio.get_running_loop()
    heard: asyncio.Future[Cancelled] = loop.create_future()
    stopped: asyncio.Future[Cancelled] = loop.create_future()

    def take(msg: Msg) -> None:
        if msg.status:
            return  # there are no workers
        answer = decode_cancelled(msg.data)
        for future in (heard, stopped) if answer.stopped else (heard,):
            if not future.done():
                future.set_result(answer)

    inbox = bus.new_inbox()
    subscription = await bus.subscribe(inbox, take)
    try:
        stop = encode(Stop(id=request_id, reason="cancelled by its id"))
        await bus.publish(names.control_subject(names.ALL_WORKERS), stop, reply=inbox)
        yield heard, stopped
    finally:
        await subscription.unsubscribe()


async def _first(future: asyncio.Future[Cancelled], timeout_s: float) -> Cancelled | None:
    await asyncio.wait([future], timeout=timeout_s)
    return future.result() if future.done() else None


async def _remove_messages(bus: Bus, request_id: str, started_ms: int) -> bool:
    """Takes all attempts of a request out of the queues. True: there was one."""
    found = False
    since_ms = max(1.0, float(started_ms - CLOCKS_MS))
    for stream, subject in _QUEUES:
        async for message in read_stream(bus, stream, subject, since_ms=since_ms):
            if message.message_id.rpartition(".")[0] == request_id:
                with contextlib.suppress(JetStreamError):  # it has just ended
                    await remove_message(bus, stream, message.seq)
                    found = True
    return found
