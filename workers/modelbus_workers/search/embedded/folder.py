"""The folder of an embedded engine: one process owns it, and its stores lie in it."""

from __future__ import annotations

import fcntl
import os
import shutil
from pathlib import Path

from modelbus_broker.errors import ConfigurationError, EngineFailed
from modelbus_broker.names import model_token, random_token


class Folder:
    """``lock`` and ``stores/<name>-<hash>/``."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock: int | None = None

    def own(self) -> None:
        """Makes this process the owner until ``close`` or its end, however it comes.

        Raises:
            ConfigurationError: the folder cannot be made, or another process owns it.
        """
        try:
            self._stores.mkdir(parents=True, exist_ok=True, mode=0o700)
            descriptor = os.open(self.path / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise ConfigurationError(f"the folder {self.path} cannot be used for stores: {error.strerror}") from error
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            owner = os.pread(descriptor, 32, 0).decode(errors="replace").strip() or "unknown"
            os.close(descriptor)
            raise ConfigurationError(
                f"the stores in {self.path} belong to another process (pid {owner}): an embedded store has one owner. "
                "Ask that service over the bus, stop it, or name another folder"
            ) from error
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
        self._lock = descriptor
        self._sweep()

    def close(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    @property
    def _stores(self) -> Path:
        return self.path / "stores"

    def existing(self) -> list[Path]:
        """The folders of all stores."""
        return sorted(path for path in self._stores.iterdir() if path.is_dir() and not path.name.startswith("."))

    def of(self, store: str) -> Path:
        """The folder of a store, whether it is there or not."""
        return self._stores / model_token(store)

    def draft(self) -> Path:
        """A folder to prepare a store in; ``publish`` makes it one, at once and as a whole."""
        path = self._stores / f".new-{random_token(10)}"
        path.mkdir(mode=0o700)
        return path

    def publish(self, draft: Path, store: str) -> Path:
        try:
            draft.rename(self.of(store))
        except OSError as error:
            raise EngineFailed(f"store {store!r} cannot be made in {self._stores}: {error.strerror}") from error
        return self.of(store)

    def remove(self, store: str) -> None:
        """A store is gone at once; its bytes go after it."""
        gone = self._stores / f".gone-{random_token(10)}"
        self.of(store).rename(gone)
        shutil.rmtree(gone, ignore_errors=True)

    def _sweep(self) -> None:
        """What was being made or removed when a process was killed."""
        for path in self._stores.glob(".*"):
            shutil.rmtree(path, ignore_errors=True)


def size_of(folder: Path) -> int:
    """Bytes of all files."""
    total = 0
    for root, _, files in os.walk(folder):
        for name in files:
            try:
                total += os.stat(os.path.join(root, name)).st_size
            except FileNotFoundError:
                continue  # merged away meanwhile
    return total
