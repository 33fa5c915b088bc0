"""What a worker does with the messages it pulls: judges each, runs it, and lets its message go."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import OrderedDict
from collections.abc import Callable
from typing import assert_never

import msgspec
from modelbus_broker import names
from modelbus_broker.blobs import get_blob
from modelbus_broker.connection import Bus
from modelbus_broker.errors import (
    DeadlineExceeded,
    EngineFailed,
    ModelBusError,
    PoisonRequest,
    RequestCancelled,
)
from modelbus_broker.messages import (
    Accepted,
    Answered,
    Deployment,
    Request,
    Task,
    Usage,
    decode_request,
    decode_task,
)
from modelbus_broker.pulling import Pulled
from modelbus_broker.starts import Starts
from modelbus_broker.topology import ACK_WAIT_S

from . import spans
from .admission import decide
from .answers import AnswerKeeper
from .detached import again_s
from .endings import Endings
from .engines.base import Engine
from .execution import Execution, execute, usage_event
from .forms import Forms
from .ledger import Ledger
from .outbox import Outbox
from .starting import Starting, check_time

log = logging.getLogger(__name__)

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
        wake: called when a slot is free again.
        endings: of messages that are not run here to their end.
        starting: what runs wait for before the engine gets them.
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
        self.total = self.failed = 0
        self.last_work_ms = 0
        self._loop = asyncio.get_running_loop()
        self.pulse: Callable[[], float] = time.monotonic
        self._doubt_until = 0.0
        self._starts = Starts(bus)
        self._answers = AnswerKeeper(bus)
        self.endings = Endings(worker_id, deployment, bus, outbox, ledger, self._answers)
        self.starting = Starting(worker_id, bus, self._starts, self._answers, self.endings)
        self._ended: OrderedDict[str, str] = OrderedDict()  #: message id -> the run that ended it
        #: Ids that someone wanted stopped before they came.
        self._cancelled: OrderedDict[str, None] = OrderedDict()

    def free(self) -> int:
        """Slots that a request could start in now."""
        return 0 if self.closed or self.starting.one_alone else self.slots - len(self.executions)

    def take(self, pulled: Pulled) -> None:
        """Gets each pulled message, on the event loop; nothing here waits."""
        try:
            request = decode_request(pulled.data)
            names.publisher_of(request.id)
        except (msgspec.MsgspecError, ValueError) as error:
            self.endings.spawn(self.endings.bury_unreadable(pulled, f"it cannot be decoded: {error}"))
            return
        now = self.pulse()  # first: a message may have come while we stood still
        uncertain = pulled.delivery > 1 or now < self._doubt_until
        if uncertain and (held := self._held(request)) is not None:
            # The bus has forgotten that it gave us this message. There is one run, and from now on it is this
            # delivery that is kept in progress and acknowledged.
            held.pulled = pulled
            self.endings.spawn(self.endings.answer(pulled, b"+WPI"))
        elif pulled.delivery > 1:
            # Rare, and what has become of the earlier deliveries is read from a bucket first.
            self.endings.spawn(self._take_again(request, pulled))
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
            starts = await self._starts.read(request.id, request.attempt)
            # Its worker may have died between the answer and the acknowledgement: whoever asks finds the answer.
            answered = bool(request.answer_kept_s) and await self._answers.has(request.id)
        except ModelBusError as error:
            log.warning("what became of %s earlier is not known now: %s", request.id, error.message)
            await self.endings.leave(pulled)
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
                self.endings.spawn(self.endings.answer(pulled, body))
            case "leave":
                self.endings.spawn(self.endings.leave(pulled))
            case "done":
                key = names.run_key(request.id, ended) if ended is not None else ""
                still_booking = self.ledger.delivered_again(key, pulled.ack_subject)
                self.endings.spawn(self.endings.answer(pulled, b"+WPI" if still_booking else b"+ACK"))
            case "expire":
                error = DeadlineExceeded(f"the request expired in the queue: {decision.why}")
                self.endings.refuse(request, pulled, error, now_ms=now_ms)
            case "cancelled":
                self.endings.refuse(request, pulled, RequestCancelled(decision.why), now_ms=now_ms)
            case "dead":
                self.endings.spawn(self.endings.bury(request, pulled, decision.why, now_ms=now_ms))
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
            self.starting.needs_all(execution, len(self.executions))
        execution.task = self._loop.create_task(self._run(execution))

    async def _run(self, execution: Execution) -> None:
        usage, outcome, code = Usage(), "cancelled", "request_cancelled"
        execution.entered = True
        try:
            if execution.cancelled:
                raise asyncio.CancelledError
            try:
                if self.starting.has_to_wait(execution) and not await self.starting.may_start(execution):
                    return
                task = execution.request.task or await self._task_of(execution)
            except ModelBusError as error:
                self._end_with(execution, error)
                outcome, code = "failed", error.code
                return
            spans.begin(execution, task, stored_ms=execution.pulled.stored_ms - self.clock_offset_ms)
            usage, outcome, code = await execute(execution, task, self.forms, self.outbox)
            if code == EngineFailed.code:
                await self.endings.keep(execution)
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
            self.endings.spawn(self.give_again(execution))

    def _close(self, execution: Execution, usage: Usage, outcome: str, code: str) -> None:
        """Frees the slot, books the usage and lets the message go."""
        request, pulled = execution.request, execution.pulled
        execution.state = "ended"
        spans.finish(execution, usage, outcome, code)
        self.executions.pop(names.run_key(request.id, execution.run), None)
        self.starting.ended(execution, len(self.executions))
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
            self.endings.spawn(self.give_again(execution, pause_s))
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
            await self._starts.count(execution.request.id, execution.request.attempt, -1)  # it did not end its worker
        body = b'-NAK {"delay": %d}' % round(pause_s * 1e9) if pause_s else b"-NAK"
        await self.endings.answer(execution.pulled, body)

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
            self.endings.spawn(self._book_in_place(execution, answered))

    async def _book_in_place(self, execution: Execution, answered: Answered) -> None:
        request, pulled = execution.request, execution.pulled
        try:
            booked = await self.ledger.has(request.id, answered.counted, since_ms=pulled.stored_ms)
        except ModelBusError as error:
            log.warning("whether %s was billed is not known now: %s", request.id, error.message)
            return  # its message comes again
        if booked:
            await self.endings.answer(pulled, b"+ACK")
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
        check_time(execution)
        return decode_task(body)


def _nothing() -> None:
    """Nobody is woken before the worker pulls."""
