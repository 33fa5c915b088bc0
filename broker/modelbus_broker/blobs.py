"""Claim checks: bodies too large for a message lie in the blob store, the message carries a reference.

The layout is a stream over ``$O.blobs.>`` with one subject per blob and one message per chunk. nats-py's own object
store reads 64 MiB in 15 s; reading by batched direct get (ADR-31) takes 0.3 s. Files of users lie in the same way in a bucket
of their own, and are written and read piece by piece.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator

from . import names
from .connection import Bus, Msg, parse_puback
from .errors import BusUnavailable, NotFound
from .messages import BlobRef
from .reading import read_stream

#: Requests up to this many bytes travel inside their message.
INLINE_LIMIT = 512 * 1024
CHUNK = 128 * 1024
_WINDOW = 64  # chunks on their way at once
_STREAM = names.object_stream(names.BLOBS)


def _subject(name: str) -> str:
    return names.object_subject(names.BLOBS, name)


class ChunkWriter:
    """Stores bytes, as they come, as messages on one subject. It is whole when :meth:`end` has returned.

    Attributes:
        size: bytes so far.
    """

    def __init__(self, bus: Bus, subject: str) -> None:
        self.size = 0
        self._bus = bus
        self._subject = subject
        self._sha256 = hashlib.sha256()
        self._rest = bytearray()  # less than a chunk
        self._acks: list[tuple[str, asyncio.Future[Msg]]] = []

    async def write(self, data: bytes) -> None:
        """Takes bytes; waits while too many are on their way.

        Raises:
            BusUnavailable: the store does not answer.
            JetStreamError: it is full.
        """
        self.size += len(data)
        self._sha256.update(data)
        start = 0
        if self._rest:
            start = min(CHUNK - len(self._rest), len(data))
            self._rest += data[:start]
            if len(self._rest) < CHUNK:
                return
            await self._send(bytes(self._rest))
            self._rest.clear()
        while len(data) - start >= CHUNK:
            await self._send(data[start : start + CHUNK])
            start += CHUNK
        self._rest += data[start:]

    async def end(self) -> str:
        """Returns the SHA-256 of all bytes, in hex, when all of them are stored. Raises as :meth:`write`."""
        if self._rest or not self.size:
            await self._send(bytes(self._rest))
            self._rest.clear()
        await self.settle()
        return self._sha256.hexdigest()

    async def _send(self, chunk: bytes) -> None:
        reply, future = self._bus.expect_reply()
        self._acks.append((reply, future))
        await self._bus.publish(self._subject, chunk, reply=reply)
        if len(self._acks) == _WINDOW:
            await self.settle()

    async def settle(self) -> None:
        """Waits until all that is on its way is stored: a purge would overtake it. Raises as :meth:`write`."""
        if not self._acks:
            return
        # Whoever is cancelled here leaves them as they are, for a purge that waits for them.
        await asyncio.wait([future for _, future in self._acks], timeout=10)
        acks, self._acks = self._acks, []
        for reply, _ in acks:
            self._bus.forget_reply(reply)
        if not all(future.done() for _, future in acks):
            raise BusUnavailable("the blob store does not answer")
        for _, future in acks:
            parse_puback(future.result())


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
    writer = ChunkWriter(bus, subject)
    await writer.write(data)
    return BlobRef(name=name, size=len(data), sha256=await writer.end())


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


async def iterate_chunks(bus: Bus, stream: str, subject: str, ref: BlobRef) -> AsyncIterator[bytes]:
    """What ``put_chunks`` or a ``ChunkWriter`` stored, piece by piece; a batch of them is in memory at a time.

    Raises:
        NotFound: it is not there, or not whole: after the pieces that are there, or in place of the last.
        BusUnavailable: the store does not answer.
    """
    size, digest = 0, hashlib.sha256()
    async for message in read_stream(bus, stream, subject, batch=_WINDOW // 2):
        size += len(message.data)
        digest.update(message.data)
        if size < ref.size:
            yield message.data
            continue
        if size == ref.size and digest.hexdigest() == ref.sha256:
            yield message.data
            return
        break
    raise NotFound(f"the blob {ref.name} is gone: {size} of {ref.size} bytes are there")


async def delete_blob(bus: Bus, ref: BlobRef) -> None:
    """Frees a blob's space."""
    await bus.js_request(f"STREAM.PURGE.{_STREAM}", {"filter": _subject(ref.name)})
