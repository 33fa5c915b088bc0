"""How a request leaves the queue: its usage event is stored first, then its message is acknowledged.

In this order a worker that dies in between answers twice but is never paid for nothing: events are keyed by run.
An acknowledgement that is lost with a server would bring the request back, so it is said again until it was heard.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Sequence

from modelbus_broker import names
from modelbus_broker.connection import Bus, NoResponders
from modelbus_broker.errors import BusUnavailable, ModelBusError
from modelbus_broker.messages import UsageEvent, encode

log = logging.getLogger(__name__)

#: Between two bookings. The client has its answer already, and what ends meanwhile costs the bus nothing of its own.
PAUSE_S = 0.02
#: Nobody hears acknowledgements while a leader is chosen, or when the model was removed.
CONFIRM_S = 30.0


class Ledger:
    """Stores usage events and acknowledges; all that ended meanwhile goes in one message."""

    def __init__(self, bus: Bus, *, events: bool = True) -> None:
        self._bus = bus
        self._events = events
        self._ended: list[tuple[UsageEvent, str]] = []
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

    def book(self, event: UsageEvent, ack_subject: str) -> None:
        """A run has ended; ``ack_subject`` "" books the event without touching the message."""
        if ack_subject:
            self.waiting.add(ack_subject)
        self._ended.append((event, ack_subject))
        self._idle.clear()
        self._wake.set()

    async def _run(self) -> None:
        while True:
            await self._wake.wait()
            self._wake.clear()
            ended, self._ended = self._ended, []
            if self._events:
                await self._store([event for event, _ in ended])
            await self._acknowledge([ack_subject for _, ack_subject in ended if ack_subject])
            if not self._ended:
                self._idle.set()
            await asyncio.sleep(PAUSE_S)

    async def _acknowledge(self, ack_subjects: Sequence[str]) -> None:
        """Returns when the bus has heard them all."""
        by_consumer: dict[str, list[str]] = {}
        for ack_subject in ack_subjects:
            by_consumer.setdefault(ack_subject.rsplit(".", 5)[0], []).append(ack_subject)
        await asyncio.gather(*map(self._confirmed, by_consumer.values()))
        self.waiting.difference_update(ack_subjects)

    async def _confirmed(self, ack_subjects: list[str]) -> None:
        """Acknowledges messages of one consumer. It hears them in order: when it answers the last, it has them all."""
        *first, last = ack_subjects
        until = time.monotonic() + CONFIRM_S
        while True:
            try:
                for ack_subject in first:
                    self._bus.send(ack_subject, b"+ACK")
                await self._bus.request(last, b"+ACK")
                return
            except (NoResponders, TimeoutError, BusUnavailable) as error:
                if time.monotonic() > until:
                    log.warning(
                        "%d requests may be delivered again: nobody hears that they are done", len(ack_subjects)
                    )
                    return
                log.info("acknowledgements are said again: %s", error or "no answer")
                await asyncio.sleep(0.2)

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
