"""What a publisher hears of the workers that run its requests: who lives, and which runs count.

Workers say every 400 ms what they run. A worker that was silent for 1.2 s is asked; where it is gone, or no longer lists
a run, that run is lost.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import OrderedDict
from typing import TYPE_CHECKING, TypeVar

import msgspec

from . import names
from .calls import Call
from .connection import Msg, NoResponders
from .errors import BusUnavailable
from .messages import Alive, AliveReply, Answered, Probe, Stop, Usage, decode_alive, encode
from .storing import HEAR_FIRST_S

if TYPE_CHECKING:
    from .publisher import Publisher

log = logging.getLogger(__name__)

T = TypeVar("T")

#: How often it is looked at what is waited for; a silent worker is asked, and has so long to answer.
ALIVE_S = 0.4
SILENT_S = 1.2
PROBE_S = 0.3
#: After a reconnect live peers can look dead for some ms; nobody is declared dead so soon after it.
RECONNECT_GRACE_S = 3.0
SUPERSEDED_KEPT = 10_000  #: how many runs a publisher remembers that were given up
ANSWERED_KEPT = 10_000  #: and of how many requests that are over it remembers which run counted
WORKERS_KEPT = 1000  #: of so many workers it remembers when they were heard, and of those of the last minute


class Hearing:
    """What one publisher knows of workers and runs.

    Attributes:
        heard: when each worker was heard last, monotonic.
    """

    def __init__(self, publisher: Publisher) -> None:
        self._publisher = publisher
        self.heard: dict[str, float] = {}
        self._superseded: OrderedDict[str, None] = OrderedDict()  #: keys of runs that were given up as lost
        #: request -> the run that counted, and what its answer cost; None where that is no whole answer
        self._answered: OrderedDict[str, tuple[str, Usage | None]] = OrderedDict()

    def answered(self, request_id: str, run: str, usage: Usage | None) -> None:
        """A request is over, and this run of it counts; ``usage``: of a whole answer."""
        _remember(self._answered, request_id, (run, usage), ANSWERED_KEPT)

    def unwanted(self, request_id: str, run: str) -> Stop | Answered:
        """What to tell the worker of a run that nobody waits for: of a request that was cancelled, or of one that has its
        answer, and whose message was delivered again because the worker that gave it died before it was booked."""
        counted, usage = self._answered.get(request_id, ("", None))
        if usage is None or counted == run:
            return Stop(id=request_id, run=run)
        return Answered(id=request_id, run=run, counted=counted, usage=usage)

    def superseded(self, request_id: str, run: str) -> None:
        """A run is given up. Its worker may come back, perhaps when all is over here, and ask which runs count."""
        _remember(self._superseded, names.run_key(request_id, run), None, SUPERSEDED_KEPT)

    def on_alive(self, msg: Msg) -> None:
        """A worker says what it runs, and hears what still counts."""
        try:
            alive = decode_alive(msg.data)
        except msgspec.MsgspecError as error:
            log.warning("an alive message cannot be decoded: %s", error)
            return
        reply = self._hear(alive)
        if msg.reply:
            self._publisher.send(msg.reply, encode(reply))

    def _hear(self, alive: Alive) -> AliveReply:
        """Compares what a worker runs for us with what we wait for."""
        now = time.monotonic()
        self.heard[alive.worker] = now
        stop: list[str] = []
        confirmed: list[str] = []
        let_go: list[str] = []
        answered: list[Answered] = []
        listed: set[str] = set()
        for state in alive.runs:
            listed.add(state.id)
            call = self._publisher.calls.get(state.id)
            key = names.run_key(state.id, state.run)
            if key in self._superseded:
                let_go.append(key)
            elif call is None and state.state == "ended" and not self._counts(state.id, state.run):
                let_go.append(key)
            elif call is None:
                if state.id in self._publisher.moving:
                    pass
                elif state.state == "ended":
                    confirmed.append(key)
                elif isinstance(answer := self.unwanted(state.id, state.run), Answered):
                    answered.append(answer)
                else:
                    stop.append(key)
            elif call.reception.run in ("", state.run):
                if names.parse_run(state.run)[0] < call.reception.fence:
                    let_go.append(key)
                    continue
                call.last_alive, call.missing = now, 0
                unheard = not call.reception.run and self._publisher.bus.connected_for_s < HEAR_FIRST_S
                if unheard or (call.promised >= call.reception.next_seq and not call.overflowed):
                    # Said to be sent in the last alive message and still not here: the last frames of a run
                    # leave no gap when they are lost. (Those that this one names may still be on their way.)
                    # Or we were cut off, and hear of the run only now.
                    call.reception.run = state.run
                    self._publisher.ask_resend(call, alive.worker)
                call.promised = state.seq
            else:
                let_go.append(key)
        for call in list(self._publisher.calls.values()):
            run = call.reception.run
            if run and run.endswith(alive.worker) and call.id not in listed and call.accepted:
                call.missing += 1
                if call.missing >= 2 and now - call.last_alive > ALIVE_S:
                    self._publisher.following.lost(call, "its worker no longer has it")
        return AliveReply(stop=stop, confirmed=confirmed, let_go=let_go, answered=answered)

    def _counts(self, request_id: str, run: str) -> bool:
        """No other run of the request is known to have counted."""
        return self._answered.get(request_id, (run, None))[0] == run

    async def watch(self) -> None:
        """Looks for workers that are silent and for requests whose time is up."""
        while True:
            await asyncio.sleep(ALIVE_S)
            loop_time = self._publisher.loop.time()
            silent: dict[str, list[Call]] = {}
            now = time.monotonic()
            for call in list(self._publisher.calls.values()):
                publication = call.publication
                if loop_time >= call.deadline:
                    self._publisher.expire(call)
                elif publication is not None and publication.open and not call.reception.run:
                    self._publisher.storing.look_after(publication)
                elif call.reception.run:
                    worker = names.parse_run(call.reception.run)[2]
                    if now - max(self.heard.get(worker, 0.0), call.last_alive) > SILENT_S:
                        silent.setdefault(worker, []).append(call)
                elif call.attempt.compat and self._publisher.bus.connected_for_s > RECONNECT_GRACE_S:
                    self._publisher.following.look_for_heir(call, now)
            if silent and self._publisher.bus.connected_for_s > RECONNECT_GRACE_S:
                await asyncio.gather(*(self._probe(worker, calls) for worker, calls in silent.items()))
            if len(self.heard) > WORKERS_KEPT:
                self.heard = {worker: at for worker, at in self.heard.items() if now - at < 60}
            self._publisher.aborts.sweep()

    async def _probe(self, worker: str, calls: list[Call]) -> None:
        try:
            payload = encode(Probe(publisher=self._publisher.id))
            msg = await self._publisher.bus.request(names.control_subject(worker), payload, timeout_s=PROBE_S)
        except (NoResponders, TimeoutError):
            if self._publisher.bus.connected_for_s > RECONNECT_GRACE_S:
                for call in calls:
                    if not call.over:
                        self._publisher.following.lost(call, f"worker {worker} does not answer")
        except BusUnavailable:
            return
        else:
            self._hear(decode_alive(msg.data))

    async def on_reconnect(self) -> None:
        """Nobody was heard while we were cut off; that is no sign of death."""
        now = time.monotonic()
        for call in self._publisher.calls.values():
            call.last_alive, call.missing = now, 0


def _remember(kept: OrderedDict[str, T], key: str, value: T, limit: int) -> None:
    kept[key] = value
    if len(kept) > limit:
        kept.popitem(last=False)
