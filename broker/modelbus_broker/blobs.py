"""Claim checks: bodies too large for a message lie in the blob store, the message carries a reference.

The layout is a stream over ``$O.blobs.>`` with one subject per blob and one message per chunk. nats-py's own object
store reads 64 MiB in 15 s; reading by batched direct get (ADR-31) takes 0.3 s.
"""

from __future__ import annotations

import asyncio
import hashlib

from . import names
from .connection import Bus, Msg, parse_puback
from .errors import BusUnavailable, NotFound
from .messages import BlobRef
from .reading import read_stream

#: Requests up to this many bytes travel inside their message.
INLINE_LIMIT = 512 * 1024
CHUNK = 128 * 1024
_WINDOW = 64  # chunks on their way at once
_STREAM = f"OBJ_{names.BLOBS}"


def _subject(name: str) -> str:
    return f"$O.{names.BLOBS}.C.{name}"


async def put_blob(bus: Bus, name: str, data: bytes) -> BlobRef:
    """Stores bytes under a name, which must be new, and returns when all of it is stored.

    Raises:
        BusUnavailable: the store does not answer.
        JetStreamError: it is full.
    """
    return await put_chunks(bus, _subject(name), name, data)


async def get_blob(bus: Bus, ref: BlobRef) -> bytes:
    """Reads a blob in batches.

    Raises:
        NotFound: it is not there, or not whole.
        BusUnavailable: the store does not answer.
    """
    return await get_chunks(bus, _STREAM, _subject(ref.name), ref)


async def put_chunks(bus: Bus, subject: str, name: str, data: bytes) -> BlobRef:
    """Stores bytes as messages on a subject of their own, in whichever stream covers it; raises as ``put_blob``."""
    for start in range(0, max(len(data), 1), CHUNK * _WINDOW):
        acks: list[tuple[str, asyncio.Future[Msg]]] = []
        for at in range(start, min(start + CHUNK * _WINDOW, max(len(data), 1)), CHUNK):
            reply, future = bus.expect_reply()
            await bus.publish(subject, data[at : at + CHUNK], reply=reply)
            acks.append((reply, future))
        try:
            async with asyncio.timeout(10):
                for _, future in acks:
                    parse_puback(await future)
        except TimeoutError as error:
            raise BusUnavailable("the blob store does not answer") from error
        finally:
            for reply, _ in acks:
                bus.forget_reply(reply)
    return BlobRef(name=name, size=len(data), sha256=hashlib.sha256(data).hexdigest())


async def get_chunks(bus: Bus, stream: str, subject: str, ref: BlobRef) -> bytes:
    """Reads what ``put_chunks`` stored; raises as ``get_blob``."""
    chunks: list[bytes] = []
    size = 0
    async for message in read_stream(bus, stream, subject, batch=_WINDOW):
        chunks.append(message.data)
        size += len(message.data)
        if size >= ref.size:
            break
    data = b"".join(chunks)
    if len(data) != ref.size or hashlib.sha256(data).hexdigest() != ref.sha256:
        raise NotFound(f"the blob {ref.name} is gone: {len(data)} of {ref.size} bytes are there")
    return data


async def delete_blob(bus: Bus, ref: BlobRef) -> None:
    """Frees a blob's space."""
    await bus.js_request(f"STREAM.PURGE.{_STREAM}", {"filter": _subject(ref.name)})
