"""How a request leaves the queue: its usage event is stored first, then its message is acknowledged.

In this order a worker that dies in between answers twice but is never paid for nothing: events are keyed by run.
An answer that is to be kept is stored before both.
An acknowledgement that is lost with a server would bring the request back, so it is said again until it was heard.

A worker that stood still, or was cut off, may have been given up, and another run may count in place of its own. So it
asks before it books a run whose publisher it has not been in touch with of late; see ``may_be_given_up``. Where it hears
of the other run after it has booked its own, it books it once more, as waste: the last event of a run is true. Where the
publisher is gone by then, the ledger itself says whether a later run has answered.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from typing import Literal, NamedTuple

import msgspec
from modelbus_broker import names
from modelbus_broker.connection import Bus, NoResponders
from modelbus_broker.errors import BusUnavailable, ModelBusError
from modelbus_broker.messages import UsageEvent, decode_usage_events, encode
from modelbus_broker.reading import read_stream

log = logging.getLogger(__name__)

#: Between two bookings. The client has its answer already, and what ends meanwhile costs the bus nothing of its own.
PAUSE_S = 0.02
#: Nobody hears acknowledgements while a leader is chosen, or when the model was removed.
CONFIRM_S = 30.0
#: Between two tries to store events, and between two questions to a publisher that is silent.
AGAIN_S = 0.5
#: A publisher gives up a worker that it has not heard of for 1.2 s.
TOUCH_S = 1.2
#: The clocks of workers differ by less.
SKEW_MS = 10_000.0
#: So many runs that are not confirmed are remembered, because they may turn out not to count.
BOOKED_KEPT = 2_000

Ask = Callable[[str], Awaitable[Literal["answered", "gone", "silent"]]]


class Entry(NamedTuple):
    """A run that has ended."""

    event: UsageEvent
    ack_subject: str
    publisher: str  #: "": nobody is asked
    since: float  #: monotonic; the publisher was in touch with this run then at the latest
    #: Stores the answer; False: another run's was there before, and this run is waste.
    first: Coroutine[None, None, bool] | None = None


def may_be_given_up(now: float, since: float, heard: float) -> bool:
    """Whether a publisher may have taken this worker for lost. Pure: monotonic times.

    Args:
        since: when the run began, which its publisher was told.
        heard: when the last alive message was sent that the publisher has answered; 0: none.
    """
    return now - since > TOUCH_S and now - heard > TOUCH_S


class Ledger:
    """Stores usage events and acknowledges; all that ended meanwhile goes in one message.

    Attributes:
        ask: tells a publisher what runs here. What it no longer counts is disowned before that returns.
        heard: when each publisher has last answered, see ``may_be_given_up``.
    """

    def __init__(self, bus: Bus, *, events: bool = True) -> None:
        self._bus = bus
        self._events = events
        self.ask: Ask = _nobody
        self.heard: Mapping[str, float] = {}
        self._ended: list[Entry] = []
        #: Runs that may not count, by run key, until their publishers have answered.
        self._doubtful: dict[str, Entry] = {}
        self._asking: dict[str, asyncio.Task[None]] = {}
        #: By run key, runs that count as far as is known: on their way into the ledger, and those that are booked there
        #: until their publishers confirm them.
        self._booking: dict[str, Entry] = {}
        self._booked: OrderedDict[str, UsageEvent] = OrderedDict()
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
        tasks = [task for task in (self._task, *self._asking.values()) if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for entry in (*self._ended, *self._doubtful.values()):
            if entry.first is not None:
                entry.first.close()

    def book(
        self,
        event: UsageEvent,
        ack_subject: str,
        *,
        publisher: str = "",
        since: float = 0.0,
        first: Coroutine[None, None, bool] | None = None,
    ) -> None:
        """A run has ended; ``ack_subject`` "" books the event without touching the message.

        ``first`` is awaited before anything is booked: it stores the answer, and says whether the run counts.
        """
        if ack_subject:
            self.waiting.add(ack_subject)
        self._ended.append(Entry(event, ack_subject, publisher, since, first))
        self._idle.clear()
        self._wake.set()

    def delivered_again(self, run_key: str, ack_subject: str) -> bool:
        """The message of a run that has ended here came again. True: the run is not booked yet, and from now on it is
        this delivery that is kept in progress, and acknowledged when all is stored. False: it is; that goes now."""
        for place in (self._booking, self._doubtful):
            if (entry := place.get(run_key)) is not None and entry.ack_subject:
                place[run_key] = self._moved(entry, ack_subject)
                return True
        for at, entry in enumerate(self._ended):
            if _key(entry) == run_key and entry.ack_subject:
                self._ended[at] = self._moved(entry, ack_subject)
                return True
        return False

    def _moved(self, entry: Entry, ack_subject: str) -> Entry:
        self.waiting.discard(entry.ack_subject)
        self.waiting.add(ack_subject)
        return entry._replace(ack_subject=ack_subject)

    def disown(self, run_key: str) -> None:
        """Another run counts in place of this one, says its publisher: what it used is waste, its message is not ours."""
        event = self._booked.pop(run_key, None)  # where it is done already: the last event of a run is true
        if event is None:
            entry = self._doubtful.pop(run_key, None) or self._booking.pop(run_key, None) or self._unseen(run_key)
            if entry is None:
                return
            event = entry.event
            self.waiting.discard(entry.ack_subject)
            if entry.first is not None:
                entry.first.close()
        self.book(msgspec.structs.replace(event, outcome="waste"), "")

    def _beaten(self, entry: Entry) -> Entry:
        """How the request ended was known before this run had ended: an answer of its own is waste."""
        if self._booking.pop(_key(entry), None) is not None:
            # Said once: the message is gone already, mostly, and then nobody confirms it. Who gets it again lets it go.
            self.waiting.discard(entry.ack_subject)
            with contextlib.suppress(BusUnavailable):
                self._bus.send(entry.ack_subject, b"+ACK")
        outcome = "waste" if entry.event.outcome == "done" else entry.event.outcome
        return entry._replace(event=msgspec.structs.replace(entry.event, outcome=outcome), ack_subject="")

    def _unseen(self, run_key: str) -> Entry | None:
        """Takes out a run that has ended, and that nobody has looked at since."""
        for entry in self._ended:
            if _key(entry) == run_key:
                self._ended.remove(entry)
                return entry
        return None

    async def has(self, request_id: str, run: str, *, since_ms: float) -> bool:
        """Whether a run is booked; ``since_ms``: Unix time before which it was not. Raises BusUnavailable."""
        since_ms = max(1.0, since_ms - SKEW_MS)
        async for message in read_stream(self._bus, names.STREAM_USAGE, names.USAGE, since_ms=since_ms):
            if any(event.id == request_id and event.run == run for event in decode_usage_events(message.data)):
                return True
        return False

    def confirmed(self, run_key: str) -> None:
        """The publisher has the last frame of this run: it counts, and nothing more will be said of it."""
        self._booked.pop(run_key, None)

    async def _run(self) -> None:
        while True:
            await self._wake.wait()
            self._wake.clear()
            entries, self._ended = self._certain(self._ended), []
            storing = {_key(entry): entry.first for entry in entries if entry.first is not None}
            entries = [entry._replace(first=None) for entry in entries] if storing else entries
            self._booking = {_key(entry): entry for entry in entries if entry.ack_subject}
            if storing:
                counts = dict(zip(storing, await asyncio.gather(*storing.values()), strict=True))
                entries = [
                    entry if counts.get(_key(entry), True) else self._beaten(entry)
                    for entry in self._still_booking(entries)
                ]
            while entries and self._events and not await self._store([entry.event for entry in entries]):
                await asyncio.sleep(AGAIN_S)
                entries = self._certain(self._still_booking(entries))
                self._booking = {_key(entry): entry for entry in entries if entry.ack_subject}
            counting, self._booking = self._booking, {}
            for key, entry in counting.items():
                self._booked[key] = entry.event
            while len(self._booked) > BOOKED_KEPT:
                self._booked.popitem(last=False)
            await self._acknowledge([entry.ack_subject for entry in counting.values()])
            if not self._ended and not self._doubtful:
                self._idle.set()
            await asyncio.sleep(PAUSE_S)

    def _still_booking(self, entries: list[Entry]) -> list[Entry]:
        """As they are now, after something was waited for: what was disowned meanwhile is in the next events, as waste,
        and what was delivered again is acknowledged by its new name."""
        return [
            self._booking.get(_key(entry), entry)
            for entry in entries
            if not entry.ack_subject or _key(entry) in self._booking
        ]

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
                log.info("acknowledgements are said again: %s", str(error) or "no answer")
                await asyncio.sleep(0.2)

    def _certain(self, entries: list[Entry]) -> list[Entry]:
        """Those that count; the others wait until their publishers have been asked."""
        now = time.monotonic()
        found = []
        for entry in entries:
            publisher = entry.publisher
            if not publisher or not may_be_given_up(now, entry.since, self.heard.get(publisher, 0.0)):
                found.append(entry)
                continue
            self._doubtful[_key(entry)] = entry
            if publisher not in self._asking:
                self._asking[publisher] = asyncio.create_task(self._settle(publisher), name=f"ask {publisher}")
        return found

    async def _settle(self, publisher: str) -> None:
        """Asks until there is an answer, or nobody who could give one."""
        while True:
            found = await self.ask(publisher)
            if found != "silent":
                break
            await asyncio.sleep(AGAIN_S)
        # From here on nothing waits: what becomes doubtful later is asked for anew.
        del self._asking[publisher]
        log.info("publisher %s: %s; booking what waited for that", publisher, found)
        entries = {key: entry for key, entry in self._doubtful.items() if entry.publisher == publisher}
        later = await self._booked_later(entries) if found == "gone" else set()
        for key in entries:
            if key in later:
                self.disown(key)
            elif (still := self._doubtful.pop(key, None)) is not None:  # as it is now: it may have been delivered again
                self.book(still.event, still.ack_subject, first=still.first)

    async def _booked_later(self, entries: Mapping[str, Entry]) -> set[str]:
        """Of these runs, by run key, those whose request has been answered by a later run since."""
        mine = {entry.event.id: names.parse_run(entry.event.run)[:2] for entry in entries.values()}
        last = dict(mine)
        since_ms = min((e.event.at_ms - e.event.run_ms for e in entries.values()), default=0.0) - SKEW_MS
        try:
            async for message in read_stream(self._bus, names.STREAM_USAGE, names.USAGE, since_ms=max(1.0, since_ms)):
                for event in decode_usage_events(message.data):
                    if event.id in last and event.outcome == "done":
                        last[event.id] = max(last[event.id], names.parse_run(event.run)[:2])
        except ModelBusError as error:
            log.warning("which runs were answered elsewhere is not known: %s", error.message)
        return {key for key, entry in entries.items() if last[entry.event.id] > mine[entry.event.id]}

    async def _store(self, events: list[UsageEvent]) -> bool:
        first = events[0]
        message_id = f"usage.{first.id}.{first.run}.{first.outcome}.{len(events)}"
        try:
            await self._bus.js_publish(names.USAGE, encode(events), msg_id=message_id, timeout_s=10.0)
        except ModelBusError as error:
            log.warning("usage events wait: %s", error.message)
            return False
        return True


def _key(entry: Entry) -> str:
    return names.run_key(entry.event.id, entry.event.run)


async def _nobody(publisher: str) -> Literal["gone"]:
    """There is no way to ask."""
    return "gone"
