"""Reads messages out of a stream in batches (batched direct get, ADR-31), without a consumer and without taking them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from typing import Any

import msgspec

from .connection import Bus, Msg
from .errors import BusUnavailable

BATCH_BYTES = 4 << 20
#: For a batch, and until a server answers for the stream: while a cluster elects a leader none may.
TIMEOUT_S = 10.0
NOBODY_S = 0.1


class Stored(msgspec.Struct, frozen=True, kw_only=True):
    """A message as it lies in a stream."""

    seq: int
    subject: str
    data: bytes
    stored_ms: float  #: Unix time, by the server's clock
    message_id: str = ""  #: its ``Nats-Msg-Id``


async def read_batch(
    bus: Bus, stream: str, subject: str, *, seq: int = 1, since_ms: float = 0.0, batch: int = 64
) -> list[Stored]:
    """The next messages of a stream whose subjects match; none when there are no more.

    Args:
        subject: may have wildcards.
        seq: from this sequence on.
        since_ms: in place of ``seq``: those stored at this Unix time or later.
        batch: at most so many; fewer where they would be more than 4 MiB.

    Raises:
        BusUnavailable: the stream does not answer.
    """
    asked: dict[str, Any] = {"batch": batch, "max_bytes": BATCH_BYTES, "next_by_subj": subject}
    if since_ms:
        asked["start_time"] = datetime.fromtimestamp(since_ms / 1000, UTC).isoformat().replace("+00:00", "Z")
    else:
        asked["seq"] = seq
    try:
        async with asyncio.timeout(TIMEOUT_S):
            while True:
                if (found := await _batch(bus, stream, asked)) is not None:
                    return found
                await asyncio.sleep(NOBODY_S)
    except TimeoutError as error:
        raise BusUnavailable(f"the stream {stream} does not answer") from error


async def _batch(bus: Bus, stream: str, asked: dict[str, Any]) -> list[Stored] | None:
    """None: no server answers for the stream just now, which says nothing of what lies there."""
    found: list[Stored] = []
    status: asyncio.Future[str] = asyncio.get_running_loop().create_future()

    def take(msg: Msg) -> None:
        if "Nats-Sequence" in msg.headers:
            found.append(_stored(msg))
        elif not status.done():
            status.set_result(msg.status)

    inbox = bus.new_inbox()
    subscription = await bus.subscribe(inbox, take)
    try:
        await bus.publish(f"$JS.API.DIRECT.GET.{stream}", msgspec.json.encode(asked), reply=inbox)
        match await status:
            case "204" | "404":  # the end of a batch; there is nothing
                return found
            case "503":
                return None
            case other:
                raise BusUnavailable(f"the stream {stream} cannot be read: status {other}")
    finally:
        await subscription.unsubscribe()


async def read_stream(
    bus: Bus, stream: str, subject: str, *, seq: int = 1, since_ms: float = 0.0, batch: int = 64
) -> AsyncIterator[Stored]:
    """All messages of a stream whose subjects match, in order; see ``read_batch``."""
    while found := await read_batch(bus, stream, subject, seq=seq, since_ms=since_ms, batch=batch):
        for message in found:
            yield message
        seq, since_ms = found[-1].seq + 1, 0.0


def _stored(msg: Msg) -> Stored:
    headers = msg.headers
    stored_at = headers.get("Nats-Time-Stamp", "")
    return Stored(
        seq=int(headers["Nats-Sequence"]),
        subject=headers["Nats-Subject"],
        data=msg.data,
        # The server writes nanoseconds, and leaves out those that are zero at the end.
        stored_ms=msgspec.convert(stored_at, type=datetime).timestamp() * 1000 if stored_at else 0.0,
        message_id=headers.get("Nats-Msg-Id", ""),
    )
