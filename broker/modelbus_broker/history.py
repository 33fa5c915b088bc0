"""What has been said of a request, put together from frames that passed: the chain of its runs. No bus, no clock.

A run that went on after another one begins at the tokens that it was given; what was said before is in the frames of
the earlier run. Only such runs are joined. Two runs that both began at the beginning are two texts, however alike.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import msgspec

from .messages import TERMINAL, Accepted, Delta, Done, Failed, Frame
from .names import parse_run


class Seen(msgspec.Struct, frozen=True, kw_only=True):
    """How far a reader has come: to a frame of a run. Output tokens per choice say the same in other words."""

    run: str
    seq: int
    positions: list[int] = []


class History:
    """The frames of one request, by run, each from its first frame on without a gap."""

    def __init__(self, frames: Iterable[Frame] = ()) -> None:
        self._frames: dict[str, dict[int, Frame]] = {}
        self.add(frames)

    def add(self, frames: Iterable[Frame]) -> None:
        """Takes more frames, in any order; those that came before are the same."""
        for frame in frames:
            self._frames.setdefault(frame.run, {}).setdefault(frame.seq, frame)

    def run(self, run: str) -> list[Frame]:
        """The frames of a run up to the first that is missing."""
        found = self._frames.get(run, {})
        frames: list[Frame] = []
        while (frame := found.get(len(frames))) is not None:
            frames.append(frame)
        return frames

    def newest_first(self) -> list[str]:
        """The names of all runs of which anything is known."""
        return sorted(self._frames, key=lambda run: parse_run(run)[:2], reverse=True)

    def chain(self, run: str) -> list[Frame] | None:
        """The answer as a reader of this run has got it, the earlier runs that it goes on from first.

        None: the beginning of it is missing.
        """
        frames = self.run(run)
        if not frames or not isinstance(first := frames[0], Accepted):
            # What ended before it was accepted has a single frame.
            return frames or None
        if not first.continues:
            # Tokens of a run that nobody can name are missing.
            return frames if not first.position else None
        earlier = self.before(first.continues, first.starts)
        return None if earlier is None else [*earlier, *frames]

    def before(self, run: str, starts: Sequence[Sequence[int]]) -> list[Frame] | None:
        """The answer up to where another run went on from this one.

        Args:
            starts: per choice, the tokens and characters that the other run was given.
        """
        if (frames := self.chain(run)) is None:
            return None
        return cut(frames, starts)

    def complete(self) -> list[Frame] | None:
        """The whole answer, from the newest run that has completed one and whose beginning is known."""
        for run in self.newest_first():
            frames = self.run(run)
            if frames and isinstance(frames[-1], Done) and (chain := self.chain(run)) is not None:
                return chain
        return None

    def failure(self) -> Failed | None:
        """How the newest run ended, if it failed for good."""
        for run in self.newest_first():
            frames = self.run(run)
            last = frames[-1] if frames else None
            if isinstance(last, Failed) and not last.retry and not last.handover:
                return last
            return None
        return None


def cut(frames: Sequence[Frame], starts: Sequence[Sequence[int]]) -> list[Frame] | None:
    """The frames of an answer up to the point where each choice has exactly so many tokens and characters."""
    wanted = [(start[0], start[1]) for start in starts]
    reached: list[tuple[int, int]] = [(0, 0)] * len(wanted)
    for at, frame in enumerate(frames):
        if reached == wanted:
            return _without_end(frames[:at])
        if isinstance(frame, Delta):
            if frame.choice >= len(wanted):
                return None
            _, chars = reached[frame.choice]
            reached[frame.choice] = (frame.position, chars + len(frame.text))
    return _without_end(frames) if reached == wanted else None


def _without_end(frames: Iterable[Frame]) -> list[Frame]:
    return [frame for frame in frames if not isinstance(frame, TERMINAL)]


def covers(frames: Iterable[Frame], seen: Seen | None) -> bool:
    """Whether a reader who has come so far can read on in these frames."""
    return seen is None or any(frame.run == seen.run and frame.seq == seen.seq for frame in frames)


def stand_ins(request_id: str, seen: Seen, starts: Sequence[Sequence[int]]) -> list[Frame] | None:
    """Frames in place of lost ones that the reader has all seen: of the right length, never to be shown.

    None: the reader has not come to ``starts``, where the run that can be read begins.
    """
    positions = [*seen.positions, *[0] * (len(starts) - len(seen.positions))]
    if positions != [start[0] for start in starts]:
        return None
    frames: list[Frame] = [
        Delta(id=request_id, run=seen.run, seq=-1, choice=choice, text=" " * start[1], position=start[0])
        for choice, start in enumerate(starts)
        if start[0] or start[1]
    ]
    return frames
