"""Streams that are read on after their connection broke: through whichever gateway, from the event that was seen last."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import msgspec
from modelbus_broker.errors import InvalidRequest, StreamNotResumable
from modelbus_broker.messages import Delta, Done

from .event_ids import EventId, read_event_id

Kind = Literal["chat", "completion"]
Encode = Callable[[Sequence[object]], bytes]

_ROUTES = {"chat": "/v1/chat/completions", "completion": "/v1/completions"}


class View(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, array_like=True):
    """How the answer of a request is shown. It travels with the request, so that another gateway shows it the same."""

    kind: Kind
    model: str  #: as the client named it
    include_usage: bool = False
    logprobs: bool = False
    legacy_functions: bool = False


_decode_view = msgspec.json.Decoder(View).decode
_encode_view = msgspec.json.Encoder().encode


def view_text(view: View) -> str:
    """As it travels."""
    return _encode_view(view).decode()


def read_view(text: str, kind: Kind, request_id: str, model: str) -> View:
    """The view of a request whose answer is asked for by its id.

    Raises:
        StreamNotResumable: it has none, or belongs to another route.
    """
    try:
        view = _decode_view(text) if text else View(kind=kind, model=model)
    except msgspec.MsgspecError as error:
        raise StreamNotResumable(f"the request {request_id} was not made by a gateway") from error
    if view.kind != kind:
        raise StreamNotResumable(f"the stream of {request_id} is at {_ROUTES[view.kind]}/{request_id}/stream")
    return view


def last_event(header: str | None, query: str | None, request_id: str) -> EventId | None:
    """The event that was seen last, of the request in the path; None: nothing was.

    Raises:
        InvalidRequest: it is no event id, or one of another request.
    """
    text, param = (query, "starting_after") if query else (header, "Last-Event-ID")
    if not text:
        return None
    event = read_event_id(text, param)
    if event.request != request_id:
        raise InvalidRequest(f"{param!r} is an event of another stream than {request_id}.", param=param)
    return event


class Rest:
    """Shows what follows after an event. What comes before it is made too, because later events depend on it."""

    def __init__(self, events: Encode, last: EventId) -> None:
        self._events, self._last = events, last
        self._reached = False  #: the run of that event
        self._passed = False  #: and the event itself

    def events(self, frames: Sequence[object]) -> bytes:
        """As the ``events`` of the stream, without what the client has."""
        if self._passed:
            return self._events(frames)
        for at, frame in enumerate(frames):
            rest = self._after(frame)
            if rest is not None:
                return rest + self._events(frames[at + 1 :])
        return b""

    def _after(self, frame: object) -> bytes | None:
        """What of this frame is new to the client; None: nothing, and the event is not reached."""
        if not isinstance(frame, Delta | Done):
            return None
        last, made = self._last, self._events([frame])
        if frame.run != last.run:
            # The run was given up before that event's frame: the next one goes on from what was shown.
            self._passed = self._reached
            return made if self._passed else None
        self._reached = True
        if frame.seq < last.seq:
            return None
        self._passed = True
        if frame.seq > last.seq:
            return made
        return b"".join(made.split(_END)[at] + _END for at in range(last.part, made.count(_END))) if last.part else b""


_END = b"\n\n"
