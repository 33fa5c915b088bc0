"""What the bus still knows of a request: the workers that have it, the kept answer, the frames that passed (``MB_OUT``), and the
queues."""

from __future__ import annotations

import asyncio
import contextlib
import time

import msgspec

from . import names
from .connection import Bus, Msg
from .errors import AnswerNotKept
from .history import History, Seen, covers
from .kept import frames_of, read_kept
from .messages import FindRun, FoundRun, Request, decode_found, decode_frames, decode_request, encode
from .reading import read_batch

#: Publishers and workers answer within so long, or they are not there; after the first worker, others that hold the request.
ASK_S, OTHERS_S = 0.5, 0.03
#: The clocks of publishers and of the bus differ by less.
SKEW_MS = 10_000
#: A first attempt is stored within so long of its id's time.
STORED_WITHIN_MS = 120_000


class Remains:
    """Looks for what is left of one request.

    Attributes:
        history: what was said of it, as far as it was read.
    """

    def __init__(self, bus: Bus, request_id: str, seen: Seen | None) -> None:
        """``seen``: how far its reader has come."""
        self._bus, self._id, self._seen = bus, request_id, seen
        self._started_ms, self._origin = names.started_ms_of(request_id), names.publisher_of(request_id)
        self.history = History()
        self._read_up_to: dict[str, int] = {}  #: subject -> the next sequence to read there

    def is_complete(self) -> bool:
        """The whole answer has been read, what its reader has seen included."""
        answer = self.history.complete()
        return answer is not None and covers(answer, self._seen)

    async def find(self) -> FoundRun | None:
        """What the workers say; the newest run counts, and one whose frames are still there before one that is gone."""
        answers: list[FoundRun] = []
        heard = asyncio.Event()

        def take(msg: Msg) -> None:
            if msg.status != "503":
                with contextlib.suppress(msgspec.MsgspecError):
                    answers.append(decode_found(msg.data))
            heard.set()

        inbox = self._bus.new_inbox()
        subscription = await self._bus.subscribe(inbox, take)
        try:
            await self._bus.publish(names.FIND, encode(FindRun(id=self._id)), reply=inbox)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(ASK_S):
                    await heard.wait()
            if answers:
                await asyncio.sleep(OTHERS_S)
        finally:
            await subscription.unsubscribe()
        return max(answers, key=lambda found: (found.first >= 0, *names.parse_run(found.state.run)[:2]), default=None)

    async def read_kept(self) -> bool:
        """Reads the answer that its worker has kept. False: there is none.

        Raises:
            AnswerNotKept: it was answered, and the answer could not be kept.
        """
        if (kept := await read_kept(self._bus, self._id)) is None:
            return False
        if kept.lost:
            raise AnswerNotKept(f"the request was answered, but its answer was not kept: {kept.lost}")
        self.history.add(await frames_of(self._bus, kept))
        return True

    async def read_all_frames(self) -> None:
        """Those that went to the publisher in the id, then those that went to others: there are more to look through."""
        await self._read_frames(f"mb.rsp.{self._origin}.*")
        if not self.is_complete():
            await self._read_frames("mb.rsp.*.*")

    async def _read_frames(self, subject: str) -> None:
        """Reads the frames that have passed since the last look."""
        needle = self._id.encode()
        seq = self._read_up_to.get(subject, 0)
        while True:
            since_ms = 0.0 if seq else max(1.0, self._started_ms - SKEW_MS)
            found = await read_batch(
                self._bus, names.STREAM_OUT, subject, seq=max(seq, 1), since_ms=since_ms, batch=1000
            )
            if not found:
                return
            for message in found:
                if needle in message.data:
                    with contextlib.suppress(msgspec.MsgspecError):
                        self.history.add(f for f in decode_frames(message.data) if f.id == self._id)
            seq = self._read_up_to[subject] = found[-1].seq + 1

    async def queued(self, model: str) -> tuple[Request, int] | None:
        """The request as it lies in a queue, where a message stays until its worker acknowledges it, and the milliseconds that
        it has left; ``model``: its own, if known."""
        token = names.model_token(model) if model else "*"
        last_ms = self._started_ms + STORED_WITHIN_MS
        searches = [
            (names.STREAM_RE, f"mb.re.{token}.>", float("inf")),
            (names.STREAM_HI, f"mb.req.{token}.hi.>", last_ms),
            (names.STREAM_LO, f"mb.req.{token}.lo.>", last_ms),
        ]
        for stream, subject, until_ms in searches:
            since_ms, seq = max(1.0, self._started_ms - SKEW_MS), 1
            while found := await read_batch(self._bus, stream, subject, seq=seq, since_ms=since_ms, batch=256):
                for message in found:
                    if message.message_id.rpartition(".")[0] == self._id:
                        request = decode_request(message.data)
                        left_ms = message.stored_ms + request.budget_ms - time.time_ns() / 1e6
                        return request, max(1, round(left_ms))
                if found[-1].stored_ms > until_ms:
                    break
                seq, since_ms = found[-1].seq + 1, 0.0
        return None
