"""Frames as JSON that people can read and change: names in place of positions, and nothing that has its default. Pure."""

from __future__ import annotations

from typing import Any, get_args, get_origin

import msgspec
from modelbus_broker.messages import Delta, Done, Vectors
from modelbus_broker.messages.base import Row

_FRAMES: dict[str, type[Delta | Vectors | Done]] = {"delta": Delta, "vectors": Vectors, "done": Done}
#: Of one run only; and what no client of the SDK sees.
_LEFT_OUT = frozenset({"id", "run", "seq", "prompt_logprobs", "engine_ms"})


def readable(row: Any) -> Any:
    """A frame with names in place of positions; what has its default is left out."""
    if isinstance(row, list):
        return [readable(item) for item in row]
    if not isinstance(row, Row):
        return msgspec.to_builtins(row)
    kind = next((kind for kind, cls in _FRAMES.items() if isinstance(row, cls)), "")
    said: dict[str, Any] = {"type": kind} if kind else {}
    left_out = _LEFT_OUT if kind else frozenset()
    for field in msgspec.structs.fields(type(row)):
        value = getattr(row, field.name)
        if field.name not in left_out and value not in (field.default, [], ""):
            said[field.name] = readable(value)
    return said


def frame_of(said: dict[str, Any], id: str) -> Delta | Vectors | Done:
    """The frame that ``readable`` has written; raises KeyError, TypeError or msgspec.ValidationError for what is none."""
    kind = _FRAMES[said["type"]]
    frame = _row(kind, {**said, "id": id, "run": "", "seq": 0})
    assert isinstance(frame, (Delta, Vectors, Done))
    return frame


def _row(kind: type[Row], said: dict[str, Any]) -> Row:
    values = {}
    for field in msgspec.structs.fields(kind):
        if field.name in said:
            values[field.name] = _value(field.type, said[field.name])
    return kind(**values)


def _value(kind: Any, said: Any) -> Any:
    if isinstance(kind, type) and issubclass(kind, Row):
        return _row(kind, said)
    if get_origin(kind) is list and isinstance(inner := get_args(kind)[0], type) and issubclass(inner, Row):
        return [_row(inner, item) for item in said]
    return msgspec.convert(said, kind)
