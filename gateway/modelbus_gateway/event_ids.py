"""The ids of server-sent events: which request, which run, which of its frames, and the tokens of each choice so far.

    g0123456789ab-019abcdef01-k3v9w2m4p8q1:1.1.w0123456789ab:17:15,14

A frame can make two events; then the first has the number of the frame with ``.1``: one of its events has been seen.
"""

from __future__ import annotations

import re

import msgspec
from modelbus_broker.errors import InvalidRequest
from modelbus_broker.history import Seen
from modelbus_broker.messages import Delta, Done

_ID = re.compile(
    r"(?P<request>[a-z0-9]+-[0-9a-f]+-[a-z0-9]+):(?P<run>\d+\.\d+\.\w+):(?P<seq>\d{1,18})(?:\.(?P<part>\d{1,3}))?"
    r":(?P<positions>(?:\d{1,18}(?:,\d{1,18}){0,1023})?)"
)


class EventId(msgspec.Struct, frozen=True, kw_only=True):
    """An id, read."""

    request: str
    run: str
    seq: int  #: of the frame
    part: int = 0  #: events of this frame that have been seen; 0: all
    positions: list[int] = []  #: output tokens per choice

    @property
    def seen(self) -> Seen:
        return Seen(run=self.run, seq=self.seq, positions=self.positions)


def read_event_id(text: str, param: str) -> EventId:
    """Raises InvalidRequest, with ``param``, when the text is no id of ours."""
    match = _ID.fullmatch(text.strip())
    if match is None:
        raise InvalidRequest(
            f"{text[:200]!r} is not the id of an event of this API: send back the last 'id:' of the stream as it was.",
            param=param,
        )
    positions = [int(number) for number in match["positions"].split(",")] if match["positions"] else []
    return EventId(
        request=match["request"], run=match["run"], seq=int(match["seq"]), part=int(match["part"] or 0),
        positions=positions,
    )  # fmt: skip


class EventIds:
    """Makes the id lines of one stream. Nearly all streams have one choice: for those a line is one formatting."""

    __slots__ = ("_positions", "_prefix", "_request", "_run")

    def __init__(self, request_id: str) -> None:
        self._request = request_id
        self._run = ""
        self._prefix = b""
        self._positions: list[int] = []

    def whole(self, delta: Delta) -> bytes:
        """The line of the last, or only, event of a frame."""
        self._advance(delta)
        if len(self._positions) == 1:
            return b"%b%d:%d\n" % (self._prefix, delta.seq, delta.position)
        return b"%b%d:%b\n" % (self._prefix, delta.seq, self._joined())

    def first(self, frame: Delta | Done) -> bytes:
        """The line of the first of two events of a frame."""
        self._advance(frame)
        return b"%b%d.1:%b\n" % (self._prefix, frame.seq, self._joined())

    def _advance(self, frame: Delta | Done) -> None:
        if frame.run != self._run:
            self._run = frame.run
            self._prefix = f"id: {self._request}:{frame.run}:".encode()
        if isinstance(frame, Delta):
            while len(self._positions) <= frame.choice:
                self._positions.append(0)
            self._positions[frame.choice] = frame.position

    def _joined(self) -> bytes:
        return ",".join(map(str, self._positions)).encode()
