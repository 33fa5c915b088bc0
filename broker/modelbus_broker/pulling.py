"""Pulling requests from the queues of a model: credits, lanes and shares.

nats-py's ``fetch()`` hangs after a restart of the server, leaves pulls behind when it is cancelled and knows no
priority groups, so this is our own loop on ``CONSUMER.MSG.NEXT``.

While slots are free, one *lingering* pull with some credits waits at each consumer, so that a message arrives the
moment it is published. When the last slot is taken all of them are withdrawn by draining (never by unsubscribing:
messages in flight would be nobody's until ack_wait). When a slot is free again, the consumers are asked one after
another (re, hi, lo; shares from where it stopped) without waiting, and only when all are empty does it linger again.
Lingering pulls of several consumers can deliver more than the free slots: the worker gives such messages back at
once, and the server hands them to the next puller in 0.3 ms.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Sequence
from functools import partial

import msgspec

from . import names
from .connection import Bus, Msg, Subscription
from .errors import ModelBusError
from .topology import ConsumerRef

log = logging.getLogger(__name__)

EXPIRES_S = 30.0
HEARTBEAT_S = 5.0


class Pulled(msgspec.Struct, frozen=True):
    """A message that came out of a queue."""

    subject: str
    data: bytes
    ack_subject: str
    stream: str
    consumer: str
    lane: str
    delivery: int  #: 1 at the first delivery
    seq: int  #: in the stream
    stored_ms: float  #: Unix time when the stream stored it, by the server's clock
    msg: Msg

    @property
    def headers(self) -> dict[str, str]:
        return self.msg.headers


def parse_ack_subject(ack_subject: str) -> tuple[str, str, int, int, int]:
    """(stream, consumer, delivery count, stream sequence, stored at in Unix ns) of a delivered message.

    Two forms exist (ADR-15): 9 tokens, and since server 2.14 optionally 11 or 12 with domain and account.

    Raises:
        ValueError: it is neither.
    """
    tokens = ack_subject.split(".")
    base = 2 if len(tokens) == 9 else 4
    if len(tokens) not in (9, 11, 12) or tokens[0] != "$JS" or tokens[1] != "ACK":
        raise ValueError(f"not an ack subject: {ack_subject}")
    return (
        tokens[base],
        tokens[base + 1],
        int(tokens[base + 2]),
        int(tokens[base + 3]),
        int(tokens[base + 5]),
    )


def ask_order(consumers: Sequence[ConsumerRef], start: dict[str, int]) -> list[ConsumerRef]:
    """The order in which to ask: lanes re, hi, lo; inside a lane the shares from where it stopped."""
    order: list[ConsumerRef] = []
    for lane in ("re", "hi", "lo"):
        of_lane = [consumer for consumer in consumers if consumer.lane == lane]
        if lane == "re" or not of_lane:
            order += of_lane
            continue
        first = start.get(lane, 0) % len(of_lane)
        order += of_lane[first:] + of_lane[:first]
    return order


def credits_for(free: int, consumers: Sequence[ConsumerRef], lane: str) -> int:
    """The batch of a lingering pull: the free slots shared among the consumers of its lane, at least one."""
    return max(1, free // max(1, sum(consumer.lane == lane for consumer in consumers)))


class _Linger:
    """One consumer's waiting pulls: a subscription of their own, so that draining it withdraws just these."""

    def __init__(self, consumer: ConsumerRef, inbox: str) -> None:
        self.consumer = consumer
        self.inbox = inbox
        self.subscription: Subscription | None = None
        self.credits = 0
        self.refill_at = 0  #: with no more credits than this it wants new ones
        self.heard = time.monotonic()
        self.broken = ""
        self.withdrawn = asyncio.Event()


class Puller:
    """Pulls for one worker.

    Args:
        consumers: of the worker's model.
        free: how many requests the worker could start now.
        take: gets each message, on the event loop, and must not wait.
        priority: of the pulls: 0 is served first, 9 last.
    """

    def __init__(
        self,
        bus: Bus,
        consumers: Sequence[ConsumerRef],
        *,
        free: Callable[[], int],
        take: Callable[[Pulled], None],
        priority: int = 0,
    ) -> None:
        self._bus = bus
        self._consumers = list(consumers)
        self._free = free
        self._take = take
        self._priority = priority
        self._lingering: dict[str, _Linger] = {}
        self._share_start: dict[str, int] = {}
        self._retry_at: dict[str, float] = {}
        self._wake = asyncio.Event()
        self._stopping = False
        self._reconnected = False
        self._all_linger = False  #: a pull waits at every consumer that can be asked
        self._task: asyncio.Task[None] | None = None
        #: Messages pulled so far.
        self.pulled = 0

    async def start(self) -> None:
        self._bus.on_reconnect(self._on_reconnect)
        self._task = asyncio.create_task(self._run(), name="puller")

    async def stop(self) -> None:
        """Takes nothing new; messages in flight still arrive before this returns."""
        self._stopping = True
        self._wake.set()
        if self._task is not None:
            with contextlib.suppress(asyncio.CancelledError):
                await self._task

    def wake(self) -> None:
        """Looks again at the free slots: one was released."""
        # Where pulls wait everywhere one more free slot changes nothing, and this is in the way of every request.
        if not self._all_linger:
            self._wake.set()

    async def pause(self, consumer: str, seconds: float) -> None:
        """Takes nothing from a consumer for so long. Returns when its waiting pull is withdrawn."""
        self._retry_at[consumer] = time.monotonic() + seconds
        linger = self._lingering.get(consumer)
        if linger is not None:
            linger.broken = "paused"
            self._wake.set()
            await linger.withdrawn.wait()

    async def _on_reconnect(self) -> None:
        # The server has forgotten our pulls, or never saw us leave: arm anew, on inboxes of their own.
        self._reconnected = True
        self._wake.set()

    async def _run(self) -> None:
        while not self._stopping:
            self._wake.clear()
            try:
                await self._step()
            except ModelBusError as error:
                log.info("pulling: %s", error)
                await asyncio.sleep(0.2)
                continue
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(1.0 if self._all_linger else 0.25):
                    await self._wake.wait()
        with contextlib.suppress(ModelBusError):
            await self._withdraw(list(self._lingering))

    async def _step(self) -> None:
        """Brings the waiting pulls in line with the free slots."""
        self._all_linger = False
        if self._reconnected:
            self._reconnected = False
            self._retry_at.clear()
            await self._withdraw(list(self._lingering))
        if not self._bus.is_connected:
            return
        await self._withdraw([name for name, linger in self._lingering.items() if self._is_broken(linger)])
        free = self._free()
        if free <= 0:
            await self._withdraw(list(self._lingering))
        elif not self._lingering and await self._ask_all():
            self._wake.set()  # more may be there for what is still free
        else:
            await self._linger_all()

    def _is_broken(self, linger: _Linger) -> bool:
        silent = time.monotonic() - linger.heard > 2 * HEARTBEAT_S + 1
        if silent and not linger.broken:
            linger.broken = "no heartbeat"
        return bool(linger.broken)

    # Lingering pulls

    async def _linger_all(self) -> None:
        now = time.monotonic()
        everywhere = True
        for consumer in self._consumers:
            if self._free() <= 0:
                return
            if self._retry_at.get(consumer.name, 0.0) > now:
                everywhere = False
                continue
            linger = self._lingering.get(consumer.name)
            if linger is None:
                linger = self._lingering[consumer.name] = _Linger(consumer, self._bus.new_inbox())
                linger.subscription = await self._bus.subscribe(linger.inbox, partial(self._on_linger, linger))
            wanted = credits_for(self._free(), self._consumers, consumer.lane)
            linger.refill_at = wanted // 2
            if linger.credits <= linger.refill_at:
                batch = wanted - linger.credits
                linger.credits += batch
                await self._pull(consumer, linger.inbox, batch, linger=True)
        self._all_linger = everywhere

    def _on_linger(self, linger: _Linger, msg: Msg) -> None:
        linger.heard = time.monotonic()
        status = msg.status
        if not status:
            linger.credits -= 1
            self._deliver(linger.consumer, msg)
            if linger.credits <= linger.refill_at or self._free() <= 0:
                self._wake.set()
        elif status == "408":
            linger.credits -= int(msg.headers.get("Nats-Pending-Messages", linger.credits))
            self._wake.set()
        elif status != "100":
            # 409: leader change, consumer deleted, server shutdown; 503: no such consumer; 400: bad group.
            description = msg.headers.get("Description", "")
            linger.broken = f"{status} {description}"
            self._retry_at[linger.consumer.name] = time.monotonic() + (2.0 if status == "503" else 0.2)
            if status != "503":
                log.info("pull of %s ended: %s", linger.consumer.name, linger.broken)
            self._wake.set()

    async def _withdraw(self, consumer_names: list[str]) -> None:
        """Takes waiting pulls back; what the server sent before it knew still arrives."""
        lingers = [self._lingering.pop(name) for name in consumer_names]
        await asyncio.gather(*(linger.subscription.drain() for linger in lingers if linger.subscription))
        for linger in lingers:
            linger.withdrawn.set()

    # Asking without waiting

    async def _ask_all(self) -> bool:
        """Asks the consumers in order for as much as is free; True if anything came."""
        got = 0
        for consumer in ask_order(self._consumers, self._share_start):
            free = self._free()
            if free <= 0 or self._stopping:
                break
            if self._retry_at.get(consumer.name, 0.0) > time.monotonic():
                continue
            came = await self._ask(consumer, free)
            got += came
            if came and consumer.lane != "re":
                shares = [c.name for c in self._consumers if c.lane == consumer.lane]
                self._share_start[consumer.lane] = shares.index(consumer.name) + 1
            if came >= free:
                break  # there may be more: begin again at the first lane
        return got > 0

    async def _ask(self, consumer: ConsumerRef, batch: int) -> int:
        """One ``no_wait`` pull; returns how many messages came."""
        inbox = self._bus.new_inbox()
        over = asyncio.Event()
        came = 0

        def on_message(msg: Msg) -> None:
            nonlocal came
            status = msg.status
            if not status:
                came += 1
                self._deliver(consumer, msg)
                if came >= batch:
                    over.set()
            elif status != "100":
                if status in ("503", "409", "400"):
                    self._retry_at[consumer.name] = time.monotonic() + (2.0 if status == "503" else 0.2)
                over.set()

        subscription = await self._bus.subscribe(inbox, on_message)
        await self._pull(consumer, inbox, batch, linger=False)
        try:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(2.0):
                    await over.wait()
        finally:
            if came >= batch or over.is_set():
                await subscription.unsubscribe()
            else:
                await subscription.drain()
        return came

    async def _pull(self, consumer: ConsumerRef, inbox: str, batch: int, *, linger: bool) -> None:
        body: dict[str, object] = {"batch": batch, "group": names.GROUP, "priority": self._priority}
        if linger:
            body["expires"] = int(EXPIRES_S * 1e9)
            body["idle_heartbeat"] = int(HEARTBEAT_S * 1e9)
        else:
            body["no_wait"] = True
        subject = f"$JS.API.CONSUMER.MSG.NEXT.{consumer.stream}.{consumer.name}"
        await self._bus.publish(subject, msgspec.json.encode(body), reply=inbox)

    def _deliver(self, consumer: ConsumerRef, msg: Msg) -> None:
        stream, name, delivery, seq, stored_ns = parse_ack_subject(msg.reply)
        self.pulled += 1
        self._take(
            Pulled(
                msg.subject,
                msg.data,
                msg.reply,
                stream,
                name,
                consumer.lane,
                delivery,
                seq,
                stored_ns / 1e6,
                msg,
            )
        )
