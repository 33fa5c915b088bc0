"""One request as its publisher sees it: what has come, what is still to be read, how it ended."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterable
from types import TracebackType
from typing import TYPE_CHECKING, Self

from .errors import ModelBusError, RequestCancelled, error_of
from .failover import Progress, RunEnd
from .messages import Accepted, Delta, Document, Done, Failed, Frame, Request, Started, Usage, Vectors
from .reception import Reception, Verdict

if TYPE_CHECKING:
    from .publisher import Publisher
    from .storing import Publication


class Restarted:
    """The answer begins anew: what a reader of a plain call has got so far is void."""


#: What a reader of a call gets.
Answer = Started | Delta | Vectors | Document | Done | Restarted

#: Bytes of frames that wait for a slow reader; what comes beyond is dropped and read again from the worker's ring.
WAITING_LIMIT = 1 << 20


class Call:
    """A published request and its answer.

    Read it with :meth:`batches`. Leaving ``async with call`` before the end cancels the request on the bus; so does
    the cancellation of the task that reads it.
    """

    def __init__(self, publisher: Publisher, request: Request, deadline: float) -> None:
        self._publisher = publisher
        self.request = request  #: of the first attempt
        self.id = request.id
        self.model = request.model
        self.deadline = deadline  #: event-loop time
        self.started = time.monotonic()
        self.reception = Reception(request.attempt)
        self.attempt = request  #: the request as published last
        self.accepted: Accepted | None = None
        self.end: RunEnd | None = None  #: of the run that the last attempt follows
        self.engine_started = False
        self.last_alive = self.started  #: when its worker last listed it
        self.promised = -1  #: the last sequence number that the last alive message named
        self.missing = 0  #: alive messages in a row that did not list it
        self.publication: Publication | None = None  #: of the attempt as published last
        self.resend_asked = 0.0
        self.over = False  #: the last frame, or an error, has come
        self.overflowed = False  #: frames were dropped because the reader is slow
        #: Output per choice, so that another worker can go on from here.
        self.token_ids: list[list[int]] = []
        self.chars: list[int] = []
        self.usage: Usage | None = None  #: of the whole answer, when it has come
        self.finished: set[int] = set()  #: choices whose last delta has come
        self.delivered = False  #: some output has come
        self.shown = False  #: and the reader has got some of it
        self.streams = request.stream  #: the reader passes on what it gets: nobody can take it back
        self.outlives = False  #: it goes on when its reader leaves: another one may come
        self.unread = False  #: its reader has left
        self.attached = False  #: it was published by somebody else, or earlier
        self.view = request.view
        self.on_failure: Callable[[ModelBusError], None] | None = None  #: told when it has failed for good
        self.pursuit: asyncio.Task[None] | None = None  #: looks for the request, of another publisher, on the bus
        #: All output, where the worker that completes the answer is to keep the whole of it.
        self.kept: list[Delta] | None = [] if request.answer_kept_s else None
        self._frames: list[Answer] = []
        self._bytes = 0
        self._error: ModelBusError | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._listener: Callable[[], None] | None = None
        self._storing: asyncio.Future[None] | None = None

    # The router's side

    def offer(self, frame: Frame, size: int) -> Verdict:
        """Takes a frame that came from the bus, if it counts."""
        if self.over:
            return Verdict.DROP
        if self._frames and self._bytes + size > WAITING_LIMIT and not self.overflowed:
            self.overflowed = True
            self._wake()  # a reader that waits, with nothing but `started` here, asks for the rest
        if self.overflowed and frame.run == self.reception.run:
            return Verdict.DROP
        verdict = self.reception.offer(frame)
        if verdict is Verdict.TAKE:
            self._take(frame, size)
        return verdict

    def _take(self, frame: Frame, size: int) -> None:
        # Cheaper than a match, and all frames of all requests pass here.
        if type(frame) is Delta:
            if self.end is not None and frame.choice in self.finished:
                return  # it had ended before the run that this one goes on from was lost: the reader has its end
            self._remember(frame)
            self.delivered = True
        elif type(frame) is Accepted:
            self.accepted = frame
            self.last_alive = time.monotonic()
            self.missing = 0
            self.stored_or_not()  # a run is as good as the stream's own answer
            return
        elif type(frame) is Started:
            self.engine_started = True
            self._frames.append(frame)  # the reader sees it with what comes next
            return
        elif type(frame) is Done:
            self.over, self.usage = True, frame.usage
            self._publisher.ended(self)
        elif type(frame) is Failed:
            self._publisher.following.failed(self, frame)
            return
        else:
            assert type(frame) is Vectors or type(frame) is Document
            self.delivered = True
        self._frames.append(frame)
        self._bytes += size
        if self._listener is not None:
            self._publisher.tell_soon(self._listener)
        elif self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def _remember(self, delta: Delta) -> None:
        """Keeps what another worker would need to go on, where there is one that could."""
        if self.accepted is None or not self.accepted.compat:
            return
        if self.kept is not None:
            self.kept.append(delta)
        choice = delta.choice
        if delta.finish_reason:
            self.finished.add(choice)
        while len(self.chars) <= choice:
            self.token_ids.append([])
            self.chars.append(0)
        self.token_ids[choice] += delta.token_ids
        self.chars[choice] += len(delta.text)

    def progress(self) -> Progress:
        """How far the answer has come. Of a plain call nothing is out before its end."""
        shown = self.shown and self.streams
        return Progress(output=self.delivered, shown=shown, token_ids=self.token_ids, chars=self.chars)

    def fence_off(self) -> int:
        """The run that counts has come to nothing: its frames no longer count. Returns the next attempt's number."""
        self.accepted, self.engine_started, self.missing, self.promised = None, False, 0, -1
        self.last_alive = time.monotonic()
        return self.reception.raise_fence()

    def restart(self) -> None:
        """Throws away the output of the runs so far."""
        self._frames = [Restarted()] if self.shown else []
        self._bytes = 0
        self.delivered = self.shown = self.overflowed = False
        self.token_ids, self.chars, self.finished = [], [], set()
        if self.kept is not None:
            self.kept = []
        self._wake()

    def take_over(self, request: Request, frames: Iterable[Frame], accepted: Accepted | None, next_seq: int) -> None:
        """Goes on with a request that another publisher had.

        Args:
            request: as it was published last.
            frames: what has been said so far, of all runs that belong to the answer; the reader gets it first.
            accepted: of the run that counts, None while there is none.
            next_seq: the next of its frames that is needed.
        """
        self.request = self.attempt = request
        self.model = request.model
        self.view = self.view or request.view
        self.kept = [] if request.answer_kept_s else None
        self.token_ids, self.chars, self.finished = [], [], set()
        self.reception = Reception(request.attempt)
        self.accepted = accepted
        if accepted is not None:
            self.reception.run, self.reception.next_seq = accepted.run, next_seq
        self.last_alive = time.monotonic()
        self.preload(frames)

    def preload(self, frames: Iterable[Frame]) -> None:
        """Gives the reader frames that came by another way; ``Done`` or ``Failed`` among them ends the call."""
        for frame in frames:
            match frame:
                case Accepted():
                    self.accepted = self.accepted or frame
                    self.view = self.view or frame.view
                    continue
                case Failed():
                    self.fail(error_of(frame))
                    continue
                case Delta():
                    self._remember(frame)
                    self.delivered = True
                case Vectors() | Document():
                    self.delivered = True
                case Started():
                    self.engine_started |= frame.run == self.reception.run
                case Done():
                    self.over, self.usage = True, frame.usage
                    self._publisher.ended(self)
            self._frames.append(frame)
        self._wake()

    def fail(self, error: ModelBusError) -> None:
        """Ends the call with an error; frames that came before it are still read first."""
        if not self.over:
            self.over = True
            self._error = error
            self._wake()
            self.stored_or_not()
            self._publisher.ended(self)
            if self.on_failure is not None:
                self.on_failure(error)

    @property
    def failure(self) -> ModelBusError | None:
        """What it ended with, if not with an answer."""
        return self._error

    def stored_or_not(self) -> None:
        """It is known whether the queue has it: wakes whoever waits for that."""
        if self._storing is not None and not self._storing.done():
            self._storing.set_result(None)

    def _wake(self) -> None:
        if self._listener is not None:
            self._publisher.loop.call_soon(self._listener)
        elif self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    # The reader's side

    async def stored(self) -> None:
        """Returns when the queue has stored the request: from then on it is not lost.

        Raises:
            QueueFull, BusUnavailable: it has not.
        """
        # A run, one that has come to nothing too, says that it was stored.
        while not self.over and (self.publication is None or self.publication.open) and not self._had_run():
            self._storing = asyncio.get_running_loop().create_future()
            await self._storing
        if self._error is not None and not self._had_run():
            raise self._error

    def _had_run(self) -> bool:
        return bool(self.reception.run) or self.end is not None

    async def batch(self) -> list[Answer]:
        """All frames that are ready, at least one; after ``Done`` there are no more.

        Raises:
            ModelBusError: the request failed, was cancelled or ran out of time.
        """
        while not (frames := self.ready()):
            self._waiter = self._publisher.loop.create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        return frames

    def listen(self, callback: Callable[[], None] | None) -> None:
        """Calls back when something is :meth:`ready`, in place of waking who waits in :meth:`batch`; None ends it."""
        self._listener = callback

    def ready(self) -> list[Answer]:
        """What :meth:`batch` would return now, without waiting: perhaps nothing. Raises what it raises."""
        if not self._frames:
            if self.over:
                assert self._error is not None
                raise self._error
            return []
        frames, self._frames, self._bytes = self._frames, [], 0
        self.shown = self.delivered
        if self.overflowed:
            self.overflowed = False
            self._publisher.ask_resend(self)
        return frames

    async def batches(self) -> AsyncIterator[list[Answer]]:
        """Yields what :meth:`batch` returns until ``Done`` has come. Raises what it raises."""
        while True:
            frames = await self.batch()
            yield frames
            if type(frames[-1]) is Done:
                return

    async def cancel(self) -> None:
        """Takes the request back: out of the queue if it waits there, off its worker if it runs."""
        if self.over:
            return
        self._end_pursuit()
        self.fail(RequestCancelled("the request was cancelled"))
        await self._publisher.withdraw(self)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.over or self.request.background:
            return
        if self.outlives:
            self._publisher.leave(self)
        else:
            await self.cancel()

    def _end_pursuit(self) -> None:
        if self.pursuit is not None:
            self.pursuit.cancel()
