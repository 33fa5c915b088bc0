"""Publishing requests and routing their answers, for gateways and for SDK processes.

One wildcard subscription brings the frames of all requests; its callback sorts them into their calls and wakes the
readers. Every 400 ms the publisher looks at what it waits for: a worker that was silent for 1.2 s is probed, and
when it is gone, or no longer lists a run, that run is lost and the request is published as its next attempt.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import OrderedDict
from collections.abc import Callable, Coroutine, Sequence
from functools import partial
from typing import Any, Literal

import msgspec

from . import names, topology
from .aborts import Aborts
from .asking import CallOptions, check_room, make_request
from .blobs import INLINE_LIMIT, put_blob
from .calls import Call
from .connection import Bus, Msg, NoResponders
from .errors import (
    BusUnavailable,
    DeadlineExceeded,
    ModelBusError,
    ModelNotFound,
    RequestCancelled,
    WorkerLost,
    error_of,
)
from .failover import Again, GiveUp, GoOn, RunEnd, heir_lives, next_attempt
from .messages import (
    TERMINAL,
    Accepted,
    Alive,
    AliveReply,
    Cancel,
    Cancelled,
    Control,
    Delta,
    Deployment,
    Failed,
    Go,
    LetGo,
    Probe,
    Request,
    Resend,
    Stop,
    Task,
    decode_alive,
    decode_frames,
    decode_publisher_control,
    encode,
)
from .moving import Moving
from .reception import Verdict
from .registry import Registry
from .standstill import StandstillWatch
from .storing import HEAR_FIRST_S, Publication, PublisherSettings, Storing

log = logging.getLogger(__name__)

ALIVE_S = 0.4
SILENT_S = 1.2
PROBE_S = 0.3
#: After a reconnect live peers can look dead for some ms; nobody is declared dead so soon after it.
RECONNECT_GRACE_S = 3.0
#: The message of a lost run is terminated again and again for so long; a cluster may have to choose a leader first.
TERMINATE_S = 30.0
#: When a publisher is closed, what it takes back has so long to be gone.
CLOSE_S = 3.0
#: So long whoever cancels a request from elsewhere waits to hear that its engine has let go.
LET_GO_S = 2.0
SUPERSEDED_KEPT = 10_000  #: how many runs a publisher remembers that were given up
ANSWERED_KEPT = 10_000  #: and of how many requests that are over it remembers which run counted
#: What was said before travels inside the next attempt up to this size.
EARLIER_LIMIT = 128 << 10


class Publisher:
    """Publishes requests and hands out their answers as calls."""

    def __init__(
        self,
        bus: Bus,
        registry: Registry,
        *,
        kind: Literal["gateway", "sdk"],
        settings: PublisherSettings | None = None,
    ) -> None:
        self.bus = bus
        self.registry = registry
        self.settings = settings or PublisherSettings()
        self.id = names.new_publisher_id(kind)
        #: Messages per model token in the queues when last polled.
        self.depths: dict[str, int] = {}
        self.standstill = StandstillWatch(
            bus, registry, lambda: self._per_model, after_s=self.settings.stuck_after_s
        )  #: of the queues that this publisher waits for
        self.moving = Moving(self)
        self.aborts = Aborts()
        self._storing = Storing(bus, self.settings, self.spawn)
        self._calls: dict[str, Call] = {}
        self._per_model: dict[str, int] = {}
        self._heard: dict[str, float] = {}  # worker -> when
        self._superseded: OrderedDict[str, None] = OrderedDict()  #: keys of runs that were given up as lost
        self._answered: OrderedDict[str, str] = OrderedDict()  #: request -> the run that counted
        self._declared: set[str] = set()  #: subjects of half answers whose consumer is there
        self._worker_offset = len(names.response_subject(self.id, ""))
        self._tasks: set[asyncio.Task[Any]] = set()
        self._background: list[asyncio.Task[None]] = []
        self._subscriptions: list[Any] = []
        self._busy = asyncio.Event()
        self._listeners: dict[Callable[[], None], None] = {}  #: to be told when the message is sorted in
        self.loop = asyncio.get_running_loop()

    # Life

    async def start(self) -> None:
        """Subscribes to answers.

        Raises:
            BusUnavailable: the bus does not take the subscriptions.
        """
        self._subscriptions = [
            await self.bus.subscribe(names.response_subject(self.id, "*"), self._on_frames),
            await self.bus.subscribe(names.alive_subject(self.id), self._on_alive),
            await self.bus.subscribe(names.control_subject(self.id), self._on_control),
        ]
        self.bus.on_reconnect(self._on_reconnect)
        self._background = [
            asyncio.create_task(self._watch(), name="publisher-watch"),
            asyncio.create_task(self._poll_depths(), name="publisher-depths"),
            asyncio.create_task(self.standstill.run(), name="publisher-standstill"),
        ]

    async def close(self) -> None:
        """Cancels what still runs and stops listening."""
        await self.give_up(RequestCancelled("the publisher was closed"))
        if self._tasks:  # what was cancelled just now is still being taken back
            await asyncio.wait(self._tasks, timeout=CLOSE_S)
        for task in [*self._background, *self._tasks]:
            task.cancel()
        await asyncio.gather(*self._background, *self._tasks, return_exceptions=True)
        for subscription in self._subscriptions:
            await subscription.unsubscribe()

    async def give_up(self, error: ModelBusError) -> None:
        """Ends all requests here with an error. Those that run in the background, or that another publisher may
        take up, go on without us."""
        calls = [call for call in self._calls.values() if not call.request.background]
        for call in calls:
            if call.outlives:
                self.moving.away(call.id)
                call.on_failure = None
            call.fail(error)
        ending = [self.withdraw(call) for call in calls if not call.outlives]
        await asyncio.gather(*ending, return_exceptions=True)

    def in_flight(self) -> int:
        """Requests whose last frame has not come."""
        return len(self._calls)

    # Publishing

    async def submit(self, model: str, task: Task, options: CallOptions | None = None) -> Call:
        """Publishes a request and returns when the queue has stored it: from then on it is not lost.

        Raises:
            ModelNotFound: no deployment serves this model.
            ModelUnavailable: none of its workers is alive (and ``options.wait`` is off).
            QueueFull: the model's queue is at its limit.
            BusUnavailable: the bus did not store it in time.
        """
        call = await self.publish(model, task, options)
        try:
            await call.stored()
        except asyncio.CancelledError:
            call.fail(ModelBusError("cancelled"))
            self.spawn(self.withdraw(call))
            raise
        return call

    async def publish(self, model: str, task: Task, options: CallOptions | None = None) -> Call:
        """Publishes a request and returns at once; for callers that read the answer now.

        When the queue does not take it, reading the call raises what ``submit`` would have raised.

        Raises:
            ModelNotFound, ModelUnavailable, QueueFull: as ``submit``, as far as it is known here.
        """
        options = options or _DEFAULT_OPTIONS
        deployments = self._deployments_of(model)
        waiting = max(self.depths.get(names.model_token(model), 0), self._per_model.get(model, 0))
        check_room(model, deployments, options, self.registry, waiting)
        request = make_request(self.id, model, task, options, deployments)
        call = Call(self, request, self.loop.time() + request.budget_ms / 1000)
        call.outlives = options.outlives
        self.register(call)
        try:
            await self._store(call, names.request_subject(model, options.lane, request.share))
        except asyncio.CancelledError:
            call.fail(ModelBusError("cancelled"))
            self.spawn(self.withdraw(call))
            raise
        except ModelBusError as error:
            call.fail(error)
            raise
        if call.over:
            self.spawn(self.withdraw(call))  # cancelled from elsewhere before it was known what to take back
        if request.budget_ms < 60_000:
            self.loop.call_at(call.deadline, self._expire, call)
        return call

    def describe(self, model: str, task: Task, options: CallOptions) -> Request:
        """The request that ``publish`` would publish.

        Raises:
            ModelNotFound: no deployment serves this model.
        """
        deployments = self._deployments_of(model)
        return make_request(self.id, model, task, options, deployments)

    def _deployments_of(self, model: str) -> Sequence[Deployment]:
        deployments = self.registry.deployments_of(model)
        if not deployments:
            known = ", ".join(self.registry.models()) or "none"
            raise ModelNotFound(f"the model {model!r} is not deployed (deployed: {known})", param="model")
        return deployments

    def call_of(self, request_id: str) -> Call | None:
        """The call of a request that this publisher waits for."""
        return self._calls.get(request_id)

    def register(self, call: Call) -> None:
        """From now on what comes for this request goes to this call."""
        if self._calls.get(call.id) is call:
            return
        self._calls[call.id] = call
        self._per_model[call.model] = self._per_model.get(call.model, 0) + 1
        self._busy.set()

    def leave(self, call: Call) -> None:
        """The reader of a call that outlives it has gone."""
        self.spawn(self.moving.keep(call))

    async def publish_again(self, call: Call) -> None:
        """Publishes a request of another publisher, as that one did or was about to: the queue keeps one.

        Raises:
            ModelBusError: it cannot be sent.
        """
        request = call.attempt
        subject = names.request_subject(request.model, request.lane, request.share)
        if request.lane == "re":
            subject = names.resume_subject(request.model, request.compat)
        await self._store(call, subject)

    def give_up_run(self, call: Call, why: str, *, handover: bool = False) -> None:
        """The run that a call was taken over with is gone: another attempt goes on from its tokens."""
        if handover and call.accepted is not None:
            worker = names.parse_run(call.accepted.run)[2]
            self._follow(call, RunEnd(worker=worker, why=why, compat=call.accepted.compat, handover=True))
        else:
            self._lost(call, why)

    async def _with_blob(self, request: Request) -> bytes:
        """The bytes of a request that is too large for a message: its body goes to the blob store."""
        blob = await put_blob(self.bus, f"{request.id}.{request.attempt}", encode(request.task))
        return encode(msgspec.structs.replace(request, task=None, blob=blob))

    async def _store(
        self, call: Call, subject: str, end: RunEnd | None = None, replaces: Accepted | None = None
    ) -> None:
        """Sends the call's attempt to its queue; ``end`` is that of the run which it follows."""
        payload = encode(call.attempt)
        if len(payload) > INLINE_LIMIT:
            payload = await self._with_blob(call.attempt)
        answered = partial(self._on_stored, call, end)
        call.publication = self._storing.store(call.attempt, subject, payload, answered, replaces)

    def _on_stored(self, call: Call, end: RunEnd | None, publication: Publication) -> None:
        """The stream has answered, or it will not."""
        if publication.error is None:
            if publication.replaces is not None:
                # In this order: a refused publish must not lose the request.
                self.spawn(self._terminate(publication.replaces, "the next attempt is published"))
            call.stored_or_not()
        elif publication is not call.publication:
            return  # of an attempt that another one has followed
        elif end is not None:
            call.fail(_not_again(end, publication.error))
        elif not call.reception.run:  # frames of a run say that it was stored, whatever the stream's answer was
            call.fail(publication.error)

    # Routing

    def _on_frames(self, msg: Msg) -> None:
        worker = msg.subject[self._worker_offset :]
        self._heard[worker] = time.monotonic()
        try:
            frames = decode_frames(msg.data)
        except msgspec.MsgspecError as error:
            log.warning("frames of worker %s cannot be decoded: %s", worker, error)
            return
        size = len(msg.data) // (len(frames) or 1)
        calls, taken = self._calls, Verdict.TAKE
        for frame in frames:
            call = calls.get(frame.id)
            if call is None:
                if type(frame) is Accepted:
                    self._refuse(worker, frame)
                elif type(frame) in TERMINAL:
                    self.aborts.ended(frame)
                continue
            verdict = call.offer(frame, size)
            if verdict is taken:
                if type(frame) is Accepted and (frame.asks or frame.delivery > 1):
                    self.tell(worker, Go(id=frame.id, run=frame.run))
            elif verdict is Verdict.GAP:
                self.ask_resend(call, worker)
            elif verdict is Verdict.STALE:
                if type(frame) not in TERMINAL:
                    self.tell(worker, LetGo(id=frame.id, run=frame.run))
                if type(frame) is Accepted and call.publication is not None and call.publication.stored:
                    # The message of an attempt that another one has followed; its end did not reach the queue.
                    self.spawn(self._terminate(frame, "a later attempt is published"))
            elif verdict is Verdict.RIVAL:
                self.tell(worker, LetGo(id=frame.id, run=frame.run))
        if self._listeners:
            listeners, self._listeners = self._listeners, {}
            for listener in listeners:
                listener()

    def tell_soon(self, listener: Callable[[], None]) -> None:
        """Calls a listener when all frames of the message that is being read are with their calls."""
        self._listeners[listener] = None

    def _refuse(self, worker: str, accepted: Accepted) -> None:
        """A worker has begun with a request that nobody waits for here."""
        if accepted.id not in self.moving:
            # Cancelled while it was queued, or of a publisher's earlier life.
            self.tell(worker, Stop(id=accepted.id, run=accepted.run))
        elif (adopt := self.moving.successor(accepted)) is not None:
            self.tell(worker, adopt)

    def ended(self, call: Call) -> None:
        """A call has its last frame, or an error."""
        if self._calls.get(call.id) is not call:
            return  # it was never ours, or is another call's by now
        del self._calls[call.id]
        if call.reception.run:
            self._answered[call.id] = call.reception.run
            if len(self._answered) > ANSWERED_KEPT:
                self._answered.popitem(last=False)
        if call.publication is not None and call.reception.run:
            self._storing.forget(call.publication)
        left = self._per_model.get(call.model, 1) - 1
        if left:
            self._per_model[call.model] = left
        else:
            self._per_model.pop(call.model, None)

    def ask_resend(self, call: Call, worker: str = "") -> None:
        """Asks the worker of the run that counts for its frames from the next one on."""
        now = time.monotonic()
        if not call.reception.run or now - call.resend_asked < 0.05:
            return
        call.resend_asked = now
        worker = worker or names.parse_run(call.reception.run)[2]
        self.tell(worker, Resend(id=call.id, run=call.reception.run, seq=call.reception.next_seq))

    def tell(self, worker: str, message: Control) -> None:
        """Sends a control message to a worker."""
        self.send(names.control_subject(worker), encode(message))

    def send(self, subject: str, payload: bytes) -> None:
        """Sends something without waiting; while the bus is away it is lost."""
        self.spawn(self._send(subject, payload))

    async def _send(self, subject: str, payload: bytes) -> None:
        with contextlib.suppress(BusUnavailable):
            await self.bus.publish(subject, payload)

    def spawn(self, coroutine: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Runs something beside the reader of a call; it ends with the publisher."""
        task = asyncio.create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    # Alive messages

    def _on_alive(self, msg: Msg) -> None:
        try:
            alive = decode_alive(msg.data)
        except msgspec.MsgspecError as error:
            log.warning("an alive message cannot be decoded: %s", error)
            return
        reply = self._hear(alive)
        if msg.reply:
            self.spawn(self._send(msg.reply, encode(reply)))

    def _hear(self, alive: Alive) -> AliveReply:
        """Compares what a worker runs for us with what we wait for."""
        now = time.monotonic()
        self._heard[alive.worker] = now
        stop: list[str] = []
        confirmed: list[str] = []
        let_go: list[str] = []
        listed: set[str] = set()
        for state in alive.runs:
            listed.add(state.id)
            call = self._calls.get(state.id)
            key = names.run_key(state.id, state.run)
            if key in self._superseded:
                let_go.append(key)
            elif call is None and state.state == "ended" and self._answered.get(state.id, state.run) != state.run:
                let_go.append(key)
            elif call is None:
                if state.id not in self.moving:
                    (confirmed if state.state == "ended" else stop).append(key)
            elif call.reception.run in ("", state.run):
                if names.parse_run(state.run)[0] < call.reception.fence:
                    let_go.append(key)
                    continue
                call.last_alive, call.missing = now, 0
                unheard = not call.reception.run and self.bus.connected_for_s < HEAR_FIRST_S
                if unheard or (call.promised >= call.reception.next_seq and not call.overflowed):
                    # Said to be sent in the last alive message and still not here: the last frames of a run
                    # leave no gap when they are lost. (Those that this one names may still be on their way.)
                    # Or we were cut off, and hear of the run only now.
                    call.reception.run = state.run
                    self.ask_resend(call, alive.worker)
                call.promised = state.seq
            else:
                let_go.append(key)
        for call in list(self._calls.values()):
            run = call.reception.run
            if run and run.endswith(alive.worker) and call.id not in listed and call.accepted:
                call.missing += 1
                if call.missing >= 2 and now - call.last_alive > ALIVE_S:
                    self._lost(call, "its worker no longer has it")
        return AliveReply(stop=stop, confirmed=confirmed, let_go=let_go)

    async def _watch(self) -> None:
        """Looks for workers that are silent and for requests whose time is up."""
        while True:
            await asyncio.sleep(ALIVE_S)
            loop_time = self.loop.time()
            silent: dict[str, list[Call]] = {}
            now = time.monotonic()
            for call in list(self._calls.values()):
                publication = call.publication
                if loop_time >= call.deadline:
                    self._expire(call)
                elif publication is not None and publication.open and not call.reception.run:
                    self._storing.look_after(publication)
                elif call.reception.run:
                    worker = names.parse_run(call.reception.run)[2]
                    if now - max(self._heard.get(worker, 0.0), call.last_alive) > SILENT_S:
                        silent.setdefault(worker, []).append(call)
                elif call.attempt.compat and self.bus.connected_for_s > RECONNECT_GRACE_S:
                    self._look_for_heir(call, now)
            if silent and self.bus.connected_for_s > RECONNECT_GRACE_S:
                await asyncio.gather(*(self._probe(worker, calls) for worker, calls in silent.items()))
            if len(self._heard) > 1000:
                self._heard = {worker: at for worker, at in self._heard.items() if now - at < 60}
            self.aborts.sweep()

    async def _probe(self, worker: str, calls: list[Call]) -> None:
        try:
            payload = encode(Probe(publisher=self.id))
            msg = await self.bus.request(names.control_subject(worker), payload, timeout_s=PROBE_S)
        except (NoResponders, TimeoutError):
            if self.bus.connected_for_s > RECONNECT_GRACE_S:
                for call in calls:
                    if not call.over:
                        self._lost(call, f"worker {worker} does not answer")
        except BusUnavailable:
            return
        else:
            self._hear(decode_alive(msg.data))

    def _expire(self, call: Call) -> None:
        if not call.over:
            seconds = call.request.budget_ms / 1000
            call.fail(DeadlineExceeded(f"no complete answer within {seconds:g} s"))
            self.spawn(self.withdraw(call))

    async def withdraw(self, call: Call) -> None:
        """Takes a request off the bus: its message, and its run if it has one."""
        self.aborts.begun(call.id, call.model)
        if call.reception.run:
            worker = names.parse_run(call.reception.run)[2]
            await self._send(names.control_subject(worker), encode(Stop(id=call.id)))
        # That the delete succeeds does not say that it was still queued: a worker that has it is told to stop
        # when its `accepted` comes for a request that is no longer known here.
        if call.publication is not None:
            await self._storing.withdraw(call.publication)

    def _on_control(self, msg: Msg) -> None:
        """Someone elsewhere wants a request of ours cancelled, or takes it over."""
        try:
            message = decode_publisher_control(msg.data)
        except msgspec.MsgspecError as error:
            log.warning("a control message cannot be decoded: %s", error)
            return
        if isinstance(message, Cancel):
            self.spawn(self._cancel(message.id, msg.reply))
        elif msg.reply:
            self.send(msg.reply, encode(self.moving.give(message)))

    async def _cancel(self, request_id: str, reply: str) -> None:
        call = self._calls.get(request_id)
        answer = Cancelled(id=request_id, was="unknown")
        if call is not None:
            run = call.reception.run
            was: Literal["running", "held", "queued"] = "held" if run else "queued"
            if call.engine_started:
                was = "running"
            call.fail(RequestCancelled("the request was cancelled by its id"))
            await self.withdraw(call)
            stopped = was == "queued" or await self.aborts.wait(request_id, LET_GO_S)
            worker = names.parse_run(run)[2] if run else ""
            answer = Cancelled(id=request_id, was=was, worker=worker, stopped=stopped)
        if reply:
            await self._send(reply, encode(answer))

    # A run has come to nothing

    def _lost(self, call: Call, why: str) -> None:
        """The worker of the run that counts is gone, or no longer has it."""
        if call.accepted is not None:
            run, compat = call.accepted.run, call.accepted.compat
            worker = names.parse_run(run)[2]
            # A worker that only stood still comes back, perhaps when all is over here, and asks which runs count.
            self._superseded[names.run_key(call.id, run)] = None
            if len(self._superseded) > SUPERSEDED_KEPT:
                self._superseded.popitem(last=False)
            self._follow(call, RunEnd(worker=worker, why=why, compat=compat, crashed=call.engine_started, run=run))

    def run_failed(self, call: Call, frame: Failed) -> None:
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
        budget_ms = int((call.deadline - self.loop.time()) * 1000)
        workers = self.registry.workers_of(call.model)
        decision = next_attempt(call.attempt, end, call.progress(), workers, attempt=attempt, budget_ms=budget_ms)
        if isinstance(decision, GiveUp):
            call.fail(decision.error)
            if accepted is not None:
                self.spawn(self._terminate(accepted, "the run came to nothing"))
            return
        if isinstance(decision, Again):
            call.restart()
        call.attempt = self._as_ours(decision.request, accepted.run if accepted and isinstance(decision, GoOn) else "")
        self.spawn(self._republish(call, end, accepted))

    def _as_ours(self, request: Request, continues: str) -> Request:
        """The next attempt, whose frames come here; most requests were ours from the start."""
        publisher = "" if names.publisher_of(request.id) == self.id else self.id
        return msgspec.structs.replace(request, publisher=publisher, continues=continues)

    def _look_for_heir(self, call: Call, now: float) -> None:
        """Half an answer waits for a worker that can go on: as long as one lives, and ``resume_wait_s`` without."""
        assert call.end is not None
        if heir_lives(call.end, self.registry.workers_of(call.model)):
            call.last_alive = now
        elif now - call.last_alive > self.settings.resume_wait_s:
            if call.publication is not None:
                self.spawn(self._storing.withdraw(call.publication))
            self._follow(call, msgspec.structs.replace(call.end, compat="", crashed=False, run=""))

    async def _republish(self, call: Call, end: RunEnd, accepted: Accepted | None) -> None:
        subject = names.resume_subject(call.model, call.attempt.compat)
        try:
            if call.kept and call.attempt.output_token_ids:
                call.attempt = await self._with_earlier(call.attempt, call.kept)
            await self._store(call, subject, end, accepted)
        except ModelBusError as error:
            call.fail(_not_again(end, error))
            return
        if call.over:  # meanwhile: what was taken back was the attempt before
            await self.withdraw(call)
            return
        if call.attempt.compat and subject not in self._declared:
            # Usually deploy has done it; a worker that was started later, elsewhere, may have a compat of its own.
            self._declared.add(subject)
            try:
                await topology.declare_resume(self.bus, call.model, call.attempt.compat)
            except ModelBusError as error:
                self._declared.discard(subject)
                log.warning("half an answer of %s may lie where nobody pulls: %s", call.model, error)

    async def _with_earlier(self, request: Request, frames: list[Delta]) -> Request:
        """The worker that completes the answer is to keep all of it: what was said before travels along."""
        earlier = encode(frames)
        if len(earlier) <= EARLIER_LIMIT:
            return msgspec.structs.replace(request, earlier=earlier)
        blob = await put_blob(self.bus, f"{request.id}.{request.attempt}.earlier", earlier)
        return msgspec.structs.replace(request, earlier_blob=blob)

    async def _terminate(self, accepted: Accepted, why: str) -> None:
        """Takes a run's message away, and says so until the bus has heard it: it would be delivered again otherwise."""
        until = time.monotonic() + TERMINATE_S
        while time.monotonic() < until:
            with contextlib.suppress(NoResponders, TimeoutError, BusUnavailable):
                await self.bus.request(accepted.ack_subject, f"+TERM {why}".encode())
                return
            await asyncio.sleep(0.2)
        log.warning(
            "the message of run %s of %s may be delivered again: the bus does not answer", accepted.run, accepted.id
        )

    async def _on_reconnect(self) -> None:
        # Nobody was heard while we were cut off; that is no sign of death.
        now = time.monotonic()
        for call in self._calls.values():
            call.last_alive, call.missing = now, 0

    async def _poll_depths(self) -> None:
        """Reads how full the queues are, each second in which something was submitted."""
        while True:
            await self._busy.wait()
            if not self._calls:
                self._busy.clear()
            with contextlib.suppress(BusUnavailable):
                self.depths = await topology.depths(self.bus)
            await asyncio.sleep(1.0)


def _not_again(end: RunEnd, error: ModelBusError) -> ModelBusError:
    return end.failure or WorkerLost(f"{end.why}, and the request could not be published again: {error.message}")


_DEFAULT_OPTIONS = CallOptions()
