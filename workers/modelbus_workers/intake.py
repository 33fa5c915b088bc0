"""What a worker does with the messages it pulls: judges each, runs it or ends it, and lets its message go."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Coroutine
from typing import assert_never

import msgspec
from modelbus_broker import names
from modelbus_broker.blobs import get_blob
from modelbus_broker.buckets import Bucket
from modelbus_broker.connection import Bus
from modelbus_broker.dead import bury, letter_of
from modelbus_broker.errors import (
    BusUnavailable,
    Conflict,
    DeadlineExceeded,
    EngineFailed,
    ModelBusError,
    PoisonRequest,
    RequestCancelled,
)
from modelbus_broker.messages import (
    Accepted,
    Answered,
    DeadLetter,
    Deployment,
    Request,
    Task,
    Usage,
    UsageEvent,
    decode_request,
    decode_task,
)
from modelbus_broker.pulling import Pulled
from modelbus_broker.topology import ACK_WAIT_S

from . import spans
from .admission import decide
from .answers import AnswerKeeper
from .detached import again_s, runs_elsewhere
from .engines.base import Engine
from .execution import Execution, execute, usage_event
from .forms import Forms
from .ledger import Ledger
from .liveness import PUBLISHER_DEAD_S
from .outbox import Outbox

log = logging.getLogger(__name__)

GO_WAIT_S = 0.3
#: A worker that leaves a request to others does not look at its consumer for so long.
LEAVE_S = 1.0
ENDED_KEPT = 20_000  #: how many answered attempts a worker remembers
CANCELLED_KEPT = 10_000  #: how many cancelled ids


class Intake:
    """The requests in a worker's hands.

    Attributes:
        slots, compat: of the worker, set when its engine is ready.
        clock_offset_ms: the server's clock minus ours.
        closed: takes nothing new; what comes is given back.
        executions: held and running requests, by run key.
        pulse: called before a message is judged, for the time.
        reach: tells a publisher what runs for it; False when nobody listens there.
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
        self.forms = Forms(engine)
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
        self._loop = asyncio.get_running_loop()
        self.pulse: Callable[[], float] = time.monotonic
        self.reach: Callable[[str], Awaitable[bool]] = _nobody
        self._doubt_until = 0.0
        self._runs = Bucket(bus, names.BUCKET_RUNS)
        self._answers = AnswerKeeper(bus)
        self._ended: OrderedDict[str, str] = OrderedDict()  #: message id -> the run that ended it
        #: Ids that someone wanted stopped before they came.
        self._cancelled: OrderedDict[str, None] = OrderedDict()
        #: The request that has this worker to itself, or waits for that, and what tells it that the others have gone.
        self._alone: Execution | None = None
        self._others_gone = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()

    def free(self) -> int:
        """Slots that a request could start in now."""
        return 0 if self.closed or self._alone is not None else self.slots - len(self.executions)

    def take(self, pulled: Pulled) -> None:
        """Gets each pulled message, on the event loop; nothing here waits."""
        try:
            request = decode_request(pulled.data)
            names.publisher_of(request.id)
        except (msgspec.MsgspecError, ValueError) as error:
            self._spawn(self._bury_unreadable(pulled, f"it cannot be decoded: {error}"))
            return
        now = self.pulse()  # first: a message may have come while we stood still
        uncertain = pulled.delivery > 1 or now < self._doubt_until
        if uncertain and (held := self._held(request)) is not None:
            # The bus has forgotten that it gave us this message. There is one run, and from now on it is this
            # delivery that is kept in progress and acknowledged.
            held.pulled = pulled
            self._spawn(self._answer(pulled, b"+WPI"))
        elif pulled.delivery > 1:
            # Rare, and what has become of the earlier deliveries is read from a bucket first.
            self._spawn(self._take_again(request, pulled))
        else:
            self._judge(request, pulled, 0)

    def doubt(self) -> None:
        """Messages that come from now on may be with another worker too."""
        self._doubt_until = time.monotonic() + ACK_WAIT_S

    def _held(self, request: Request) -> Execution | None:
        """The run of this very attempt that is here already."""
        for execution in self.executions.values():
            same = execution.request.id == request.id and execution.request.attempt == request.attempt
            if same and execution.counts:
                return execution
        return None

    def cancel(self, request_id: str) -> None:
        """Someone wants a request stopped that is not here: it may be on its way."""
        self._cancelled[request_id] = None
        if len(self._cancelled) > CANCELLED_KEPT:
            self._cancelled.popitem(last=False)

    async def _take_again(self, request: Request, pulled: Pulled) -> None:
        try:
            starts = await self._read_starts(request)
            # Its worker may have died between the answer and the acknowledgement: whoever asks finds the answer.
            answered = bool(request.answer_kept_s) and await self._answers.has(request.id)
        except ModelBusError as error:
            log.warning("what became of %s earlier is not known now: %s", request.id, error.message)
            await self._leave(pulled)
            return
        self._judge(request, pulled, starts, answered=answered)

    def _judge(self, request: Request, pulled: Pulled, starts: int, *, answered: bool = False) -> None:
        now_ms = time.time_ns() / 1e6 + self.clock_offset_ms
        ended = self._ended.get(names.message_id(request.id, request.attempt))
        decision = decide(
            request,
            now_ms=now_ms,
            stored_ms=pulled.stored_ms,
            starts=starts,
            revision=self.deployment.revision,
            compat=self.compat,
            free=self.free(),
            ended=answered or ended is not None,
            worker=self.id,
            cancelled=request.id in self._cancelled,
        )
        match decision.action:
            case "run" | "run_alone":
                left_s = (pulled.stored_ms + request.budget_ms - now_ms) / 1000
                deadline = self._loop.time() + left_s
                self._accept(request, pulled, deadline, alone=decision.action == "run_alone")
            case "give_back":
                delay_ns = decision.delay_ms * 1_000_000
                body = b'-NAK {"delay": %d}' % delay_ns if delay_ns else b"-NAK"
                self._spawn(self._answer(pulled, body))
            case "leave":
                self._spawn(self._leave(pulled))
            case "done":
                key = names.run_key(request.id, ended) if ended is not None else ""
                still_booking = self.ledger.delivered_again(key, pulled.ack_subject)
                self._spawn(self._answer(pulled, b"+WPI" if still_booking else b"+ACK"))
            case "expire":
                error = DeadlineExceeded(f"the request expired in the queue: {decision.why}")
                self._refuse(request, pulled, error)
            case "cancelled":
                self._refuse(request, pulled, RequestCancelled(decision.why))
            case "dead":
                self._spawn(self._bury(request, pulled, decision.why))
            case _:
                assert_never(decision.action)

    def _accept(self, request: Request, pulled: Pulled, deadline: float, *, alone: bool) -> None:
        run = names.run_name(request.attempt, pulled.delivery, self.id)
        ring = self.outbox.open(request.id, run, request.publisher, silent=request.detached)
        execution = Execution(request, pulled, run, ring, deadline)
        if not request.detached:
            ring.execution = execution
        execution.asks = pulled.delivery > 1 or time.monotonic() < self._doubt_until
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
                asks=execution.asks,
                continues=request.continues,
                starts=[[len(ids), n] for ids, n in zip(request.output_token_ids, request.emitted_chars, strict=False)],
                view=request.view,
            ),
        )
        if alone:
            self._alone = execution
            self._others_gone.clear()
            if len(self.executions) == 1:
                self._others_gone.set()
        execution.task = self._loop.create_task(self._run(execution))

    async def _run(self, execution: Execution) -> None:
        usage, outcome, code = Usage(), "cancelled", "request_cancelled"
        execution.entered = True
        try:
            if execution.cancelled:
                raise asyncio.CancelledError
            try:
                if self._has_to_wait(execution) and not await self._may_start(execution):
                    return
                task = execution.request.task or await self._task_of(execution)
            except ModelBusError as error:
                self._end_with(execution, error)
                outcome, code = "failed", error.code
                return
            spans.begin(execution, task, stored_ms=execution.pulled.stored_ms - self.clock_offset_ms)
            usage, outcome, code = await execute(execution, task, self.forms, self.outbox)
            if code == EngineFailed.code:
                await self._keep(execution)
        except asyncio.CancelledError:
            # Cancelled while it was held: the engine never saw it.
            if execution.cancelled and execution.counts:
                end, outcome = execution.stopped()
                code = end.code
                self._end_with(execution, end, handover=outcome == "handed_over")
        finally:
            self._close(execution, usage, outcome, code)

    def _end_with(self, execution: Execution, error: ModelBusError, *, handover: bool = False) -> None:
        execution.error = error
        request_id, seq = execution.request.id, execution.next_seq()
        self.outbox.send(execution.ring, error.failed(id=request_id, run=execution.run, seq=seq, handover=handover))

    def hand_over_now(self, execution: Execution) -> None:
        """Hands over a run whose engine does not let go of it: whatever it still says, nobody hears."""
        if execution.counts:
            error, _ = execution.stopped()
            self._end_with(execution, error, handover=execution.handed_over)
        execution.counts = False
        execution.state = "ended"
        self.executions.pop(names.run_key(execution.request.id, execution.run), None)
        self.outbox.end(execution.ring)
        if execution.request.detached:
            self._spawn(self.give_again(execution))

    def _close(self, execution: Execution, usage: Usage, outcome: str, code: str) -> None:
        """Frees the slot, books the usage and lets the message go."""
        request, pulled = execution.request, execution.pulled
        execution.state = "ended"
        spans.finish(execution, usage, outcome, code)
        self.executions.pop(names.run_key(request.id, execution.run), None)
        if self._alone is execution:
            self._alone = None
        elif self._alone is not None and len(self.executions) == 1:
            self._others_gone.set()
        self.outbox.end(execution.ring)
        self.total += 1
        self.failed += outcome == "failed"
        self.last_work_ms = time.time_ns() // 1_000_000
        self.wake()
        queue_ms = max(0.0, self._started_ms_of(execution) + self.clock_offset_ms - pulled.stored_ms)
        event = usage_event(
            execution, deployment=self.deployment.name, usage=usage, outcome=outcome, code=code, queue_ms=queue_ms
        )
        execution.handed_over = outcome == "handed_over"
        owns = execution.counts and not execution.handed_over
        if request.detached and execution.counts and (pause_s := self._again_s(execution, outcome)) is not None:
            owns = False
            self._spawn(self.give_again(execution, pause_s))
        if owns:
            self._ended[names.message_id(request.id, request.attempt)] = execution.run
            if len(self._ended) > ENDED_KEPT:
                self._ended.popitem(last=False)
        keep = None
        if owns and outcome == "done" and request.answer_kept_s:
            ring = execution.ring
            keep = self._answers.keep(request, ring, list(ring.frames))
        elif owns and request.detached:
            keep = self._answers.keep_error(request, execution.error or ModelBusError(code), execution.run)
        # A run that does not count, or is handed over, leaves the message to the one that does.
        ack_subject = pulled.ack_subject if owns else ""
        publisher = "" if request.detached else execution.ring.publisher
        self.ledger.book(event, ack_subject, publisher=publisher, since=execution.began, first=keep)

    def _again_s(self, execution: Execution, outcome: str) -> float | None:
        """After how long a job goes to a worker again; None: it is over."""
        if outcome == "handed_over":
            return 0.0
        if outcome != "failed" or not execution.retryable or execution.error is None:
            return None
        return again_s(
            delivery=execution.pulled.delivery,
            left_s=execution.deadline - self._loop.time(),
            retry_after_s=execution.error.retry_after_s,
        )

    async def give_again(self, execution: Execution, pause_s: float = 0.0) -> None:
        """Lets the queue deliver a run's message again, to whom it wants: nobody publishes a next attempt of it."""
        if execution.counted:
            await self._count_start(execution.request, -1)  # it did not end its worker
        body = b'-NAK {"delay": %d}' % round(pause_s * 1e9) if pause_s else b"-NAK"
        await self._answer(execution.pulled, body)

    async def settle(self, timeout_s: float) -> None:
        """Waits for what is still to be said of messages that were not run here to their end."""
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=timeout_s)

    def disown(self, run_key: str) -> None:
        """Another run counts in place of one that has ended here: its message, should it come again, is not done."""
        self.ledger.disown(run_key)
        request_id, _, run = run_key.rpartition("/")
        message_id = names.message_id(request_id, names.parse_run(run)[0])
        if self._ended.get(message_id) == run:
            del self._ended[message_id]

    def answered_elsewhere(self, answered: Answered) -> None:
        """Lets go of a run whose request was answered by a worker that, mostly, died before it could book that."""
        execution = self.executions.get(names.run_key(answered.id, answered.run))
        if execution is not None and execution.counts:
            execution.let_go()
            self._spawn(self._book_in_place(execution, answered))

    async def _book_in_place(self, execution: Execution, answered: Answered) -> None:
        request, pulled = execution.request, execution.pulled
        try:
            booked = await self.ledger.has(request.id, answered.counted, since_ms=pulled.stored_ms)
        except ModelBusError as error:
            log.warning("whether %s was billed is not known now: %s", request.id, error.message)
            return  # its message comes again
        if booked:
            await self._answer(pulled, b"+ACK")
            return
        event = usage_event(
            execution, deployment=self.deployment.name, usage=answered.usage, outcome="done", code="", queue_ms=0.0
        )
        event = msgspec.structs.replace(event, run=answered.counted, outcome="done", run_ms=0.0)
        self.ledger.book(event, pulled.ack_subject)

    def ended_run(self, request_id: str) -> str | None:
        """The run that ended a request here, as far back as this worker remembers."""
        for message_id, run in reversed(self._ended.items()):
            if message_id.startswith(request_id):
                return run
        return None

    def _started_ms_of(self, execution: Execution) -> float:
        return time.time_ns() / 1e6 - (time.monotonic() - (execution.started_at or execution.began)) * 1000

    async def _task_of(self, execution: Execution) -> Task:
        request = execution.request
        if request.blob is None:
            raise PoisonRequest("the request has no task")
        body = await get_blob(self.bus, request.blob)
        _check_time(execution)
        return decode_task(body)

    # Before the engine gets it

    def _has_to_wait(self, execution: Execution) -> bool:
        """Something is to be done before the run may start; False for most."""
        request = execution.request
        kept = request.background or request.idempotency_key
        return bool(kept) or execution.asks or self._alone is execution

    async def _may_start(self, execution: Execution) -> bool:
        """Waits until the run may start; False when another run counts.

        Raises:
            DeadlineExceeded: its time was up before it could be alone.
        """
        request = execution.request
        again = execution.pulled.delivery > 1
        if request.detached:
            if not await self._is_open(execution):
                return False
        elif execution.asks and not await self._is_wanted(execution):
            return False
        if self._alone is execution:
            try:
                async with asyncio.timeout_at(execution.deadline):
                    await self._others_gone.wait()
            except TimeoutError as error:
                raise DeadlineExceeded("its time was up before it could run alone in its worker") from error
        # Who publishes the next attempt counts the lost runs; these may lose their publisher and run on.
        if again or request.background or request.idempotency_key:
            await self._count_start(request)
            execution.counted = True
        _check_time(execution)
        return True

    async def _is_open(self, execution: Execution) -> bool:
        """Whether a job is still to be run: nobody else runs it, and it has not ended or been cancelled."""
        try:
            if execution.asks and await runs_elsewhere(self.bus, self.id, execution.request.id):
                # Who runs it keeps the message in progress and acknowledges it.
                execution.counts = False
                return False
            if await self._answers.settled(execution.request.id):
                execution.counts = False
                self._spawn(self._answer(execution.pulled, b"+ACK"))
                return False
        except ModelBusError as error:
            log.warning("whether job %s is still open is not known now: %s", execution.request.id, error.message)
        return True

    async def _is_wanted(self, execution: Execution) -> bool:
        """Asks the publisher whether this run shall count.

        Where it is gone, a request that is to run to its end runs, and any other ends here: its client is gone too,
        perhaps with the whole answer, and one that comes back has it published anew.
        """
        execution.go = asyncio.get_running_loop().create_future()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(GO_WAIT_S):
                return await execution.go
        request = execution.request
        if request.background or request.idempotency_key:
            return True
        until = time.monotonic() + PUBLISHER_DEAD_S
        while not await self.reach(execution.ring.publisher):
            if time.monotonic() > until:
                # Nothing is said: whoever reads the frames later shall not take this for the end of the answer.
                execution.counts = False
                self._spawn(self._answer(execution.pulled, b"+TERM its publisher is gone"))
                return False
            await asyncio.sleep(GO_WAIT_S)
        await asyncio.sleep(0)  # if it answered that nobody wants this run, it ends here
        return execution.counts

    async def _read_starts(self, request: Request) -> int:
        entry = await self._runs.get(names.message_id(request.id, request.attempt))
        return int(entry.value) if entry is not None and not entry.deleted else 0

    async def _count_start(self, request: Request, by: int = 1) -> None:
        """Counts a start, or takes one back that ended in good order."""
        key = names.message_id(request.id, request.attempt)
        for _ in range(5):
            try:
                entry = await self._runs.get(key)
                starts = int(entry.value) if entry is not None and not entry.deleted else 0
                await self._runs.update(key, str(max(0, starts + by)).encode(), entry.seq if entry else 0)
                return
            except Conflict:
                continue
            except ModelBusError as error:
                log.warning("the start of %s cannot be counted: %s", request.id, error.message)
                return

    # Ends without a run

    async def _answer(self, pulled: Pulled, body: bytes) -> None:
        with contextlib.suppress(BusUnavailable):
            await self.bus.publish(pulled.ack_subject, body)

    async def _leave(self, pulled: Pulled) -> None:
        """Gives a message back and asks that consumer for nothing, so that another worker gets it."""
        await self.pause(pulled.consumer, LEAVE_S)
        await self._answer(pulled, b"-NAK")

    def _refuse(self, request: Request, pulled: Pulled, error: ModelBusError) -> None:
        """Ends a request that was not run: the client hears why, it is booked, then the message goes."""
        keep = None
        run = names.run_name(request.attempt, pulled.delivery, self.id)
        if request.detached:
            keep = self._answers.keep_error(request, error, run)
        else:
            self._tell(request.id, request.attempt, pulled, error, request.publisher)
        event = UsageEvent(
            id=request.id,
            run=run,
            model=request.model,
            deployment=self.deployment.name,
            tenant=request.tenant,
            adapter=request.adapter.name if request.adapter is not None else "",
            outcome="cancelled" if isinstance(error, RequestCancelled) else "failed",
            code=error.code,
            at_ms=time.time_ns() // 1_000_000,
            queue_ms=max(0.0, time.time_ns() / 1e6 + self.clock_offset_ms - pulled.stored_ms),
        )
        self.ledger.book(event, pulled.ack_subject, first=keep)

    def _tell(self, request_id: str, attempt: int, pulled: Pulled, error: ModelBusError, publisher: str = "") -> None:
        run = names.run_name(attempt, pulled.delivery, self.id)
        ring = self.outbox.open(request_id, run, publisher)
        accepted = Accepted(id=request_id, run=run, seq=0, ack_subject=pulled.ack_subject, delivery=pulled.delivery)
        self.outbox.send(ring, accepted)
        self.outbox.send(ring, error.failed(id=request_id, run=run, seq=1))
        self.outbox.end(ring)

    # Dead letters

    async def _bury(self, request: Request, pulled: Pulled, why: str) -> None:
        """Stores a dead letter, and only then tells the client and removes the message."""
        letter = letter_of(request, pulled.data, pulled.subject, reason=PoisonRequest.code, detail=why)
        if await self._store(letter, request, pulled):
            self._refuse(request, pulled, PoisonRequest(f"the request was given up: {why}"))

    async def _bury_unreadable(self, pulled: Pulled, why: str) -> None:
        """The same for a message that is no request; its id is read off its headers, where they have one."""
        request_id, _, attempt = pulled.headers.get("Nats-Msg-Id", "").rpartition(".")
        letter = DeadLetter(
            id=request_id,
            model=self.deployment.model,
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
            await self._answer(pulled, b"+TERM not decodable")

    async def _keep(self, execution: Execution) -> None:
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
            await bury(self.bus, letter, request, message_id=f"{pulled.stream}.{pulled.seq}")
        except ModelBusError as error:
            log.warning("a dead letter of request %s cannot be stored: %s", letter.id or "?", error.message)
            return False
        log.error("request %s is put with the dead letters: %s: %s", letter.id or "?", letter.reason, letter.detail)
        return True

    def _spawn(self, coroutine: Coroutine[None, None, None]) -> None:
        task = asyncio.create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def _check_time(execution: Execution) -> None:
    """Work whose time was up while it was being prepared is not started. Raises DeadlineExceeded."""
    if asyncio.get_running_loop().time() > execution.deadline:
        raise DeadlineExceeded("the time of the request was up before the engine could have it")


def _nothing() -> None:
    """Nobody is woken before the worker pulls."""


async def _nobody(_publisher: str) -> bool:
    """Publishers are told of runs once the worker serves."""
    return False


async def _no_pause(_consumer: str, _seconds: float) -> None:
    """Nothing is pulled yet."""
