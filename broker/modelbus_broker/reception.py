"""Which frames of a request count: the fence, the order of runs, and gaps. No bus, no clock.

A request can have several runs: a message is delivered again when its worker stood still, and the publisher makes
a new attempt when a worker is lost. Frames of all of them can arrive; the client must see exactly one answer.
"""

from __future__ import annotations

from enum import Enum, auto

from .messages import Accepted, Frame
from .names import parse_run


class Verdict(Enum):
    """What to do with a frame."""

    TAKE = auto()  #: the next one of the run that counts
    DROP = auto()  #: seen before, or of a run that does not count
    GAP = auto()  #: of the run that counts, but frames before it are missing: ask for them from ``next_seq``
    STALE = auto()  #: of an attempt below the fence: tell that worker to stop
    RIVAL = auto()  #: another run of the same attempt while the first one lives: tell it to let go


class Reception:
    """The decisions about the frames of one request.

    Attributes:
        fence: the lowest attempt whose frames are taken.
        run: the run that counts, "" while none is known.
        next_seq: the sequence number that its next frame must have.
    """

    __slots__ = ("fence", "next_seq", "run")

    def __init__(self, attempt: int = 1) -> None:
        self.fence = attempt
        self.run = ""
        self.next_seq = 0

    def offer(self, frame: Frame) -> Verdict:
        """Judges a frame; TAKE counts it as taken."""
        if frame.run != self.run:
            verdict = self._other_run(frame)
            if verdict is not Verdict.TAKE:
                return verdict
        if frame.seq == self.next_seq:
            self.next_seq += 1
            return Verdict.TAKE
        return Verdict.DROP if frame.seq < self.next_seq else Verdict.GAP

    def _other_run(self, frame: Frame) -> Verdict:
        """TAKE when the frame's run becomes the one that counts."""
        attempt, _, _ = parse_run(frame.run)
        if attempt < self.fence:
            return Verdict.STALE
        if self.run:
            # The first accepted wins while its worker lives; a lost one was fenced off before.
            return Verdict.RIVAL if isinstance(frame, Accepted) else Verdict.DROP
        self.run = frame.run
        self.next_seq = 0
        return Verdict.TAKE

    def raise_fence(self) -> int:
        """The run that counts is lost: from now on only frames of a new attempt are taken. Returns its number."""
        self.fence += 1
        self.run = ""
        self.next_seq = 0
        return self.fence
