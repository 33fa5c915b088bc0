"""Files in a folder that all gateways see: those that are too large for the bus."""

from __future__ import annotations

import asyncio
import errno
import logging
import os
from collections.abc import AsyncIterator
from pathlib import Path
from typing import BinaryIO

from modelbus_broker.errors import ConfigurationError, EngineFailed, NotFound

log = logging.getLogger(__name__)

#: HTTP status: there is no room for what is to be stored.
NO_ROOM = 507
_PIECE = 1 << 20


class FolderWriter:
    """One file on its way into the folder. It is there under its name only when :meth:`end` has returned."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._draft = path.with_name(f".{path.name}.{os.getpid()}")
        self._file: BinaryIO | None = None

    async def write(self, data: bytes) -> None:
        """Raises EngineFailed: the disk does not take it."""
        try:
            if self._file is None:
                self._file = await asyncio.to_thread(self._draft.open, "xb")
            await asyncio.to_thread(self._file.write, data)
        except OSError as error:
            raise _failed(self._path.parent, error) from error

    async def end(self) -> None:
        """The file is on disk. Raises as :meth:`write`."""
        await self.write(b"")
        try:
            await asyncio.to_thread(self._settle)
        except OSError as error:
            raise _failed(self._path.parent, error) from error

    def _settle(self) -> None:
        assert self._file is not None
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        self._draft.replace(self._path)
        folder = os.open(self._path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)  # the name, too
        finally:
            os.close(folder)

    async def drop(self) -> None:
        """Leaves nothing behind of what has not ended. Raises as :meth:`write`."""
        try:
            if self._file is not None:
                self._file.close()
        except OSError as error:  # what was not written yet has no room
            log.info("%s: %s", self._draft, error)
        try:
            await asyncio.to_thread(self._draft.unlink, missing_ok=True)
        except OSError as error:
            raise _failed(self._path.parent, error) from error


class Folder:
    """The folder."""

    def __init__(self, path: str) -> None:
        self._path = Path(path).expanduser()

    def check(self) -> None:
        """Raises ConfigurationError: it is no folder that can be written to."""
        if not self._path.is_dir() or not os.access(self._path, os.W_OK):
            raise ConfigurationError(f"--files-root {self._path}: it is no folder that can be written to")

    def writer(self, name: str) -> FolderWriter:
        return FolderWriter(self._path / name)

    async def read(self, name: str) -> AsyncIterator[bytes]:
        """The file, piece by piece.

        Raises:
            NotFound: it is not there.
            EngineFailed: it cannot be read.
        """
        try:
            file = await asyncio.to_thread((self._path / name).open, "rb")
        except FileNotFoundError as error:
            raise NotFound(f"the content of {name} is not in this gateway's --files-root") from error
        except OSError as error:
            raise _failed(self._path, error) from error
        with file:
            while data := await asyncio.to_thread(file.read, _PIECE):
                yield data

    async def delete(self, name: str) -> None:
        """One that is not there is no fault. Raises EngineFailed: it cannot be deleted."""
        try:
            await asyncio.to_thread((self._path / name).unlink, missing_ok=True)
        except OSError as error:
            raise _failed(self._path, error) from error

    async def forget(self, name: str) -> None:
        """Deletes the file, and what a writer has begun of it and not ended. Raises as :meth:`delete`."""
        try:
            drafts = await asyncio.to_thread(lambda: [path.name for path in self._path.glob(f".{name}.*")])
        except OSError as error:
            raise _failed(self._path, error) from error
        for one in (*drafts, name):
            await self.delete(one)

    def close(self) -> None:
        """There is nothing to let go of."""


def _failed(folder: Path, error: OSError) -> EngineFailed:
    full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    return EngineFailed(
        f"the folder of --files-root {folder} failed: {error.strerror or error}", status=NO_ROOM if full else 0
    )
