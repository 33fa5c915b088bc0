"""What is kept for later: usage events (``MB_USAGE``) and dead letters (``MB_DEAD``)."""

from __future__ import annotations

import msgspec

from .base import Message
from .usage import Usage
from .worker import BlobRef


class UsageEvent(Message, frozen=True, kw_only=True, tag="usage"):
    """One per run that ended. What is known to be superseded says ``waste``; where its worker learnt that after it had
    booked the run, a second event of the run says so, and takes the place of the first. Who bills an id takes its last
    run that is done (by attempt, then by delivery): an earlier one was booked by a worker that died before its last frame
    had arrived."""

    id: str
    run: str
    model: str
    deployment: str
    tenant: str = ""
    adapter: str = ""  #: whose weights lay over the model's
    usage: Usage = Usage()
    outcome: str = "done"  #: done, failed (also without a run: expired, poison), cancelled, handed_over, waste
    code: str = ""
    at_ms: int = 0
    queue_ms: float = 0.0
    run_ms: float = 0.0


class DeadLetter(Message, frozen=True, kw_only=True, tag="dead"):
    """A request that will not be run again, with why, and the original bytes."""

    id: str  #: "" when it could not be read
    model: str
    reason: str  #: poison_request, not_decodable, undeployed, or the code of the error that it failed with
    detail: str = ""
    crashes: int = 0
    original: bytes = b""
    subject: str = ""
    at_ms: int = 0
    runs: list[str] = []  #: that were lost or failed, as ``names.run_name`` makes them
    tenant: str = ""
    body: BlobRef | None = None  #: the task, where it was too large for the original: blobs are gone after a day


decode_usage_events = msgspec.msgpack.Decoder(list[UsageEvent]).decode
decode_dead_letter = msgspec.msgpack.Decoder(DeadLetter).decode
