"""What a worker does with the messages it pulls: judges each, runs it or ends it, and lets its message go."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Coroutine

import msgspec
from modelbus_broker import names
from modelbus_broker.blobs import get_blob
from modelbus_broker.buckets import Bucket
from modelbus_broker.connection import Bus
from modelbus_broker.errors import BusUnavailable, Conflict, DeadlineExceeded, ModelBusError, PoisonRequest
from modelbus_broker.messages import (
    Accepted,
    DeadLetter,
    Deployment,
    Request,
    Task,
    Usage,
    decode_request,
    decode_task,
    encode,
)
from modelbus_broker.pulling import Pulled

from .admission import Decision, decide
from .engines.base import Engine
from .execution import Execution, execute, usage_event
from .ledger import Ledger
from .outbox import Outbox

log = logging.getLogger(__name__)

GO_WAIT_S = 0.3
#: A worker that leaves a request to others does not look at its consumer for so long.
LEAVE_S = 1.0
ENDED_KEPT = 20_000  #: how many answered attempts a worker remembers


class Intake:
    """The requests in a worker's hands.

    Attributes:
        slots, compat: of the worker, set when its engine is ready.
        clock_offset_ms: the server's clock minus ours.
        closed: takes nothing new; what comes is given back.
        executions: held and running requests, by run key.
        wake: called when a slot is free again.
        pause: takes nothing from a consumer for so many seconds.
    """

    def __init__(
        self, worker_id: str, deployment: Deployment, bus: Bus, engine: Engine, outbox: Outbox, ledger: Ledger
    ):
        self.id = worker_id
        self.deployment = deployment
        self.bus = bus
        self.engine = engine
        self.outbox = outbox
        self.ledger = ledger
        self.slots = 0
        self.compat = ""
        self.clock_offset_ms = 0.0
        self.closed = False
        self.executions: dict[str, Execution] = {}
        self.wake: Callable[[], None] = _nothing
        self.pause: Callable[[str, float], Awaitable[None]] = _no_pause
        self.total = self.failed = 0
        self.last_work_ms = 0
        self._runs = Bucket(bus, names.BUCKET_RUNS)
        self._ended: OrderedDict[str, None] = OrderedDict()
        self._tasks: set[asyncio.Task[None]] = set()

    def free(self) -> int:
        """Slots that a request could start in now."""
        return 0 if self.closed else self.slots - len(self.executions)

    def take(self, pulled: Pulled) -> None:
        """Gets each pulled message, on the event loop; nothing here waits."""
        try:
            request = decode_request(pulled.data)
        except msgspec.MsgspecError as error:
            self._spawn(self._bury(pulled, None, Decision("dead", f"it cannot be decoded: {error}")))
            return
        if pulled.delivery > 1:
            # Rare, and what has become of the earlier deliveries is read from a bucket first.
            self._spawn(self._take_again(request, pulled))
        else:
            self._judge(request, pulled, 0)

    async def _take_again(self, request: Request, pulled: Pulled) -> None:
        self._judge(request, pulled, await self._read_starts(request))

    def _judge(self, request: Request, pulled: Pulled, starts: int) -> None:
        now_ms = time.time_ns() / 1e6 + self.clock_offset_ms
        decision = decide(
            request,
            now_ms=now_ms,
            stored_ms=pulled.stored_ms,
            starts=starts,
            revision=self.deployment.revision,
            compat=self.compat,
            free=self.free(),
            ended=names.message_id(request.id, request.attempt) in self._ended,
            worker=self.id,
        )
        match decision.action:
            case "run":
                left_s = (pulled.stored_ms + request.budget_ms - now_ms) / 1000
                self._accept(request, pulled, asyncio.get_running_loop().time() + left_s)
            case "give_back":
                delay_ns = decision.delay_ms * 1_000_000
                body = b'-NAK {"delay": %d}' % delay_ns if delay_ns else b"-NAK"
                self._spawn(self._answer(pulled, body))
            case "leave":
                self._spawn(self._leave(pulled))
            case "done":
                self._spawn(self._answer(pulled, b"+ACK"))
            case "expire":
                error = DeadlineExceeded(f"the request expired in the queue: {decision.why}")
                self._spawn(self._refuse(request, pulled, error))
            case "dead":
                self._spawn(self._bury(pulled, request, decision))

    def _accept(self, request: Request, pulled: Pulled, deadline: float) -> None:
        run = names.run_name(request.attempt, pulled.delivery, self.id)
        ring = self.outbox.open(request.id, run)
        execution = Execution(request, pulled, run, ring, deadline)
        self.executions[names.run_key(request.id, run)] = execution
        self.outbox.send(
            ring,
            Accepted(
                id=request.id,
                run=run,
                seq=execution.next_seq(),
                ack_subject=pulled.ack_subject,
                position=sum(map(len, request.output_token_ids)),
                compat=self.compat,
                delivery=pulled.delivery,
            ),
        )
        execution.task = asyncio.create_task(self._run(execution))

    async def _run(self, execution: Execution) -> None:
        usage, outcome, code = Usage(), "cancelled", "request_cancelled"
        try:
            if execution.pulled.delivery > 1 and not await self._may_start(execution):
                return
            try:
                task = await self._task_of(execution.request)
            except ModelBusError as error:
                self._end_with(execution, error)
                outcome, code = "failed", error.code
                return
            usage, outcome, code = await execute(execution, task, self.engine, self.outbox)
        except asyncio.CancelledError:
            # Cancelled while it was held: the engine never saw it.
            if execution.cancelled and execution.counts:
                self._end_with(execution, ModelBusError(execution.stop_reason))
        finally:
            self._close(execution, usage, outcome, code)

    def _end_with(self, execution: Execution, error: ModelBusError) -> None:
        frame = error.failed(id=execution.request.id, run=execution.run, seq=execution.next_seq())
        self.outbox.send(execution.ring, frame)

    def _close(self, execution: Execution, usage: Usage, outcome: str, code: str) -> None:
        """Frees the slot, books the usage and lets the message go."""
        request, pulled = execution.request, execution.pulled
        execution.state = "ended"
        self.executions.pop(names.run_key(request.id, execution.run), None)
        self.outbox.end(execution.ring)
        self.total += 1
        self.failed += outcome == "failed"
        self.last_work_ms = time.time_ns() // 1_000_000
        self.wake()
        queue_ms = max(0.0, self._started_ms_of(execution) + self.clock_offset_ms - pulled.stored_ms)
        event = usage_event(
            execution, deployment=self.deployment.name, usage=usage, outcome=outcome, code=code, queue_ms=queue_ms
        )
        if execution.counts:
            self._ended[names.message_id(request.id, request.attempt)] = None
            if len(self._ended) > ENDED_KEPT:
                self._ended.popitem(last=False)
        # A run that does not count leaves the message to the one that does.
        self.ledger.book(event, pulled.ack_subject if execution.counts else "")

    def _started_ms_of(self, execution: Execution) -> float:
        return time.time_ns() / 1e6 - (time.monotonic() - (execution.started_at or execution.began)) * 1000

    async def _task_of(self, request: Request) -> Task:
        if request.task is not None:
            return request.task
        if request.blob is None:
            raise PoisonRequest("the request has no task")
        return decode_task(await get_blob(self.bus, request.blob))

    # Deliveries that are not the first

    async def _read_starts(self, request: Request) -> int:
        try:
            entry = await self._runs.get(request.id)
        except ModelBusError:
            return 0
        return int(entry.value) if entry is not None and not entry.deleted else 0

    async def _may_start(self, execution: Execution) -> bool:
        """Asks the publisher whether this run shall count, and counts the start."""
        execution.go = asyncio.get_running_loop().create_future()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(GO_WAIT_S):
                if not await execution.go:
                    return False
        for _ in range(5):
            try:
                entry = await self._runs.get(execution.request.id)
                starts = int(entry.value) if entry is not None and not entry.deleted else 0
                await self._runs.update(execution.request.id, str(starts + 1).encode(), entry.seq if entry else 0)
                return True
            except Conflict:
                continue
            except ModelBusError as error:
                log.warning("the start of %s cannot be counted: %s", execution.request.id, error.message)
                return True
        return True

    # Ends without a run

    async def _answer(self, pulled: Pulled, body: bytes) -> None:
        with contextlib.suppress(BusUnavailable):
            await self.bus.publish(pulled.ack_subject, body)

    async def _leave(self, pulled: Pulled) -> None:
        """Gives a message back and asks that consumer for nothing, so that another worker gets it."""
        await self.pause(pulled.consumer, LEAVE_S)
        await self._answer(pulled, b"-NAK")

    async def _refuse(self, request: Request, pulled: Pulled, error: ModelBusError) -> None:
        """Ends a request that was not run: the client hears why, then the message goes."""
        run = names.run_name(request.attempt, pulled.delivery, self.id)
        ring = self.outbox.open(request.id, run)
        accepted = Accepted(id=request.id, run=run, seq=0, ack_subject=pulled.ack_subject, delivery=pulled.delivery)
        self.outbox.send(ring, accepted)
        self.outbox.send(ring, error.failed(id=request.id, run=run, seq=1))
        self.outbox.end(ring)
        await self._answer(pulled, f"+TERM {error.code}".encode())

    async def _bury(self, pulled: Pulled, request: Request | None, decision: Decision) -> None:
        """Stores a dead letter, and only then tells the client and removes the message."""
        letter = DeadLetter(
            id=request.id if request else "",
            model=request.model if request else self.deployment.model,
            reason="poison_request" if request else "not_decodable",
            detail=decision.why,
            crashes=request.crashes if request else 0,
            original=pulled.data,
            subject=pulled.subject,
            at_ms=time.time_ns() // 1_000_000,
        )
        try:
            await self.bus.js_publish(
                names.dead_subject(letter.model), encode(letter), msg_id=f"dead.{pulled.stream}.{pulled.seq}"
            )
        except ModelBusError as error:
            log.warning("a dead letter cannot be stored, its message stays: %s", error.message)
            return
        if request is not None:
            await self._refuse(request, pulled, PoisonRequest(f"the request was given up: {decision.why}"))
        else:
            await self._answer(pulled, b"+TERM not decodable")

    def _spawn(self, coroutine: Coroutine[None, None, None]) -> None:
        task = asyncio.create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def _nothing() -> None:
    """Nobody is woken before the worker pulls."""


async def _no_pause(_consumer: str, _seconds: float) -> None:
    """Nothing is pulled yet."""
