"""The shared shape of everything that travels on the bus.

Messages are frozen and keyword-only, so that nobody edits one that another task still holds and so that
no call site depends on the order of fields. They grow only by new fields *with defaults at the end*; a tag
or a field is never renamed or reused. Decoders ignore fields that a newer sender added. What is frozen cannot refer
to itself, so the garbage collector need not look at it (``gc=False``); that counts where thousands are alive.
"""

from __future__ import annotations

from typing import Any

import msgspec


class Message(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, gc=False):
    """A message or record written as a map: readable by name, tolerant of older and newer peers."""


class Row(msgspec.Struct, frozen=True, kw_only=True, array_like=True, gc=False):
    """A message written as an array, for frames: they are many and small.

    Array fields are known by position, so a new field goes to the end of its own struct and has a default.
    A row therefore is never subclassed once it has fields.
    """


_encoder = msgspec.msgpack.Encoder()

#: Encodes any message, or a list of them, as msgpack.
encode = _encoder.encode


def encode_list(items: list[bytes]) -> bytes:
    """A list of messages that are encoded already, as ``encode`` would give it (MessagePack's array formats)."""
    count = len(items)
    if count < 16:
        head = bytes((0x90 | count,))
    else:
        head = b"\xdc" + count.to_bytes(2) if count < 1 << 16 else b"\xdd" + count.to_bytes(4)
    return head + b"".join(items)


def to_json(value: Any) -> bytes:
    """Encodes a message for people and for tools that speak JSON."""
    return msgspec.json.encode(value)
