"""Frames on their way to publishers.

Frames that become ready in one turn of the event loop for one publisher leave as one message. No timer delays
a frame; batches form only because there is load. A copy of each stays in the run's ring until the publisher has
confirmed the last one, so that lost frames can be sent again.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from typing import TYPE_CHECKING

from modelbus_broker import names
from modelbus_broker.connection import Bus
from modelbus_broker.errors import BusUnavailable, StreamCut
from modelbus_broker.messages import Frame, encode, encode_list

if TYPE_CHECKING:
    from .execution import Execution

log = logging.getLogger(__name__)

RING_BYTES = 8 << 20
RING_KEPT_S = 60.0  #: after the last frame, when no publisher confirms it
MESSAGE_BYTES = 1 << 20
RESEND_BYTES = 256 << 10
#: What a publisher that takes a run over gets at once; it asks for more as its reader reads.
ADOPTED_BYTES = 768 << 10
#: Frames of a turn that is long go out bit by bit: the publisher works on the first ones meanwhile.
TOGETHER = 32


class Ring:
    """The frames of one run, from ``first`` on, as they travel.

    Bytes and not structs: they count what they take, can be sent again as they are, and give the garbage collector
    nothing to look through.
    """

    __slots__ = (
        "bytes", "ended_at", "execution", "first", "frames", "publisher", "request_id", "run", "sent_seq", "silent",
    )  # fmt: skip

    def __init__(self, request_id: str, run: str, publisher: str) -> None:
        self.request_id = request_id
        self.run = run
        self.publisher = publisher
        self.frames: deque[bytes] = deque()
        self.first = 0
        self.bytes = 0
        self.sent_seq = -1
        self.ended_at = 0.0
        self.silent = False  #: of a job: nobody listens, the frames are only kept
        #: What the frames are of; None for a request that was refused.
        self.execution: Execution | None = None

    def add(self, frame: Frame) -> bytes:
        """Keeps a frame; returns it encoded."""
        encoded = encode(frame)
        self.frames.append(encoded)
        self.sent_seq = frame.seq
        self.bytes += len(encoded)
        while self.bytes > RING_BYTES and len(self.frames) > 1:
            self.bytes -= len(self.frames.popleft())
            self.first += 1
        return encoded

    def since(self, seq: int, limit: int = RESEND_BYTES) -> list[bytes]:
        """Frames from ``seq`` on, up to about ``limit`` bytes and at least one; empty if they are gone or not yet."""
        if seq < self.first or seq > self.sent_seq:
            return []
        found: list[bytes] = []
        size = 0
        for index in range(seq - self.first, len(self.frames)):
            frame = self.frames[index]
            size += len(frame)
            if found and size > limit:
                break
            found.append(frame)
        return found


class Outbox:
    """Sends frames, and keeps them until they are confirmed."""

    def __init__(self, bus: Bus, worker: str) -> None:
        self._bus = bus
        self._worker = worker
        self._ready: dict[str, list[bytes]] = {}
        self._soon = False
        self.rings: dict[str, Ring] = {}  #: by run key

    def open(self, request_id: str, run: str, publisher: str = "", *, silent: bool = False) -> Ring:
        """Starts the ring of a run; its frames go to this publisher, or else to the one that the request id names.

        ``silent``: they go to nobody. Nobody is told of the run, and nobody has to confirm its end.
        """
        ring = Ring(request_id, run, publisher or names.publisher_of(request_id))
        ring.silent = silent
        if silent:
            return ring
        self.rings[names.run_key(request_id, run)] = ring
        return ring

    def send(self, ring: Ring, frame: Frame) -> None:
        """Queues a frame for the end of this turn of the event loop."""
        if ring.silent:
            ring.add(frame)
            return
        ready = self._ready.get(ring.publisher)
        if ready is None:
            ready = self._ready[ring.publisher] = []
            self._flush_soon()
        ready.append(ring.add(frame))
        if len(ready) >= TOGETHER:
            del self._ready[ring.publisher]
            self._publish(names.response_subject(ring.publisher, self._worker), ready)

    def end(self, ring: Ring) -> None:
        """The last frame of the run was sent."""
        ring.ended_at = time.monotonic()

    def forget(self, run_key: str) -> None:
        """The publisher has the last frame, or is not waited for any longer."""
        ring = self.rings.pop(run_key, None)
        if ring is not None:
            ring.execution = None  # which has the ring: a circle would lie here until the garbage is collected

    def resend(self, request_id: str, run: str, seq: int) -> None:
        """Sends frames of a run again."""
        ring = self.rings.get(names.run_key(request_id, run))
        if ring is not None:
            frames = ring.since(seq)
            if seq < ring.first:
                # The reader was too slow for the ring: better an end than a wait for what will never come.
                error = StreamCut(f"the reader was too slow: frames before {ring.first} are no longer kept")
                frames = [encode(error.failed(id=request_id, run=run, seq=seq))]
            if frames:
                self._ready.setdefault(ring.publisher, []).extend(frames)
                self._flush_soon()

    def adopt(self, ring: Ring, publisher: str, seq: int) -> None:
        """From now on the frames go to another publisher, those from ``seq`` on once more."""
        ring.publisher = publisher
        # What is ready for the old one was added before: it is among these.
        if frames := ring.since(max(seq, ring.first), ADOPTED_BYTES):
            self._ready.setdefault(publisher, []).extend(frames)
            self._flush_soon()

    def sweep(self) -> None:
        """Forgets runs that nobody has confirmed for too long."""
        old = time.monotonic() - RING_KEPT_S
        for key in [key for key, ring in self.rings.items() if 0 < ring.ended_at < old]:
            self.forget(key)

    def _flush_soon(self) -> None:
        if not self._soon:
            self._soon = True
            # Runs that start in this turn of the loop come first: their frames leave in the same message.
            loop = asyncio.get_running_loop()
            loop.call_soon(loop.call_soon, self.flush)

    def flush(self) -> None:
        """Publishes all that is ready, one message per publisher."""
        self._soon = False
        ready, self._ready = self._ready, {}
        for publisher, frames in ready.items():
            self._publish(names.response_subject(publisher, self._worker), frames)

    def _publish(self, subject: str, frames: list[bytes]) -> None:
        if not self._bus.is_connected:
            return  # the alive messages after the reconnect say what was not sent
        payload = encode_list(frames)
        if len(payload) > MESSAGE_BYTES and len(frames) > 1:
            middle = len(frames) // 2
            self._publish(subject, frames[:middle])
            self._publish(subject, frames[middle:])
            return
        try:
            self._bus.send(subject, payload)
        except BusUnavailable as error:
            log.info("frames not sent: %s", error)
