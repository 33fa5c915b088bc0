"""What is kept for those who ask again: whole answers (bucket ``answers``), the keys they were asked under
(``idempotency``), and what was asked durably (``jobs``)."""

from __future__ import annotations

import msgspec

from .base import Message
from .publisher import Failed
from .worker import BlobRef


class KeptAnswer(Message, frozen=True, kw_only=True, tag="answer"):
    """A whole answer, as its worker kept it before it acknowledged the request. Key: the request's id.

    Of a job that has no answer it says why, in ``failed``."""

    id: str
    run: str  #: that completed it
    frames: bytes = b""  #: an encoded list, those of the runs before first
    blob: BlobRef | None = None  #: the same, too large for a bucket
    lost: str = ""  #: why the answer is not here
    view: str = ""  #: of the request
    failed: Failed | None = None  #: of a job: the error that it ended with, in place of frames
    model: str = ""  #: of the request
    at_ms: int = 0  #: Unix time at which it was kept; 0: not said


class KeyRecord(Message, frozen=True, kw_only=True, tag="key_record"):
    """The request that was asked under an Idempotency-Key. Key: a hash of tenant and key."""

    id: str  #: of the request
    body: str  #: a hash of what was asked
    failed: Failed | None = None  #: it came to nothing: who comes now asks anew


class JobRecord(Message, frozen=True, kw_only=True, tag="job"):
    """A request that was submitted as a job and is in its queue, or was. Key: its id."""

    id: str  #: of the request
    model: str
    submitted_ms: int
    budget_ms: int  #: it is not started later than this after ``submitted_ms``
    kept_s: int  #: how long its answer is kept
    stream: str  #: where its message lies until it has ended
    seq: int
    lane: str = "lo"
    tenant: str = ""
    name: str = ""  #: given by whoever submitted it
    batch: str = ""  #: it is a row of this batch
    index: int = 0  #: which row
    labels: dict[str, str] = {}  #: free: a prompt function's name and version, for instance


decode_kept_answer = msgspec.msgpack.Decoder(KeptAnswer).decode
decode_key_record = msgspec.msgpack.Decoder(KeyRecord).decode
decode_job_record = msgspec.msgpack.Decoder(JobRecord).decode
