"""Where files lie: their records in a bucket, their bytes in the bus's object bucket or, when they are large, in ``--files-root``.

The bytes are stored first and the record last, so a file that is there is whole. What a gateway that was killed had stored without
a record is taken away later; the time in a file's id says how old it is. The root may be of other buses too: what an upload
puts there is announced on the bus before, under ``upload.<id>``, and only that is taken away.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import re
import time
from collections.abc import AsyncIterator, Iterator

from modelbus_broker import names
from modelbus_broker.blobs import ChunkWriter, iterate_chunks
from modelbus_broker.buckets import Bucket
from modelbus_broker.connection import Bus, JetStreamError
from modelbus_broker.errors import BusUnavailable, ConfigurationError, EngineFailed, NotFound, RequestTooLarge
from modelbus_broker.messages import BlobRef, encode
from modelbus_broker.messages.files import FileRecord, decode_file
from modelbus_broker.names import random_token

from .folder import NO_ROOM
from .roots import Root, open_root

log = logging.getLogger(__name__)

#: Files up to this size lie on the bus.
BUS_LIMIT = 64 << 20
#: What a multipart body has beside its file, at most: its head says no more of the file's size than its own length.
FRAMING = 64 << 10

_ID = re.compile(r"file-([0-9a-f]{11})[0-9a-z]{12}")
_STREAM = names.object_stream(names.FILES)
#: Bytes without a record are left alone for so long: their upload may be going on.
_UPLOAD_S = 24 * 3600


class Upload:
    """A file on its way in."""

    def __init__(self, files: FileStore, *, to_root: bool, limit: int) -> None:
        self.id = f"file-{time.time_ns() // 1_000_000:011x}{random_token(12)}"
        self.size = 0
        self._files = files
        self._limit = limit
        self._sha256 = hashlib.sha256()
        self._chunks = None if to_root else ChunkWriter(files.bus, _subject(self.id))
        self._on_root = files.root.writer(self.id) if to_root and files.root is not None else None
        self._announced = self._may_be_whole = False

    async def write(self, data: bytes) -> None:
        """Takes the next bytes.

        Raises:
            RequestTooLarge: they are more than may be.
            BusUnavailable, JetStreamError, EngineFailed: they cannot be stored; with the status 507 where there is no room.
        """
        self.size += len(data)
        if self.size > self._limit:
            raise self._files.too_large()
        if self._chunks is not None:
            with _said_when_full():
                await self._chunks.write(data)
        elif self._on_root is not None:
            await self._announce()
            self._sha256.update(data)
            await self._on_root.write(data)

    async def _announce(self) -> None:
        if not self._announced:
            await self._files.records.put(_upload_key(self.id), b"1")
            self._announced = True

    async def end(self, filename: str, purpose: str, lives_s: int) -> FileRecord:
        """The file is there. Raises as :meth:`write`."""
        sha256 = ""
        if self._chunks is not None:
            with _said_when_full():
                sha256 = await self._chunks.end()
        elif self._on_root is not None:
            await self._announce()
            self._may_be_whole = True
            await self._on_root.end()
            sha256 = self._sha256.hexdigest()
        self._may_be_whole = True
        now = time.time_ns() // 1_000_000
        record = FileRecord(
            id=self.id, filename=filename, purpose=purpose, size=self.size, sha256=sha256, created_ms=now,
            expires_ms=now + lives_s * 1000 if lives_s else 0, place="bus" if self._chunks is not None else "root",
        )  # fmt: skip
        await self._files.records.create(self.id, encode(record))
        if self._announced:
            with contextlib.suppress(BusUnavailable, JetStreamError):
                await self._files.records.delete(_upload_key(self.id))
        return record

    async def drop(self) -> None:
        """Takes back what was stored. Of a file that may be whole, its record may be too: the upkeep looks later."""
        if self._on_root is not None:
            with contextlib.suppress(EngineFailed, BusUnavailable, JetStreamError):
                await self._on_root.drop()
                if self._announced and not self._may_be_whole:
                    await self._files.records.delete(_upload_key(self.id))
        elif self._chunks is not None and self.size and not self._may_be_whole:
            with contextlib.suppress(BusUnavailable, JetStreamError):
                await self._chunks.settle()
            await self._files.purge(self.id)


class FileStore:
    """All files.

    Args:
        root: a folder or ``s3://BUCKET/PREFIX`` for files of more than ``BUS_LIMIT``; "" refuses them.
        root_limit: bytes of one file there.
    """

    def __init__(self, bus: Bus, *, root: str = "", root_limit: int = 512 << 20) -> None:
        self.bus = bus
        self.records = Bucket(bus, names.BUCKET_FILES)
        self.root = open_root(root) if root else None
        self._root_limit = root_limit

    def close(self) -> None:
        """Lets go of the root."""
        if self.root is not None:
            self.root.close()

    def upload(self, body_bytes: int | None) -> Upload:
        """Begins one.

        Args:
            body_bytes: of the request that brings it; None: it is not known.

        Raises:
            RequestTooLarge: it is more than may be.
        """
        if self.root is None:
            if body_bytes is not None and body_bytes > BUS_LIMIT + FRAMING:
                raise self.too_large()
            return Upload(self, to_root=False, limit=BUS_LIMIT)
        if body_bytes is not None and body_bytes > self._root_limit + FRAMING:
            raise self.too_large()
        if body_bytes is not None and body_bytes <= BUS_LIMIT:
            return Upload(self, to_root=False, limit=BUS_LIMIT)
        return Upload(self, to_root=True, limit=self._root_limit)

    def too_large(self) -> RequestTooLarge:
        if self.root is None:
            return RequestTooLarge(
                f"The file has more than {BUS_LIMIT >> 20} MiB, which is what the bus keeps: start the gateway with "
                "--files-root FOLDER or s3://BUCKET for larger ones.",
                param="file",
            )
        return RequestTooLarge(
            f"The file has more than {self._root_limit >> 20} MiB, the gateway's --max-file-mb.", param="file"
        )

    async def get(self, file_id: str) -> FileRecord:
        """Raises NotFound: there is no such file, or it has expired."""
        entry = await self.records.get(file_id) if _ID.fullmatch(file_id) else None
        record = decode_file(entry.value) if entry is not None and not entry.deleted else None
        if record is None or expired(record):
            raise NotFound(f"No such File object: {file_id}", param="file_id")
        return record

    async def all(self) -> list[FileRecord]:
        """Those that have not expired, in no order."""
        found = [decode_file(entry.value) async for _, entry in self.records.under("*")]
        return [record for record in found if not expired(record)]

    async def content(self, record: FileRecord) -> AsyncIterator[bytes]:
        """A file's bytes, piece by piece.

        Raises:
            NotFound: they are not there, or not whole.
            ConfigurationError: they are in a root that this gateway was not told of.
        """
        if record.place == "bus":
            ref = BlobRef(name=record.id, size=record.size, sha256=record.sha256)
            pieces = iterate_chunks(self.bus, _STREAM, _subject(record.id), ref)
        else:
            pieces = self._root().read(record.id)
        async for piece in pieces:
            yield piece

    async def delete(self, record: FileRecord) -> None:
        """On the bus the record goes first: what remains when this is interrupted is taken away later. In the root, which
        may be of other buses too, the bytes do: nobody else would know what remains.

        Raises:
            ConfigurationError: they are in a root that this gateway was not told of; the file stays.
            EngineFailed: they cannot be deleted; the file stays.
        """
        if record.place == "bus":
            await self.records.delete(record.id)
            await self.purge(record.id)
        else:
            await self._root().delete(record.id)
            await self.records.delete(record.id)

    async def purge(self, file_id: str) -> None:
        """Frees what a file has on the bus."""
        await self.bus.js_request(f"STREAM.PURGE.{_STREAM}", {"filter": _subject(file_id)})

    async def forget_orphans(self) -> None:
        """Frees files that have expired, and what gateways that were killed have left of uploads."""
        known: set[str] = set()
        async for _, entry in self.records.under("*"):
            record = decode_file(entry.value)
            known.add(record.id)
            # Those of a root are deleted by a gateway that has it.
            if expired(record) and (record.place == "bus" or self.root is not None):
                try:
                    await self.delete(record)
                except EngineFailed as error:
                    log.warning("%s has expired and stays: %s", record.id, error.message)
        info = await self.bus.js_request(f"STREAM.INFO.{_STREAM}", {"subjects_filter": _subject("*")})
        for subject in info["state"].get("subjects") or {}:
            file_id = subject.rpartition(".")[2]
            if file_id not in known and _is_old(file_id):
                await self.purge(file_id)
        if self.root is not None:
            await self._forget_uploads(self.root)

    async def _forget_uploads(self, root: Root) -> None:
        """Those that were announced a day ago: either the file has its record, or it is not to be there."""
        uploads = [key async for key, _ in self.records.under("upload.*")]
        for key in uploads:
            file_id = key.partition(".")[2]
            if not _is_old(file_id):
                continue
            entry = await self.records.get(file_id)
            try:
                if entry is None or entry.deleted:
                    await root.forget(file_id)
            except EngineFailed as error:
                log.warning("what is left of the upload %s stays: %s", file_id, error.message)
            else:
                await self.records.delete(key)

    def _root(self) -> Root:
        if self.root is None:
            raise ConfigurationError(
                "The file is in a --files-root, which this gateway was started without.", status=500
            )
        return self.root


@contextlib.contextmanager
def _said_when_full() -> Iterator[None]:
    try:
        yield
    except JetStreamError as error:
        if not error.full:
            raise
        raise EngineFailed(
            f"The bus has no room for the file ({error.message}): delete files that nobody needs, or start the gateway with "
            "--files-root, where large ones lie elsewhere.",
            status=NO_ROOM,
        ) from error


def expired(record: FileRecord) -> bool:
    return bool(record.expires_ms) and record.expires_ms <= time.time() * 1000


def _is_old(file_id: str) -> bool:
    """Whether nobody can be uploading it any more."""
    parts = _ID.fullmatch(file_id)
    return parts is not None and int(parts[1], 16) < (time.time() - _UPLOAD_S) * 1000


def _upload_key(file_id: str) -> str:
    return f"upload.{file_id}"


def _subject(file_id: str) -> str:
    return names.object_subject(names.FILES, file_id)
