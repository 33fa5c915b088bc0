"""Where uploaded files lie that are too large for the bus: ``--files-root``, a folder or a bucket of an S3 service."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Protocol

from .folder import Folder


class Writer(Protocol):
    """One file on its way in. It is there under its name only when :meth:`end` has returned."""

    async def write(self, data: bytes) -> None:
        """Raises EngineFailed: it cannot be stored."""

    async def end(self) -> None:
        """The file is stored. Raises as :meth:`write`."""

    async def drop(self) -> None:
        """Leaves nothing behind of what has not ended; a whole file stays.

        Raises:
            EngineFailed: it cannot be deleted now.
        """


class Root(Protocol):
    """A place for files by their names, which all gateways see."""

    def check(self) -> None:
        """Blocks for as long as it takes.

        Raises:
            ConfigurationError: files cannot be stored there; the message says why.
            MissingExtra: a library for it is not installed.
        """

    def writer(self, name: str) -> Writer: ...

    def read(self, name: str) -> AsyncIterator[bytes]:
        """The file, piece by piece.

        Raises:
            NotFound: it is not there.
            EngineFailed: it cannot be read.
        """

    async def delete(self, name: str) -> None:
        """One that is not there is no fault. Raises EngineFailed: it cannot be deleted."""

    async def forget(self, name: str) -> None:
        """Deletes all that an upload has left which nobody ended: the file, and what there is of a part of it.

        Raises:
            EngineFailed: it cannot be deleted.
        """

    def close(self) -> None:
        """Lets go of connections. Nothing is asked after that."""


def open_root(place: str) -> Root:
    """The root at ``s3://BUCKET/PREFIX`` or in a folder.

    Raises:
        ConfigurationError: the address makes no sense.
    """
    if "://" not in place:
        return Folder(place)
    from .s3 import S3Bucket

    return S3Bucket(place)
