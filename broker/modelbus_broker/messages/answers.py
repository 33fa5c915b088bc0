"""What is kept for those who ask again: whole answers (bucket ``answers``) and the keys they were asked under (``idempotency``)."""

from __future__ import annotations

import msgspec

from .base import Message
from .publisher import Failed
from .worker import BlobRef


class KeptAnswer(Message, frozen=True, kw_only=True, tag="answer"):
    """A whole answer, as its worker kept it before it acknowledged the request. Key: the request's id."""

    id: str
    run: str  #: that completed it
    frames: bytes = b""  #: an encoded list, those of the runs before first
    blob: BlobRef | None = None  #: the same, too large for a bucket
    lost: str = ""  #: why the answer is not here
    view: str = ""  #: of the request


class KeyRecord(Message, frozen=True, kw_only=True, tag="key_record"):
    """The request that was asked under an Idempotency-Key. Key: a hash of tenant and key."""

    id: str  #: of the request
    body: str  #: a hash of what was asked
    failed: Failed | None = None  #: it came to nothing: who comes now asks anew


decode_kept_answer = msgspec.msgpack.Decoder(KeptAnswer).decode
decode_key_record = msgspec.msgpack.Decoder(KeyRecord).decode
