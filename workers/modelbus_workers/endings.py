"""Messages that end without a run of their own, or without an answer: given back, refused, or put with the dead letters."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable, Coroutine

from modelbus_broker import names
from modelbus_broker.connection import Bus
from modelbus_broker.dead import bury, letter_of
from modelbus_broker.errors import BusUnavailable, EngineFailed, ModelBusError, PoisonRequest, RequestCancelled
from modelbus_broker.messages import Accepted, DeadLetter, Deployment, Request, UsageEvent
from modelbus_broker.pulling import Pulled

from .answers import AnswerKeeper
from .execution import Execution
from .ledger import Ledger
from .outbox import Outbox

log = logging.getLogger(__name__)

#: A worker that leaves a request to others does not look at its consumer for so long.
LEAVE_S = 1.0


class Endings:
    """Ends messages, and does what is still to be said of them beside the event that asks for it.

    Attributes:
        pause: takes nothing from a consumer for so many seconds.
    """

    def __init__(
        self,
        worker_id: str,
        deployment: Deployment,
        bus: Bus,
        outbox: Outbox,
        ledger: Ledger,
        answers: AnswerKeeper,
    ) -> None:
        self._worker_id, self._deployment, self._bus = worker_id, deployment, bus
        self._outbox, self._ledger, self._answers = outbox, ledger, answers
        self._tasks: set[asyncio.Task[None]] = set()
        self.pause: Callable[[str, float], Awaitable[None]] = _no_pause

    def spawn(self, coroutine: Coroutine[None, None, None]) -> None:
        task = asyncio.create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def settle(self, timeout_s: float) -> None:
        """Waits for what is still to be said of messages that were not run here to their end."""
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=timeout_s)

    async def answer(self, pulled: Pulled, body: bytes) -> None:
        with contextlib.suppress(BusUnavailable):
            await self._bus.publish(pulled.ack_subject, body)

    async def leave(self, pulled: Pulled) -> None:
        """Gives a message back and asks that consumer for nothing, so that another worker gets it."""
        await self.pause(pulled.consumer, LEAVE_S)
        await self.answer(pulled, b"-NAK")

    def refuse(self, request: Request, pulled: Pulled, error: ModelBusError, *, now_ms: float) -> None:
        """Ends a request that was not run: the client hears why, it is booked, then the message goes.

        Args:
            now_ms: Unix time by the server's clock.
        """
        keep = None
        run = names.run_name(request.attempt, pulled.delivery, self._worker_id)
        if request.detached:
            keep = self._answers.keep_error(request, error, run)
        else:
            self._tell(request.id, request.attempt, pulled, error, request.publisher)
        event = UsageEvent(
            id=request.id,
            run=run,
            model=request.model,
            deployment=self._deployment.name,
            tenant=request.tenant,
            adapter=request.adapter.name if request.adapter is not None else "",
            outcome="cancelled" if isinstance(error, RequestCancelled) else "failed",
            code=error.code,
            at_ms=time.time_ns() // 1_000_000,
            queue_ms=max(0.0, now_ms - pulled.stored_ms),
        )
        self._ledger.book(event, pulled.ack_subject, first=keep)

    def _tell(self, request_id: str, attempt: int, pulled: Pulled, error: ModelBusError, publisher: str = "") -> None:
        run = names.run_name(attempt, pulled.delivery, self._worker_id)
        ring = self._outbox.open(request_id, run, publisher)
        accepted = Accepted(id=request_id, run=run, seq=0, ack_subject=pulled.ack_subject, delivery=pulled.delivery)
        self._outbox.send(ring, accepted)
        self._outbox.send(ring, error.failed(id=request_id, run=run, seq=1))
        self._outbox.end(ring)

    async def bury(self, request: Request, pulled: Pulled, why: str, *, now_ms: float) -> None:
        """Stores a dead letter, and only then tells the client and removes the message."""
        letter = letter_of(request, pulled.data, pulled.subject, reason=PoisonRequest.code, detail=why)
        if await self._store(letter, request, pulled):
            self.refuse(request, pulled, PoisonRequest(f"the request was given up: {why}"), now_ms=now_ms)

    async def bury_unreadable(self, pulled: Pulled, why: str) -> None:
        """The same for a message that is no request; its id is read off its headers, where they have one."""
        request_id, _, attempt = pulled.headers.get("Nats-Msg-Id", "").rpartition(".")
        letter = DeadLetter(
            id=request_id,
            model=self._deployment.model,
            reason="not_decodable",
            detail=why,
            original=pulled.data,
            subject=pulled.subject,
            at_ms=time.time_ns() // 1_000_000,
        )
        if await self._store(letter, None, pulled):
            error = PoisonRequest(f"the request was given up: {why}")
            with contextlib.suppress(ValueError):  # nobody can be told
                self._tell(request_id, int(attempt), pulled, error)
            await self.answer(pulled, b"+TERM not decodable")

    async def keep(self, execution: Execution) -> None:
        """The engine itself failed on a request: no other worker tries it, but it is not lost."""
        request, pulled = execution.request, execution.pulled
        if execution.counts and not request.revision:  # deploy's own test request says its error itself
            detail = f"the engine failed: {execution.failure}"
            letter = letter_of(
                request, pulled.data, pulled.subject, reason=EngineFailed.code, detail=detail, run=execution.run
            )
            await self._store(letter, request, pulled)

    async def _store(self, letter: DeadLetter, request: Request | None, pulled: Pulled) -> bool:
        try:
            await bury(self._bus, letter, request, message_id=f"{pulled.stream}.{pulled.seq}")
        except ModelBusError as error:
            log.warning("a dead letter of request %s cannot be stored: %s", letter.id or "?", error.message)
            return False
        log.error("request %s is put with the dead letters: %s: %s", letter.id or "?", letter.reason, letter.detail)
        return True


async def _no_pause(_consumer: str, _seconds: float) -> None:
    """Nothing is pulled yet."""
