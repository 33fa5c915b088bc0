"""Publishing requests and routing their answers, for gateways and for SDK processes.

One wildcard subscription brings the frames of all requests; its callback sorts them into their calls and wakes the
readers. What is heard of the workers is in ``hearing``, what follows on a lost run in ``following``.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Coroutine, Sequence
from functools import partial
from typing import Any, Literal

import msgspec

from . import names, topology
from .aborts import Aborts
from .adapters import resolve
from .asking import CallOptions, check_room, make_request
from .calls import Call
from .connection import Bus, Msg
from .errors import (
    BusUnavailable,
    DeadlineExceeded,
    InvalidRequest,
    ModelBusError,
    ModelNotFound,
    ModelUnavailable,
    RequestCancelled,
)
from .failover import RunEnd
from .following import Following, not_again
from .hearing import Hearing
from .messages import (
    TERMINAL,
    Accepted,
    Cancel,
    Cancelled,
    Control,
    Deployment,
    Go,
    LetGo,
    Request,
    Resend,
    Stop,
    Task,
    decode_frames,
    decode_publisher_control,
    encode,
)
from .moving import Moving
from .reception import Verdict
from .registry import Registry
from .standstill import StandstillWatch
from .storing import Publication, PublisherSettings, Storing, packed

log = logging.getLogger(__name__)

#: When a publisher is closed, what it takes back has so long to be gone.
CLOSE_S = 3.0
#: So long whoever cancels a request from elsewhere waits to hear that its engine has let go.
LET_GO_S = 2.0


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
        self.untyped = kind == "sdk"  #: nobody has checked the types of what is published
        #: Messages per model token in the queues when last polled.
        self.depths: dict[str, int] = {}
        self.standstill = StandstillWatch(
            bus, registry, lambda: self._per_model, after_s=self.settings.stuck_after_s
        )  #: of the queues that this publisher waits for
        self.moving = Moving(self)
        self.aborts = Aborts()
        self.hearing = Hearing(self)
        self.following = Following(self)
        self.storing = Storing(bus, self.settings, self.spawn)
        self.calls: dict[str, Call] = {}
        self._per_model: dict[str, int] = {}
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
            await self.bus.subscribe(names.alive_subject(self.id), self.hearing.on_alive),
            await self.bus.subscribe(names.control_subject(self.id), self._on_control),
        ]
        self.bus.on_reconnect(self.hearing.on_reconnect)
        self._background = [
            asyncio.create_task(self.hearing.watch(), name="publisher-watch"),
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
        calls = [call for call in self.calls.values() if not call.request.background]
        for call in calls:
            if call.outlives:
                self.moving.away(call.id)
                call.on_failure = None
            call.fail(error)
        ending = [self.withdraw(call) for call in calls if not call.outlives]
        await asyncio.gather(*ending, return_exceptions=True)

    def in_flight(self) -> int:
        """Requests whose last frame has not come."""
        return len(self.calls)

    # Publishing

    async def submit(self, model: str, task: Task, options: CallOptions | None = None) -> Call:
        """Publishes a request and returns when the queue has stored it: from then on it is not lost.

        Args:
            model: its name, or ``model:adapter``.

        Raises:
            ModelNotFound: no deployment serves this model, or it has no such adapter.
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
            InvalidRequest: see ``packed`` and ``make_request``.
            ModelNotFound, ModelUnavailable, QueueFull: as ``submit``, as far as it is known here.
        """
        name = model
        model, options, deployments = self.resolved(name, options or _DEFAULT_OPTIONS)
        waiting = max(self.depths.get(names.model_token(model), 0), self._per_model.get(model, 0))
        try:
            check_room(model, deployments, options, self.registry, waiting)
        except ModelUnavailable:
            # Where a revision is being replaced a worker may be known to stop before it is known that requests wait.
            await self.registry.look_again(model)
            model, options, deployments = self.resolved(name, options)
            check_room(model, deployments, options, self.registry, waiting)
        request = make_request(self.id, model, task, options, deployments)
        call = Call(self, request, self.loop.time() + request.budget_ms / 1000)
        call.outlives = options.outlives
        self.register(call)
        try:
            await self.store(call, names.request_subject(model, options.lane, request.share))
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
            self.loop.call_at(call.deadline, self.expire, call)
        return call

    def describe(self, model: str, task: Task, options: CallOptions) -> Request:
        """The request that ``publish`` would publish.

        Raises:
            ModelNotFound: no deployment serves this model.
        """
        model, options, deployments = self.resolved(model, options)
        return make_request(self.id, model, task, options, deployments)

    def resolved(self, name: str, options: CallOptions) -> tuple[str, CallOptions, Sequence[Deployment]]:
        """The model of a name, what is asked of it, and its deployments."""
        if not isinstance(name, str):
            raise InvalidRequest(f"a model is named by a text, not by {type(name).__name__}", param="model")
        model, record = target = resolve(self.registry, name)
        if record is not None:
            options = msgspec.structs.replace(options, adapter=target.adapter)
        deployments = self.registry.deployments_of(model)
        if not deployments:
            known = ", ".join(self.registry.models()) or "none"
            raise ModelNotFound(f"the model {model!r} is not deployed (deployed: {known})", param="model")
        return model, options, deployments

    def call_of(self, request_id: str) -> Call | None:
        """The call of a request that this publisher waits for."""
        return self.calls.get(request_id)

    def register(self, call: Call) -> None:
        """From now on what comes for this request goes to this call."""
        if self.calls.get(call.id) is call:
            return
        self.calls[call.id] = call
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
        await self.store(call, subject)

    async def store(
        self, call: Call, subject: str, end: RunEnd | None = None, replaces: Accepted | None = None
    ) -> None:
        """Sends the call's attempt to its queue; ``end`` is that of the run which it follows."""
        payload = await packed(self.bus, call.attempt, check=self.untyped)
        answered = partial(self._on_stored, call, end)
        call.publication = self.storing.store(call.attempt, subject, payload, answered, replaces)

    def _on_stored(self, call: Call, end: RunEnd | None, publication: Publication) -> None:
        """The stream has answered, or it will not."""
        if publication.error is None:
            if publication.replaces is not None:
                # In this order: a refused publish must not lose the request.
                self.spawn(self.following.terminate(publication.replaces, "the next attempt is published"))
            call.stored_or_not()
        elif publication is not call.publication:
            return  # of an attempt that another one has followed
        elif end is not None:
            call.fail(not_again(end, publication.error))
        elif not call.reception.run:  # frames of a run say that it was stored, whatever the stream's answer was
            call.fail(publication.error)

    # Routing

    def _on_frames(self, msg: Msg) -> None:
        worker = msg.subject[self._worker_offset :]
        self.hearing.heard[worker] = time.monotonic()
        try:
            frames = decode_frames(msg.data)
        except msgspec.MsgspecError as error:
            log.warning("frames of worker %s cannot be decoded: %s", worker, error)
            return
        size = len(msg.data) // (len(frames) or 1)
        calls, taken = self.calls, Verdict.TAKE
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
                    self.spawn(self.following.terminate(frame, "a later attempt is published"))
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
            # Cancelled while it was queued, or answered and delivered again.
            self.tell(worker, self.hearing.unwanted(accepted.id, accepted.run))
        elif (adopt := self.moving.successor(accepted)) is not None:
            self.tell(worker, adopt)

    def ended(self, call: Call) -> None:
        """A call has its last frame, or an error."""
        if self.calls.get(call.id) is not call:
            return  # it was never ours, or is another call's by now
        del self.calls[call.id]
        if call.reception.run:
            self.hearing.answered(call.id, call.reception.run, call.usage)
        if call.publication is not None and call.reception.run:
            self.storing.forget(call.publication)
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

    def expire(self, call: Call) -> None:
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
            await self.storing.withdraw(call.publication)

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
        call = self.calls.get(request_id)
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

    async def _poll_depths(self) -> None:
        """Reads how full the queues are, each second in which something was submitted."""
        while True:
            await self._busy.wait()
            if not self.calls:
                self._busy.clear()
            with contextlib.suppress(BusUnavailable):
                self.depths = await topology.depths(self.bus)
            await asyncio.sleep(1.0)


_DEFAULT_OPTIONS = CallOptions()
