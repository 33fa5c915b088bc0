"""Answers that were given before: kept in memory, or in a file as well, for prompt functions that ask for it.

The key is made of the version of the prompt function, the rendered messages, the model and the revisions of its
deployments, the sampling and all else that the answer depends on. What is kept is what the model wrote; it is read and
validated again, so nothing is unpickled.
"""

from __future__ import annotations

import hashlib
import sqlite3
import threading
import time
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
from modelbus_broker.messages import FinishReason, Rung, Usage

_ENTRIES = 10_000


class CachedAnswer(msgspec.Struct, frozen=True, kw_only=True):
    """What is kept of an answer."""

    raw: str
    usage: Usage = Usage()
    model: str = ""
    rung: Rung = "text"
    attempts: int = 1
    request_id: str = ""
    finish_reason: FinishReason = "stop"


class Cache:
    """Keeps answers. One may serve any number of prompt functions, threads and, with a file, programs.

    Args:
        path: an SQLite file, made when it is not there; None: memory alone.
        entries: the answers that were used longest ago go when there are more.
        kept_s: answers older than this are not used; 0: they do not grow old.
    """

    def __init__(self, path: str | Path | None = None, *, entries: int = _ENTRIES, kept_s: float = 0.0) -> None:
        self._entries, self._kept_s = entries, kept_s
        self._lock = threading.Lock()
        self._memory: OrderedDict[str, tuple[float, bytes]] = OrderedDict()
        self._file: sqlite3.Connection | None = None
        self.hits = self.misses = 0
        if path is not None:
            self._file = sqlite3.connect(path, check_same_thread=False, isolation_level=None)
            self._file.execute("PRAGMA journal_mode=WAL")
            self._file.execute(
                "CREATE TABLE IF NOT EXISTS answers (key TEXT PRIMARY KEY, made REAL NOT NULL, used REAL NOT NULL, "
                "answer BLOB NOT NULL)"
            )

    def get(self, key: str) -> CachedAnswer | None:
        """The answer under a key, if there is one that is not too old."""
        with self._lock:
            found = self._memory.get(key) or self._read(key)
            if found is None or (self._kept_s and time.time() - found[0] > self._kept_s):
                self.misses += 1
                return None
            self.hits += 1
            self._remember(key, found)
        return msgspec.json.decode(found[1], type=CachedAnswer)

    def put(self, key: str, answer: CachedAnswer) -> None:
        """Keeps an answer under a key."""
        found = time.time(), msgspec.json.encode(answer)
        with self._lock:
            self._remember(key, found)
            if self._file is not None:
                self._file.execute("INSERT OR REPLACE INTO answers VALUES (?, ?, ?, ?)", (key, found[0], *found))
                self._file.execute(
                    "DELETE FROM answers WHERE key IN (SELECT key FROM answers ORDER BY used DESC LIMIT -1 OFFSET ?)",
                    (self._entries,),
                )

    def clear(self) -> None:
        """Forgets everything."""
        with self._lock:
            self._memory.clear()
            if self._file is not None:
                self._file.execute("DELETE FROM answers")

    def close(self) -> None:
        """Closes the file; the cache goes on in memory."""
        with self._lock:
            if self._file is not None:
                self._file.close()
                self._file = None

    def _remember(self, key: str, found: tuple[float, bytes]) -> None:
        self._memory[key] = found
        self._memory.move_to_end(key)
        while len(self._memory) > self._entries:
            self._memory.popitem(last=False)

    def _read(self, key: str) -> tuple[float, bytes] | None:
        if self._file is None:
            return None
        row: tuple[float, bytes] | None = self._file.execute(
            "SELECT made, answer FROM answers WHERE key = ?", (key,)
        ).fetchone()
        if row is not None:
            self._file.execute("UPDATE answers SET used = ? WHERE key = ?", (time.time(), key))
        return row


def cache_key(parts: Mapping[str, Any]) -> str:
    """The key of all that an answer depends on; of what JSON cannot hold, the repr counts."""
    return hashlib.sha256(msgspec.json.encode(parts, enc_hook=repr, order="sorted")).hexdigest()


def is_deterministic(sampling: Mapping[str, Any]) -> bool:
    """Whether the same question gives the same answer: at temperature 0, or with a seed. Unsaid, a model has its own."""
    temperature = sampling.get("temperature")
    return sampling.get("seed") is not None or (temperature is not None and float(temperature) == 0.0)
