"""What is kept for later: usage events (``MB_USAGE``) and dead letters (``MB_DEAD``)."""

from __future__ import annotations

import msgspec

from .base import Message
from .publisher import Usage


class UsageEvent(Message, frozen=True, kw_only=True, tag="usage"):
    """One per run that ended. The ledger bills the winning run and lists the others as waste."""

    id: str
    run: str
    model: str
    deployment: str
    tenant: str = ""
    usage: Usage = Usage()
    outcome: str = "done"  #: done, failed, cancelled, waste
    code: str = ""
    at_ms: int = 0
    queue_ms: float = 0.0
    run_ms: float = 0.0


class DeadLetter(Message, frozen=True, kw_only=True, tag="dead"):
    """A request that will not be run again, with why, and the original bytes."""

    id: str
    model: str
    reason: str
    detail: str = ""
    crashes: int = 0
    original: bytes = b""
    subject: str = ""
    at_ms: int = 0


decode_usage_events = msgspec.msgpack.Decoder(list[UsageEvent]).decode
decode_dead_letter = msgspec.msgpack.Decoder(DeadLetter).decode
