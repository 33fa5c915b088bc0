"""Key-value buckets, in the layout of NATS KV, with a reader that survives a restart of the server.

nats-py's ``watchall`` was blind for 8 to 19 s after a restart. Here a reader has its own subscription to the bucket's
subjects and re-reads the whole bucket on start, on reconnect and every 10 s.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Callable, Mapping
from types import MappingProxyType
from typing import Generic, TypeVar

import msgspec

from . import names
from .connection import Bus, JetStreamError, Msg, NoResponders
from .errors import BusUnavailable, Conflict
from .reading import read_stream

log = logging.getLogger(__name__)

T = TypeVar("T")

_WRONG_LAST_SEQUENCE = (10071, 10164)


class Entry(msgspec.Struct, frozen=True):
    """What a bucket holds under a key."""

    value: bytes
    seq: int  #: of the last message there, also of a delete or an expiry marker
    deleted: bool = False


class Bucket:
    """One bucket."""

    def __init__(self, bus: Bus, name: str) -> None:
        self.bus = bus
        self.name = name

    async def put(self, key: str, value: bytes, *, ttl_s: int = 0) -> int:
        """Stores a value over whatever is there and returns its sequence."""
        return (await self.bus.js_publish(names.bucket_subject(self.name, key), value, ttl_s=ttl_s)).seq

    async def get(self, key: str) -> Entry | None:
        """The last entry of a key, a marker of a deleted or expired one included; None if it never was.

        Raises:
            BusUnavailable: the bucket does not answer.
        """
        subject = names.bucket_subject(self.name, key)
        try:
            msg = await self.bus.request(f"$JS.API.DIRECT.GET.{names.bucket_stream(self.name)}.{subject}")
        except (NoResponders, TimeoutError) as error:
            raise BusUnavailable(f"the bucket {self.name!r} does not answer") from error
        if msg.status not in ("", "404"):
            raise BusUnavailable(f"the bucket {self.name!r} cannot be read: status {msg.status}")
        return _entry(msg) if msg.status == "" else None

    async def create(self, key: str, value: bytes, *, ttl_s: int = 0) -> int:
        """Stores a value where none is, also over the marker of a deleted or expired one.

        Raises:
            Conflict: there is a value, or someone else was faster.
        """
        entry = await self.get(key)
        if entry is not None and not entry.deleted:
            raise Conflict(f"{self.name}/{key} is there already")
        return await self.update(key, value, entry.seq if entry else 0, ttl_s=ttl_s)

    async def update(self, key: str, value: bytes, seq: int, *, ttl_s: int = 0) -> int:
        """Stores a value if the key's last sequence is still ``seq`` (0: nothing there) and returns the new one.

        Raises:
            Conflict: someone changed it meanwhile.
        """
        subject = names.bucket_subject(self.name, key)
        try:
            ack = await self.bus.js_publish(subject, value, ttl_s=ttl_s, expected_last_subject_seq=seq)
        except JetStreamError as error:
            if error.err_code in _WRONG_LAST_SEQUENCE:
                raise Conflict(f"{self.name}/{key} was changed meanwhile") from error
            raise
        return ack.seq

    async def delete(self, key: str, seq: int | None = None) -> None:
        """Deletes a key; with ``seq`` only if it is still the last sequence.

        Raises:
            Conflict: someone changed it meanwhile.
        """
        subject = names.bucket_subject(self.name, key)
        try:
            await self.bus.js_publish(subject, b"", expected_last_subject_seq=seq, headers={"KV-Operation": "DEL"})
        except JetStreamError as error:
            if error.err_code in _WRONG_LAST_SEQUENCE:
                raise Conflict(f"{self.name}/{key} was changed meanwhile") from error
            raise

    async def under(self, pattern: str) -> AsyncIterator[tuple[str, Entry]]:
        """Keys that match a pattern, with what they hold, in the order in which they were written last; however many.

        Args:
            pattern: of keys: ``*`` stands for a token, ``>`` for the rest. Empty values count as deleted.

        Raises:
            BusUnavailable: the bucket does not answer.
        """
        prefix, subject = f"$KV.{self.name}.", names.bucket_subject(self.name, pattern)
        async for message in read_stream(self.bus, names.bucket_stream(self.name), subject, batch=1000):
            if message.data:
                yield message.subject.removeprefix(prefix), Entry(message.data, message.seq)

    async def all(self) -> dict[str, Entry]:
        """Every key's last entry, markers included, read in one batch.

        Raises:
            BusUnavailable: the bucket does not answer, or not to the end.
        """
        prefix = f"$KV.{self.name}."
        found: dict[str, Entry] = {}
        done = asyncio.Event()
        trouble = ""

        def take(msg: Msg) -> None:
            nonlocal trouble
            status = msg.status
            if status and "Nats-Sequence" not in msg.headers:
                # 204 ends a batch, 404 says that there is nothing; 408 and 413 are refusals, 503 nobody there.
                trouble = "" if status in ("204", "404") else f"status {status}"
                done.set()
            elif msg.headers:
                found[msg.headers["Nats-Subject"].removeprefix(prefix)] = _entry(msg)

        inbox = self.bus.new_inbox()
        subscription = await self.bus.subscribe(inbox, take)
        try:
            body = msgspec.json.encode({"multi_last": [f"{prefix}>"], "batch": 65536})
            stream = names.bucket_stream(self.name)
            await self.bus.publish(f"$JS.API.DIRECT.GET.{stream}", body, reply=inbox)
            async with asyncio.timeout(5):
                await done.wait()
        except TimeoutError as error:
            raise BusUnavailable(f"the bucket {self.name!r} does not answer") from error
        finally:
            await subscription.unsubscribe()
        if trouble:
            raise BusUnavailable(f"the bucket {self.name!r} cannot be read: {trouble}")
        return found


def _entry(msg: Msg) -> Entry:
    headers = msg.headers
    deleted = headers.get("KV-Operation", "") in ("DEL", "PURGE") or "Nats-Marker-Reason" in headers
    return Entry(msg.data, int(headers.get("Nats-Sequence", 0)), deleted)


class BucketReader(Generic[T]):
    """A bucket's values, decoded, as they are now.

    Args:
        decode: bytes to record; what it cannot decode is left out and logged.
        ttl_s: drop a value that nobody has renewed for so long: the server tells nobody when one expires.
        trust: take a value from the message that passes. Off for buckets written by compare-and-set: there a
            refused publish passes just the same, so the key is read again instead.
    """

    def __init__(
        self, bus: Bus, name: str, decode: Callable[[bytes], T], *, ttl_s: float = 0.0, trust: bool = False
    ) -> None:
        self.bucket = Bucket(bus, name)
        self.ready = False
        self.version = 0  #: grows with each change of a value
        self._bus = bus
        self._decode = decode
        self._ttl_s = ttl_s
        self._trust = trust
        self._values: dict[str, T] = {}
        self._view = MappingProxyType(self._values)
        self._seen: dict[str, float] = {}
        self._changed = asyncio.Event()
        self._dirty: set[str] = set()
        self._wake = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    @property
    def values(self) -> Mapping[str, T]:
        """Key to record; a live view."""
        return self._view

    async def start(self) -> None:
        """Subscribes and reads the bucket once.

        Raises:
            BusUnavailable: it cannot be read.
        """
        self._subscription = await self._bus.subscribe(f"$KV.{self.bucket.name}.>", self._on_message)
        self._bus.on_reconnect(self._on_reconnect)
        await self.reread()
        self.ready = True
        self._task = asyncio.create_task(self._keep(), name=f"bucket-{self.bucket.name}")

    async def close(self) -> None:
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task
            await self._subscription.unsubscribe()

    async def changed(self, timeout_s: float) -> bool:
        """Waits until something has changed since the last call; False if nothing did within the time."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._changed.wait()
        except TimeoutError:
            return False
        self._changed.clear()
        return True

    async def reread(self) -> None:
        """Reads the whole bucket. Values that passed meanwhile are newer and stay."""
        began = time.monotonic()
        entries = await self.bucket.all()
        for key in list(self._values):
            if (key not in entries or entries[key].deleted) and self._seen.get(key, 0) < began:
                self._drop(key)
        for key, entry in entries.items():
            if not entry.deleted and self._seen.get(key, 0) < began:
                seen = self._seen.get(key)
                self._take(key, entry.value)
                if seen is not None and self._trust:
                    self._seen[key] = seen  # reading it again is not a sign of life

    async def look(self, key: str) -> None:
        """Reads one key again now. Raises BusUnavailable."""
        entry = await self.bucket.get(key)
        if entry is None or entry.deleted:
            self._drop(key)
        else:
            self._take(key, entry.value)

    def _on_message(self, msg: Msg) -> None:
        key = msg.subject.removeprefix(f"$KV.{self.bucket.name}.")
        if not self._trust:
            self._dirty.add(key)
            self._wake.set()
        elif msg.headers and msg.headers.get("KV-Operation", "") in ("DEL", "PURGE"):
            self._drop(key)
        else:
            self._take(key, msg.data)

    def _take(self, key: str, value: bytes) -> None:
        try:
            record = self._decode(value)
        except msgspec.MsgspecError as error:
            log.warning("bucket %s: key %s cannot be decoded: %s", self.bucket.name, key, error)
            return
        self._seen[key] = time.monotonic()
        if self._values.get(key) != record:
            self._values[key] = record
            self._has_changed()

    def _drop(self, key: str) -> None:
        self._seen.pop(key, None)
        if self._values.pop(key, None) is not None:
            self._has_changed()

    def _has_changed(self) -> None:
        self.version += 1
        self._changed.set()

    async def _on_reconnect(self) -> None:
        await self._refresh()

    async def _refresh(self) -> None:
        try:
            await self.reread()
        except BusUnavailable as error:
            log.info("bucket %s: %s", self.bucket.name, error)

    async def _keep(self) -> None:
        next_read = time.monotonic() + 10
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(1.0):
                    await self._wake.wait()
            self._wake.clear()
            dirty, self._dirty = self._dirty, set()
            if dirty:
                # A publish reaches us before the stream has stored it.
                await asyncio.sleep(0.01)
            for key in dirty:
                try:
                    await self.look(key)
                except BusUnavailable:
                    self._dirty.add(key)
            # While we are cut off nobody can renew: forgetting all workers then would answer 503 for no reason.
            if self._ttl_s and self._bus.connected_for_s > self._ttl_s:
                stale = time.monotonic() - self._ttl_s
                for key in [key for key, seen in self._seen.items() if seen < stale]:
                    self._drop(key)
            if time.monotonic() >= next_read and self._bus.is_connected:
                next_read = time.monotonic() + 10
                await self._refresh()
