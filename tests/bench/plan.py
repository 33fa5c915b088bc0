"""What a row is told, and what it tells."""

from __future__ import annotations

import msgspec


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    seconds: float
    rounds: int
    requests: int = 300_000  #: of the row soak


class Line(msgspec.Struct, frozen=True, kw_only=True):
    """One line of the table."""

    what: str
    modelbus: str
    other: str
    result: str
    goal: str = ""
    met: bool | None = None  #: None: it has no goal
