"""What follows when a run has come to nothing: the next attempt on its way, or an error. ``failover`` decides which."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from typing import TYPE_CHECKING

import msgspec

from . import names, topology
from .blobs import put_blob
from .calls import Call
from .connection import NoResponders
from .errors import BusUnavailable, ModelBusError, WorkerLost, error_of
from .failover import Again, GiveUp, GoOn, RunEnd, heir_lives, next_attempt
from .kept import frames_of, read_kept
from .messages import Accepted, Delta, Failed, Request, encode

if TYPE_CHECKING:
    from .publisher import Publisher

log = logging.getLogger(__name__)

#: The message of a lost run is terminated again and again for so long; a cluster may have to choose a leader first.
TERMINATE_S = 30.0
AGAIN_S = 0.2
#: What was said before travels inside the next attempt up to this size.
EARLIER_LIMIT = 128 << 10


class Following:
    """The lost and failed runs of one publisher's requests."""

    def __init__(self, publisher: Publisher) -> None:
        self._publisher, self._bus = publisher, publisher.bus
        self._declared: set[str] = set()  #: subjects of half answers whose consumer is there

    def give_up_run(self, call: Call, why: str, *, handover: bool = False) -> None:
        """The run that a call was taken over with is gone: another attempt goes on from its tokens."""
        if handover and call.accepted is not None:
            worker = names.parse_run(call.accepted.run)[2]
            self._follow(call, RunEnd(worker=worker, why=why, compat=call.accepted.compat, handover=True))
        else:
            self.lost(call, why)

    def lost(self, call: Call, why: str) -> None:
        """The worker of the run that counts is gone, or no longer has it."""
        if call.accepted is not None:
            run, compat = call.accepted.run, call.accepted.compat
            worker = names.parse_run(run)[2]
            self._publisher.hearing.superseded(call.id, run)
            self._follow(call, RunEnd(worker=worker, why=why, compat=compat, crashed=call.engine_started, run=run))

    def failed(self, call: Call, frame: Failed) -> None:
        """The worker of the run that counts says that it cannot answer, or that another one shall go on."""
        error = error_of(frame)
        if frame.retry or frame.handover:
            compat = call.accepted.compat if call.accepted else ""
            worker = names.parse_run(frame.run)[2]
            end = RunEnd(worker=worker, why=error.message, compat=compat, failure=error, run=frame.run)
            if frame.handover:  # nothing is wrong with the request
                end = RunEnd(worker=worker, why=error.message, compat=compat, handover=True)
            self._follow(call, end)
        else:
            call.fail(error)

    def _follow(self, call: Call, end: RunEnd) -> None:
        """Fences the run off and publishes the next attempt, where one can give the right answer."""
        accepted, call.end = call.accepted, end
        attempt = call.fence_off()
        log.warning("request %s: attempt %d came to nothing: %s", call.id, attempt - 1, end.why)
        budget_ms = int((call.deadline - self._publisher.loop.time()) * 1000)
        workers = self._publisher.registry.workers_of(call.model)
        decision = next_attempt(call.attempt, end, call.progress(), workers, attempt=attempt, budget_ms=budget_ms)
        if isinstance(decision, GiveUp):
            call.fail(decision.error)
            if accepted is not None:
                self._publisher.spawn(self.terminate(accepted, "the run came to nothing"))
            return
        if isinstance(decision, Again):
            call.restart()
        call.attempt = self._as_ours(decision.request, accepted.run if accepted and isinstance(decision, GoOn) else "")
        self._publisher.spawn(self._republish(call, end, accepted))

    def _as_ours(self, request: Request, continues: str) -> Request:
        """The next attempt, whose frames come here; most requests were ours from the start."""
        publisher = "" if names.publisher_of(request.id) == self._publisher.id else self._publisher.id
        return msgspec.structs.replace(request, publisher=publisher, continues=continues)

    def look_for_heir(self, call: Call, now: float) -> None:
        """Half an answer waits for a worker that can go on: as long as one lives, and ``resume_wait_s`` without."""
        assert call.end is not None
        if heir_lives(call.end, self._publisher.registry.workers_of(call.model)):
            call.last_alive = now
        elif now - call.last_alive > self._publisher.settings.resume_wait_s:
            if call.publication is not None:
                self._publisher.spawn(self._publisher.storing.withdraw(call.publication))
            self._follow(call, msgspec.structs.replace(call.end, compat="", crashed=False, run=""))

    async def _republish(self, call: Call, end: RunEnd, accepted: Accepted | None) -> None:
        subject = names.resume_subject(call.model, call.attempt.compat)
        try:
            if call.attempt.answer_kept_s and not call.progress().shown and await self._is_answered(call, accepted):
                return
            if call.kept and call.attempt.output_token_ids:
                call.attempt = await self._with_earlier(call.attempt, call.kept)
            await self._publisher.store(call, subject, end, accepted)
        except ModelBusError as error:
            call.fail(not_again(end, error))
            return
        if call.over:  # meanwhile: what was taken back was the attempt before
            await self._publisher.withdraw(call)
            return
        if call.attempt.compat and subject not in self._declared:
            # Usually deploy has done it; a worker that was started later, elsewhere, may have a compat of its own.
            self._declared.add(subject)
            try:
                await topology.declare_resume(self._bus, call.model, call.attempt.compat)
            except ModelBusError as error:
                self._declared.discard(subject)
                log.warning("half an answer of %s may lie where nobody pulls: %s", call.model, error)

    async def _is_answered(self, call: Call, accepted: Accepted | None) -> bool:
        """The run that was lost had answered: its worker kept the answer, and only its frames did not come."""
        while True:
            try:
                kept = await read_kept(self._bus, call.id)
                frames = await frames_of(self._bus, kept) if kept is not None else []
                break
            except BusUnavailable:
                if call.over:
                    return True
                await asyncio.sleep(AGAIN_S)
            except ModelBusError as error:
                log.warning("the kept answer of %s cannot be read, it is made again: %s", call.id, error.message)
                return False
        if not frames or call.over:
            return call.over
        call.restart()
        call.preload(frames)
        if accepted is not None:
            self._publisher.spawn(self.terminate(accepted, "its answer is kept"))
        return True

    async def _with_earlier(self, request: Request, frames: list[Delta]) -> Request:
        """The worker that completes the answer is to keep all of it: what was said before travels along."""
        earlier = encode(frames)
        if len(earlier) <= EARLIER_LIMIT:
            return msgspec.structs.replace(request, earlier=earlier)
        blob = await put_blob(self._bus, f"{request.id}.{request.attempt}.earlier", earlier)
        return msgspec.structs.replace(request, earlier_blob=blob)

    async def terminate(self, accepted: Accepted, why: str) -> None:
        """Takes a run's message away, and says so until the bus has heard it: it would be delivered again otherwise."""
        until = time.monotonic() + TERMINATE_S
        while time.monotonic() < until:
            with contextlib.suppress(NoResponders, TimeoutError, BusUnavailable):
                await self._bus.request(accepted.ack_subject, f"+TERM {why}".encode())
                return
            await asyncio.sleep(AGAIN_S)
        log.warning(
            "the message of run %s of %s may be delivered again: the bus does not answer", accepted.run, accepted.id
        )


def not_again(end: RunEnd, error: ModelBusError) -> ModelBusError:
    """What the client hears where the next attempt cannot be published."""
    return end.failure or WorkerLost(f"{end.why}, and the request could not be published again: {error.message}")
