"""Taking up a request that another publisher had: its reader has come here.

The publisher that has it is asked first, and then what the bus still knows is looked through (``remains``). ``decide`` says what
follows from it; the rest of this module acts.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Sequence
from typing import Literal

import msgspec

from . import names
from .blobs import get_blob
from .calls import Call
from .connection import NoResponders
from .errors import (
    BusUnavailable,
    DeadlineExceeded,
    ModelBusError,
    RequestCancelled,
    StreamNotResumable,
)
from .failover import Again, Progress, RunEnd, next_attempt
from .history import Seen, covers, stand_ins
from .messages import (
    Accepted,
    Adopt,
    Failed,
    FoundRun,
    Frame,
    Held,
    Request,
    Stop,
    decode_found,
    decode_frames,
    decode_held,
    encode,
)
from .publisher import Publisher
from .pulling import parse_ack_subject
from .remains import ASK_S, Remains
from .starts import Starts

log = logging.getLogger(__name__)

#: Between two looks, at first and at last.
LOOK_S, LOOK_AGAIN_S = 0.2, 1.0
#: A request that nobody has for so long, and that is not in its queue, or was with a worker, is lost.
NOBODY_S = 2.0
#: Further than the end of any run.
_NO_FRAMES = 1 << 60

Step = Literal["adopt", "wait", "replay", "fail", "go_on", "publish", "lost"]


class Known(msgspec.Struct, frozen=True, kw_only=True):
    """What was found out about a request in one look."""

    held: bool = False  #: a publisher has it and keeps it
    running: bool = False  #: a worker has it, its frames included
    belongs: bool = True  #: what that run says continues what the reader has seen
    complete: bool = False  #: the whole answer is known, what the reader has seen included
    failed: bool = False  #: it failed for good
    seen_frames: bool = False  #: what the reader has seen is known, and can be gone on from
    begun: bool = False  #: the reader has seen something
    request: bool = False  #: it is known what was asked
    queued: bool = False  #: it waits in a queue, or its worker has not acknowledged it
    nobody_for_s: float = 0.0  #: how long neither a publisher nor a worker has known it


def decide(known: Known) -> Step:
    """What to do next."""
    if known.held:
        return "wait"
    if known.running and known.belongs:
        return "adopt"
    if known.complete:
        return "replay"
    if known.failed and not known.running:
        return "fail"
    if known.running:
        # Another run has begun anew. Two texts are never mixed: the one that was seen goes on.
        return "go_on" if known.seen_frames and known.request else "lost"
    if known.nobody_for_s < NOBODY_S and (known.queued or known.request):
        return "wait"
    if known.begun:
        return "go_on" if known.seen_frames and known.request else "lost"
    if known.queued:
        return "wait"  # a worker will take it, or take it again
    return "publish" if known.request else "lost"


class Attaching:
    """Takes up requests for one publisher."""

    def __init__(self, publisher: Publisher) -> None:
        self._publisher = publisher

    async def take_up(
        self,
        request_id: str,
        *,
        seen: Seen | None = None,
        model: str = "",
        asked: Request | None = None,
        streams: bool = True,
        if_unread: bool = False,
    ) -> Call:
        """A call that gives the whole answer from its beginning, as far as it is known, and then what comes.

        It can return before the request is found to run, but not before it is known what was asked: how the answer
        is to be shown depends on it. The call waits for the rest.

        Args:
            seen: how far the reader has come: what the call gives belongs to the same text.
            model: of the request, if known; the queues are searched faster.
            asked: what was asked, if the reader says it again; nobody else may know it any more.
            streams: the reader passes on what it gets.
            if_unread: wait for the whole answer while somebody else reads it; otherwise that reader loses it.

        Raises:
            StreamNotResumable: nobody knows it, or its rest cannot be had.
            ModelBusError: what the request ended with.
        """
        try:
            started_ms, origin = names.started_ms_of(request_id), names.publisher_of(request_id)
        except (ValueError, IndexError) as error:
            raise StreamNotResumable(f"{request_id!r} is not the id of a request") from error
        pursuit = _Pursuit(self._publisher, request_id, started_ms, origin, seen, model, asked, streams, if_unread)
        await pursuit.begin()
        return pursuit.call


class _Pursuit:
    """One request on its way here."""

    def __init__(
        self,
        publisher: Publisher,
        request_id: str,
        started_ms: int,
        origin: str,
        seen: Seen | None,
        model: str,
        asked: Request | None,
        streams: bool,
        if_unread: bool,
    ) -> None:
        self._publisher, self._bus = publisher, publisher.bus
        self._id, self._started_ms, self._origin = request_id, started_ms, origin
        self._seen, self._model, self._asked, self._if_unread = seen, model, asked, if_unread
        self._request = asked
        self._stored = True
        self._published_again = False
        self._remains = Remains(self._bus, request_id, seen)
        self._history = self._remains.history
        self._nobody_since = 0.0
        self._pause_s = LOOK_S
        now = asyncio.get_running_loop().time()
        budget_ms = asked.budget_ms if asked is not None else 600_000
        self._until = now + max(0.0, started_ms + budget_ms - time.time_ns() / 1e6) / 1000
        stub = asked or Request(id=request_id, model=model, stream=streams)
        self.call = Call(publisher, stub, self._until)
        self.call.attached = self.call.outlives = True
        self.call.streams = streams
        self.call.shown = seen is not None

    async def begin(self) -> None:
        """Looks until it is known what was asked; what is not there by then is waited for in a task of its own."""
        self._publisher.moving.expect(self._id)
        while not await self._look():
            if self._request is not None:
                self.call.pursuit = self._publisher.spawn(self._go_on_looking())
                return
            await self._pause()

    async def _go_on_looking(self) -> None:
        try:
            while not self.call.over:
                await self._pause()
                try:
                    if await self._look():
                        return
                except BusUnavailable as error:
                    log.info("request %s is looked for: %s", self._id, error.message)
        except ModelBusError as error:
            self.call.fail(error)

    async def _pause(self) -> None:
        """Between two looks. Raises DeadlineExceeded."""
        await asyncio.sleep(self._pause_s)
        self._pause_s = min(self._pause_s * 1.3, LOOK_AGAIN_S)
        if asyncio.get_running_loop().time() > self._until:
            raise DeadlineExceeded("the answer did not come before the request's time was up")

    # One look

    async def _look(self) -> bool:
        """True when the call has got what is to be had: it runs here now, or it is over."""
        held = await self._ask_publishers()
        found = None if held is not None and not held.given else await self._remains.find()
        if found is not None and found.publisher not in ("", self._publisher.id, self._origin):
            # Another one has taken it up before us.
            held = await self._ask(found.publisher) or held
        known = await self._known(held, found)
        step = decide(known)
        match step:
            case "wait":
                return False
            case "adopt":
                assert found is not None
                return await self._adopt(found)
            case "replay":
                self.call.preload(self._history.complete() or ())
            case "fail":
                failure = self._history.failure()
                assert failure is not None
                if failure.code == RequestCancelled.code:
                    raise StreamNotResumable(f"the request was ended: {failure.message}")
                self.call.preload(self._history.chain(failure.run) or [failure])
            case "go_on":
                self._go_on(found)
            case "publish":
                return await self._publish()
            case "lost":
                raise StreamNotResumable(self._why_lost())
        return True

    async def _known(self, held: Held | None, found: FoundRun | None) -> Known:
        here = found is not None and found.first >= 0
        if (held is not None and held.known) or here:
            self._nobody_since = 0.0
        elif not self._nobody_since:
            self._nobody_since = time.monotonic()
        kept_by_other = held is not None and held.known and not held.given
        if kept_by_other:
            return Known(held=not await self._remains.read_kept(), complete=self._remains.is_complete())
        belongs = here
        if here:
            assert found is not None
            belongs = await self._belongs(found)
            if belongs:
                return Known(running=True)
        await self._remains.read_kept()
        if not self._remains.is_complete():
            await self._remains.read_all_frames()
        queued = False
        if not here and not self._remains.is_complete():
            queued = await self._is_queued()
        elif here and found is not None and found.request is not None:
            self._request = found.request
        return Known(
            running=here,
            belongs=belongs,
            complete=self._remains.is_complete(),
            failed=self._history.failure() is not None and not queued,
            seen_frames=self._seen is not None and covers(self._history.chain(self._seen.run) or (), self._seen),
            begun=self._seen is not None,
            request=self._request is not None,
            queued=queued,
            nobody_for_s=time.monotonic() - self._nobody_since if self._nobody_since else 0.0,
        )

    # Asking

    async def _ask_publishers(self) -> Held | None:
        """What the publisher that has the request says; None when none has it."""
        if self._has_other_reader():
            return await self._ask(self._publisher.id)
        asked: set[str] = set()
        who, held = self._origin, None
        while who and who not in asked:
            asked.add(who)
            if (held := await self._ask(who)) is None or held.known:
                return held
            who = held.moved_to
        return held

    def _has_other_reader(self) -> bool:
        """Whether this very publisher has the request, for somebody else."""
        return self._publisher.call_of(self._id) not in (None, self.call)

    async def _ask(self, who: str) -> Held | None:
        adopt = Adopt(id=self._id, publisher=self._publisher.id, if_unread=self._if_unread)
        if who == self._publisher.id:
            if self._publisher.call_of(self._id) is self.call:
                return None
            held = self._publisher.moving.give(adopt)
        else:
            try:
                msg = await self._bus.request(names.control_subject(who), encode(adopt), timeout_s=ASK_S)
                held = decode_held(msg.data)
            except (NoResponders, TimeoutError, msgspec.MsgspecError):
                return None
        if held.given:
            self._learn(held.request, held.left_ms)
            self._stored = held.stored
        return held

    def _learn(self, request: Request | None, left_ms: int) -> None:
        if request is not None:
            self._request = request
            self.call.view = request.view or self.call.view
        if left_ms:
            self._until = self.call.deadline = asyncio.get_running_loop().time() + left_ms / 1000

    async def _is_queued(self) -> bool:
        if (found := await self._remains.queued(self._model)) is None:
            return False
        self._learn(*found)
        return True

    # Acting

    async def _belongs(self, found: FoundRun) -> bool:
        """Whether a run says what the reader has seen, or goes on from it."""
        seen, request = self._seen, found.request
        if seen is None or seen.run == found.state.run:
            return True
        if request is None or not request.continues:
            return False
        if request.continues == seen.run:
            return _reaches(_starts(request), seen.positions)
        await self._remains.read_all_frames()
        return covers(self._history.before(request.continues, _starts(request)) or (), seen)

    async def _adopt(self, found: FoundRun) -> bool:
        """Takes a run over. False when its worker has lost it meanwhile, or has given it to somebody else."""
        run, request = found.state.run, found.request
        # An earlier call of it may be over here: from now on the worker does not hear that nobody needs the frames.
        self._publisher.moving.expect(self._id)
        earlier, own = await self._earlier(found), await self._beginning(found)
        adopt = Adopt(id=self._id, run=run, publisher=self._publisher.id, of=found.publisher, seq=_NO_FRAMES)
        try:
            msg = await self._bus.request(names.control_subject(found.worker), encode(adopt), timeout_s=ASK_S)
            now = decode_found(msg.data)
        except (NoResponders, TimeoutError, msgspec.MsgspecError):
            return False
        if now.publisher != self._publisher.id or now.state.run != run:
            return False
        call = self.call
        if self._has_other_reader():
            return False  # it was faster
        if call.over:
            self._publisher.moving.back(self._id)  # nobody wants it: the worker hears so
            return True
        accepted = None
        if found.ack_subject and request is not None:
            accepted = Accepted(
                id=self._id, run=run, seq=0, ack_subject=found.ack_subject, compat=found.compat, delivery=found.delivery
            )
        self._learn(request, found.left_ms)
        call.take_over(request or call.request, earlier, accepted, now.first)
        if request is not None and request.output_token_ids:
            # Frames that stand in for lost ones have no tokens.
            call.token_ids = [list(ids) for ids in request.output_token_ids]
            call.chars = list(request.emitted_chars)
        if accepted is None:
            call.reception.fence = names.parse_run(run)[0]
            call.reception.run, call.reception.next_seq = run, now.first
        call.preload(own)
        self._take_place()
        self._publisher.tell(found.worker, msgspec.structs.replace(adopt, of=self._publisher.id, seq=now.first))
        return True

    async def _earlier(self, found: FoundRun) -> list[Frame]:
        """What was said in the runs that this one goes on from.

        Raises:
            StreamNotResumable: it is gone, and the reader needs it.
        """
        request = found.request
        if request is None or not request.output_token_ids:
            return []
        if request.earlier or request.earlier_blob is not None:
            blob = request.earlier_blob
            return decode_frames(request.earlier if blob is None else await get_blob(self._bus, blob))
        await self._remains.read_all_frames()
        starts = _starts(request)
        earlier = self._history.before(request.continues, starts)
        if earlier is None and self._seen is not None:
            seen = self._seen
            if seen.run == found.state.run:
                seen = Seen(run=request.continues, seq=0, positions=[start[0] for start in starts])
            earlier = stand_ins(self._id, seen, starts)
        if earlier is None:
            raise StreamNotResumable("the beginning of the answer is no longer kept")
        return earlier

    async def _beginning(self, found: FoundRun) -> list[Frame]:
        """What the run said before the first frame that its worker still has; raises as ``_earlier``."""
        if not found.first:
            return []
        await self._remains.read_all_frames()
        frames = self._history.run(found.state.run)[: found.first]
        if len(frames) < found.first:
            raise StreamNotResumable("the beginning of the answer is no longer kept")
        return frames

    def _go_on(self, found: FoundRun | None) -> None:
        """The run that the reader has seen is gone: another attempt goes on from its tokens."""
        assert self._seen is not None and self._request is not None
        frames = self._history.chain(self._seen.run)
        assert frames is not None
        own = self._history.run(self._seen.run)
        first, last = own[0], own[-1]
        assert isinstance(first, Accepted)
        if found is not None:
            self._publisher.tell(found.worker, Stop(id=self._id, run=found.state.run, reason="superseded"))
        request = msgspec.structs.replace(self._request, attempt=max(self._newest_attempt(), self._request.attempt))
        accepted = first
        if found is not None and found.ack_subject:
            # Its message is the one that is still in a queue.
            accepted = msgspec.structs.replace(first, ack_subject=found.ack_subject)
        self._learn(None, self._left_ms(first, request))
        self.call.take_over(request, [f for f in frames if not isinstance(f, Failed)], accepted, len(own))
        self._take_place()
        handed_over = isinstance(last, Failed) and last.handover
        self._publisher.following.give_up_run(
            self.call, f"the worker of run {self._seen.run} does not answer", handover=handed_over
        )

    def _left_ms(self, accepted: Accepted, request: Request) -> int:
        try:
            *_, stored_ns = parse_ack_subject(accepted.ack_subject)
        except ValueError:
            return 0
        return max(1, round(stored_ns / 1e6 + request.budget_ms - time.time_ns() / 1e6))

    async def _publish(self) -> bool:
        """Nobody has it and no queue has it: its publisher died before it had sent it.

        Where the queue says that it had it, its run has come to nothing and whoever should have had it go on is gone
        too. Of a request whose answer is kept it is known that there is none, and the next attempt follows.
        """
        assert self._request is not None
        if self._has_other_reader():
            return False  # it was faster
        request = self._request
        if self._published_again:
            if not request.answer_kept_s:
                raise StreamNotResumable("the request was taken by a worker once, and what became of it is not known")
            request = self._request = await self._next_attempt(request)
            log.warning("request %s: what became of attempt %d is not known", self._id, request.attempt - 1)
        self._published_again = True
        self._nobody_since = 0.0
        if self._origin != self._publisher.id:
            request = msgspec.structs.replace(request, publisher=self._publisher.id)
        self.call.take_over(request, (), None, 0)
        self._take_place()
        await self._publisher.publish_again(self.call)
        await self.call.stored()
        # A duplicate tells its frames to the publisher that was first.
        return self.call.publication is not None and not self.call.publication.duplicate

    async def _next_attempt(self, request: Request) -> Request:
        """From the start, by any worker; that the earlier one may have ended its worker is not forgotten."""
        crashes = request.crashes + await Starts(self._bus).read(request.id, request.attempt)
        end = RunEnd(worker="", why="")
        left_ms = int((self._until - asyncio.get_running_loop().time()) * 1000)
        decision = next_attempt(
            request, end, Progress(), (), attempt=max(request.attempt, self._newest_attempt()) + 1, budget_ms=left_ms
        )
        assert isinstance(decision, Again)
        return msgspec.structs.replace(decision.request, crashes=crashes)

    def _newest_attempt(self) -> int:
        return max((names.parse_run(run)[0] for run in self._history.newest_first()), default=0)

    def _take_place(self) -> None:
        self._publisher.moving.back(self._id)
        self._publisher.register(self.call)

    def _why_lost(self) -> str:
        if self._seen is not None and self._history.newest_first():
            return "the answer that was being read cannot be gone on with: what was said, or what was asked, is no longer kept"
        return f"nothing is known of the request {self._id} (any more)"


def _starts(request: Request) -> list[list[int]]:
    return [[len(ids), chars] for ids, chars in zip(request.output_token_ids, request.emitted_chars, strict=False)]


def _reaches(starts: Sequence[Sequence[int]], positions: Sequence[int]) -> bool:
    """Whether a run that begins at ``starts`` leaves out nothing, and repeats nothing, of what was seen."""
    reached = [*(start[0] for start in starts), *[0] * (len(positions) - len(starts))]
    return all(position <= start for position, start in zip(positions, reached, strict=False))
