"""How a request leaves the queue: its usage event is stored first, then its message is acknowledged.

In this order a worker that dies in between answers twice but is never paid for nothing: events are keyed by run.
An answer that is to be kept is stored before both.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Coroutine

from modelbus_broker import names
from modelbus_broker.connection import Bus
from modelbus_broker.errors import ModelBusError
from modelbus_broker.messages import UsageEvent, encode

log = logging.getLogger(__name__)

#: Between two bookings. The client has its answer already, and what ends meanwhile costs the bus nothing of its own.
PAUSE_S = 0.02


class Ledger:
    """Stores usage events and acknowledges; all that ended meanwhile goes in one message."""

    def __init__(self, bus: Bus, *, events: bool = True) -> None:
        self._bus = bus
        self._events = events
        self._ended: list[tuple[UsageEvent, str, Coroutine[None, None, None] | None]] = []
        self._wake = asyncio.Event()
        self._idle = asyncio.Event()
        self._idle.set()
        #: Ack subjects of messages that ended and are not acknowledged yet: they still need in-progress acks.
        self.waiting: set[str] = set()
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._task = asyncio.create_task(self._run(), name="ledger")

    async def close(self, timeout_s: float = 5.0) -> None:
        """Waits until everything is booked, at most ``timeout_s``; what is not will be delivered again."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self._idle.wait()
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task
        for _, _, first in self._ended:
            if first is not None:
                first.close()

    def book(self, event: UsageEvent, ack_subject: str, first: Coroutine[None, None, None] | None = None) -> None:
        """A run has ended; ``ack_subject`` "" books the event without touching the message.

        ``first`` is awaited before anything is booked: it stores the answer.
        """
        if ack_subject:
            self.waiting.add(ack_subject)
        self._ended.append((event, ack_subject, first))
        self._idle.clear()
        self._wake.set()

    async def _run(self) -> None:
        while True:
            await self._wake.wait()
            self._wake.clear()
            ended, self._ended = self._ended, []
            if storing := [first for _, _, first in ended if first is not None]:
                await asyncio.gather(*storing)
            if self._events:
                await self._store([event for event, _, _ in ended])
            for _, ack_subject, _ in ended:
                if ack_subject:
                    with contextlib.suppress(ModelBusError):
                        await self._bus.publish(ack_subject, b"+ACK")
                    self.waiting.discard(ack_subject)
            if not self._ended:
                self._idle.set()
            await asyncio.sleep(PAUSE_S)

    async def _store(self, events: list[UsageEvent]) -> None:
        payload = encode(events)
        message_id = f"usage.{events[0].id}.{events[0].run}.{len(events)}"
        while True:
            try:
                await self._bus.js_publish(names.USAGE, payload, msg_id=message_id, timeout_s=10.0)
                return
            except ModelBusError as error:
                log.warning("usage events wait: %s", error.message)
                await asyncio.sleep(0.5)
