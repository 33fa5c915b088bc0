"""Alive messages: what a worker runs, told every 400 ms to each publisher that it runs something for.

The publisher's answer says which runs nobody wants and which last frames have come. A publisher that does not
answer is dead after some time, and its requests are aborted unless they are to run to their end.
"""

from __future__ import annotations

import asyncio
import logging
import time
from typing import TYPE_CHECKING, Literal

import msgspec
from modelbus_broker import names
from modelbus_broker.connection import Bus, NoResponders
from modelbus_broker.errors import BusUnavailable
from modelbus_broker.messages import Alive, AliveReply, Request, RunState, decode_alive_reply, encode

if TYPE_CHECKING:
    from .worker import Worker

log = logging.getLogger(__name__)

ALIVE_S = 0.4
ANSWER_S = 1.0
PUBLISHER_DEAD_S = 3.0
RECONNECT_GRACE_S = 3.0


class Liveness:
    """Tells publishers what runs and hears what they want.

    Attributes:
        heard: when the last message was sent that each publisher has answered (monotonic).
    """

    def __init__(self, bus: Bus, worker_id: str, worker: Worker, *, orphan_grace_s: float) -> None:
        self._bus = bus
        self._worker_id = worker_id
        self._worker = worker
        self._orphan_grace_s = orphan_grace_s
        self.heard: dict[str, float] = {}
        #: Since when they have not answered. Our own standing still is no silence of theirs: it begins with a question.
        self._silent_since: dict[str, float] = {}
        self._asking: set[str] = set()
        self._tasks: set[asyncio.Task[bool]] = set()

    async def run(self) -> None:
        while True:
            await asyncio.sleep(ALIVE_S)
            self._expire()
            if not self._bus.is_connected:
                continue
            publishers = {ring.publisher for ring in self._worker.outbox.rings.values()}
            for publisher in publishers - self._asking:
                self._asking.add(publisher)
                task = asyncio.create_task(self._tell(publisher), name="alive")
                self._tasks.add(task)
                task.add_done_callback(self._tasks.discard)
            self._abort_orphans()
            for times in (self.heard, self._silent_since):
                for publisher in set(times) - publishers:
                    del times[publisher]

    def reconnected(self) -> None:
        """Nobody could answer while we were cut off; that is no sign of death."""
        self._silent_since.clear()

    def hear_of(self, publisher: str) -> None:
        """A publisher has spoken to us of its own accord."""
        self._silent_since.pop(publisher, None)

    def alive_for(self, publisher: str) -> Alive:
        """What this worker runs, or remembers, for a publisher."""
        runs: list[RunState] = []
        for key, ring in self._worker.outbox.rings.items():
            if ring.publisher == publisher:
                execution = self._worker.executions.get(key)
                state = execution.state if execution is not None else "ended"
                runs.append(RunState(id=ring.request_id, run=ring.run, seq=ring.sent_seq, state=state))
        return Alive(worker=self._worker_id, steps=self._worker.engine.steps, runs=runs)

    async def settle(self, timeout_s: float) -> None:
        """Tells the publishers what has ended until each has confirmed it, is gone, or the time is up."""
        end = time.monotonic() + timeout_s
        gone: set[str] = set()
        while left := {ring.publisher for ring in self._worker.outbox.rings.values()} - gone:
            heard = await asyncio.gather(*(self._tell(publisher) for publisher in left))
            gone.update(publisher for publisher, is_there in zip(left, heard, strict=True) if not is_there)
            if time.monotonic() > end:
                return
            await asyncio.sleep(0.05)

    async def ask(self, publisher: str) -> Literal["answered", "gone", "silent"]:
        """Tells a publisher what runs here and heeds its answer. "gone": nobody listens there."""
        asked = time.monotonic()
        try:
            payload = encode(self.alive_for(publisher))
            msg = await self._bus.request(names.alive_subject(publisher), payload, timeout_s=ANSWER_S)
            self._heed(decode_alive_reply(msg.data))
        except (NoResponders, TimeoutError, BusUnavailable) as error:
            self._silent_since.setdefault(publisher, time.monotonic())
            return "gone" if isinstance(error, NoResponders) else "silent"
        except msgspec.MsgspecError as error:
            log.warning("publisher %s answers nonsense: %s", publisher, error)
            return "silent"
        self.heard[publisher] = asked
        self._silent_since.pop(publisher, None)
        return "answered"

    async def reaches(self, publisher: str) -> bool:
        """As :meth:`ask`; False when nobody listens there."""
        return await self.ask(publisher) != "gone"

    async def _tell(self, publisher: str) -> bool:
        try:
            return await self.reaches(publisher)
        finally:
            self._asking.discard(publisher)

    def _heed(self, reply: AliveReply) -> None:
        for key in reply.confirmed:
            self._worker.outbox.forget(key)
            self._worker.ledger.confirmed(key)
        for key in reply.stop:
            execution = self._worker.executions.get(key)
            if execution is not None:
                execution.stop("nobody waits for it")
        for answered in reply.answered:
            self._worker.intake.answered_elsewhere(answered)
        for key in reply.let_go:
            execution = self._worker.executions.get(key)
            if execution is not None:
                execution.let_go()
            else:
                self._worker.outbox.forget(key)
                self._worker.intake.disown(key)

    def _expire(self) -> None:
        now = asyncio.get_running_loop().time()
        for execution in list(self._worker.executions.values()):
            if execution.deadline < now:
                execution.expire()

    def _abort_orphans(self) -> None:
        if self._bus.connected_for_s < RECONNECT_GRACE_S:
            return
        now = time.monotonic()
        for execution in list(self._worker.executions.values()):
            if execution.state == "held" and execution.asks:
                continue  # it asks itself, and ends the message when nobody is there
            silent = now - self._silent_since.get(execution.ring.publisher, now)
            if silent > grace_s(execution.request, self._orphan_grace_s):
                # Not cancelled: a publisher that was only cut off has another worker go on. Of one that is really
                # gone the message is delivered once more, and ends there.
                execution.hand_over("its publisher did not answer")


def grace_s(request: Request, orphan_grace_s: float) -> float:
    """How long a request runs on without a publisher that could pass its answer on. Pure.

    Args:
        orphan_grace_s: for a streamed one, whose client may come back through another gateway.
    """
    if request.background or request.idempotency_key:
        return float("inf")
    return max(orphan_grace_s, PUBLISHER_DEAD_S) if request.stream else PUBLISHER_DEAD_S
