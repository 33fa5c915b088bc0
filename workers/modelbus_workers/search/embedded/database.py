"""A store's chunks in SQLite: the truth. What the text index has not taken yet is in its table ``pending``."""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import msgspec
from modelbus_broker.errors import ConfigurationError, EngineFailed
from modelbus_broker.messages import encode
from modelbus_broker.messages.search import Chunk, Filter, Sort, StoreRecord, Value

from ..checks import kind_of
from . import sql

#: Changes when tables change in a way that older code cannot read.
LAYOUT = 1

Durability = Literal["full", "normal"]

_TABLES = """
CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE chunks (
    rid INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT NOT NULL UNIQUE, file_id TEXT NOT NULL, ordinal INTEGER NOT NULL,
    attributes TEXT NOT NULL, start INTEGER NOT NULL, "end" INTEGER NOT NULL, title TEXT NOT NULL, text TEXT NOT NULL
);
CREATE INDEX chunks_by_file ON chunks (file_id, ordinal) WHERE file_id != '';
CREATE TABLE attributes (
    name TEXT NOT NULL, kind TEXT NOT NULL, value NOT NULL, rid INTEGER NOT NULL, PRIMARY KEY (name, kind, value, rid)
) WITHOUT ROWID;
CREATE INDEX attributes_by_chunk ON attributes (rid);
CREATE TABLE vectors (rid INTEGER PRIMARY KEY, vector BLOB NOT NULL);
CREATE TABLE pending (seq INTEGER PRIMARY KEY AUTOINCREMENT, rid INTEGER NOT NULL, added INTEGER NOT NULL);
"""
_COLUMNS = 'id, file_id, ordinal, attributes, start, "end", title, text'

#: Filters that are remembered with what they let through.
_MATCHED = 8
_attributes = msgspec.json.Decoder(dict[str, Value])


class Change(msgspec.Struct, frozen=True, kw_only=True):
    """What a write has done, for those who keep something beside the database."""

    removed: list[int] = []  #: rids
    added: list[tuple[int, Chunk]] = []  #: with their rids


class Pending(msgspec.Struct, frozen=True, kw_only=True):
    """Something that the text index has to take: a chunk's text, or that it is gone (``text`` is None)."""

    seq: int
    rid: int
    text: str | None


class Database:
    """One file, one writer at a time, a connection for each thread."""

    def __init__(self, path: Path, durability: Durability) -> None:
        self.path = path
        self._durability = durability
        self._here = threading.local()
        self._all: list[sqlite3.Connection] = []
        self._writing = threading.Lock()
        self._written = 0  #: transactions that have ended
        self._matched: dict[bytes, tuple[int, list[int]]] = {}  #: filter -> ``_written`` before it was looked for, rids
        self._closed = False

    @classmethod
    def make(cls, path: Path, record: StoreRecord, durability: Durability) -> None:
        """A new file with no chunk in it."""
        database = cls(path, durability)
        try:
            with database.writing() as connection:
                for statement in _TABLES.strip().split(";\n"):
                    connection.execute(statement)
                rows = [("layout", str(LAYOUT)), ("record", msgspec.json.encode(record).decode())]
                connection.executemany("INSERT INTO meta VALUES (?, ?)", rows)
        finally:
            database.close()

    def check(self) -> None:
        """Raises: ConfigurationError: it is of a newer modelbus. EngineFailed: it is no store, or damaged."""
        layout = self.meta("layout")
        if layout != str(LAYOUT):
            raise ConfigurationError(
                f"{self.path} has layout {layout or 'unknown'}, this modelbus reads {LAYOUT}: use the version that wrote it"
            )

    def close(self) -> None:
        self._closed = True
        for connection in self._all:
            connection.close()
        self._all.clear()

    # What it says of itself

    @property
    def record(self) -> StoreRecord:
        return msgspec.json.decode(self.meta("record"), type=StoreRecord)

    def meta(self, key: str) -> str:
        """ "" where nothing was said."""
        row = self._read("SELECT value FROM meta WHERE key = ?", [key]).fetchone()
        return str(row[0]) if row else ""

    def set_meta(self, key: str, value: str) -> None:
        with self.writing() as connection:
            connection.execute("INSERT OR REPLACE INTO meta VALUES (?, ?)", (key, value))

    def counts(self) -> tuple[int, int, int]:
        """Chunks, vectors, files."""
        return self._read(  # type: ignore[no-any-return]
            "SELECT (SELECT count(*) FROM chunks), (SELECT count(*) FROM vectors), "
            "(SELECT count(DISTINCT file_id) FROM chunks WHERE file_id != '')"
        ).fetchone()

    # Writing

    def upsert(self, chunks: Sequence[Chunk], record: StoreRecord | None = None) -> Change:
        """One transaction; with the store's record, where that changes with it."""
        with self.writing() as connection:
            if record is not None:
                connection.execute(
                    "UPDATE meta SET value = ? WHERE key = 'record'", (msgspec.json.encode(record).decode(),)
                )
            removed = self._remove(
                connection, "id IN (SELECT value FROM json_each(?))", [_json([chunk.id for chunk in chunks])]
            )
            last = connection.execute("SELECT seq FROM sqlite_sequence WHERE name = 'chunks'").fetchone()
            first = (last[0] if last else 0) + 1
            connection.executemany(
                f"INSERT INTO chunks (rid, {_COLUMNS}) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
                (
                    (
                        rid, chunk.id, chunk.file_id, chunk.ordinal, _json(chunk.attributes), chunk.start, chunk.end,
                        chunk.title, chunk.text,
                    )
                    for rid, chunk in enumerate(chunks, first)
                ),
            )  # fmt: skip
            connection.executemany(
                "INSERT INTO attributes VALUES (?, ?, ?, ?)",
                [
                    (name, kind_of(value), value, rid)
                    for rid, chunk in enumerate(chunks, first)
                    for name, value in chunk.attributes.items()
                ],
            )
            added = list(enumerate(chunks, first))
            vectors = [(rid, chunk.vector) for rid, chunk in added if chunk.vector]
            connection.executemany("INSERT INTO vectors VALUES (?, ?)", vectors)
            connection.executemany("INSERT INTO pending (rid, added) VALUES (?, 1)", [(rid,) for rid, _ in added])
            return Change(removed=removed, added=added)

    def delete(
        self, *, ids: Sequence[str], file_ids: Sequence[str], condition: Filter | None, everything: bool
    ) -> Change:
        """One transaction."""
        parts: list[sql.Sql] = []
        if ids:
            parts.append(("id IN (SELECT value FROM json_each(?))", [_json(list(ids))]))
        if file_ids:
            parts.append(("file_id != '' AND file_id IN (SELECT value FROM json_each(?))", [_json(list(file_ids))]))
        if condition is not None:
            parts.append(sql.where(condition))
        if everything:
            parts.append(("1", []))
        if not parts:
            return Change()
        text = " OR ".join(f"({part})" for part, _ in parts)
        with self.writing() as connection:
            return Change(removed=self._remove(connection, text, [value for _, values in parts for value in values]))

    @staticmethod
    def _remove(connection: sqlite3.Connection, condition: str, values: list[Any]) -> list[int]:
        rids = [row[0] for row in connection.execute(f"SELECT rid FROM chunks WHERE {condition}", values)]
        if rids:
            rows = [(rid,) for rid in rids]
            connection.executemany("DELETE FROM chunks WHERE rid = ?", rows)
            connection.executemany("DELETE FROM attributes WHERE rid = ?", rows)
            connection.executemany("DELETE FROM vectors WHERE rid = ?", rows)
            connection.executemany("INSERT INTO pending (rid, added) VALUES (?, 0)", rows)
        return rids

    # What the text index has to take

    def pending(self, limit: int) -> list[Pending]:
        """The oldest first. A chunk that was added and is gone again is only gone."""
        rows = self._read(
            "SELECT seq, pending.rid, title, text FROM pending LEFT JOIN chunks ON added AND chunks.rid = pending.rid "
            "ORDER BY seq LIMIT ?",
            [limit],
        )
        return [
            Pending(seq=seq, rid=rid, text=None if text is None else f"{title}\n{text}" if title else text)
            for seq, rid, title, text in rows
        ]

    def taken(self, seq: int) -> None:
        """The text index has everything up to here, on disk."""
        with self.writing() as connection:
            connection.execute("DELETE FROM pending WHERE seq <= ?", (seq,))

    def all_pending(self, key: str, value: str) -> None:
        """The text index is made anew: it has nothing. Notes something about the new one in the same transaction."""
        with self.writing() as connection:
            connection.execute("DELETE FROM pending")
            connection.execute("INSERT INTO pending (rid, added) SELECT rid, 1 FROM chunks ORDER BY rid")
            connection.execute("INSERT OR REPLACE INTO meta VALUES (?, ?)", (key, value))

    # Reading

    def vectors(self, at_once: int = 4096) -> Iterator[list[tuple[int, bytes]]]:
        """All rids and vectors in the order of their rids, in parts."""
        rows = self._read("SELECT rid, vector FROM vectors ORDER BY rid")
        while part := rows.fetchmany(at_once):
            yield part

    def matching(self, condition: Filter) -> list[int]:
        """The rids that satisfy a filter, in their order. Those of filters that were asked for lately are remembered until
        something is written: looking for them takes longer than a search among them."""
        key, written = encode(condition), self._written
        known = self._matched.get(key)
        if known is not None and known[0] == written:
            return known[1]
        text, values = sql.where(condition)
        found = [row[0] for row in self._read(f"SELECT rid FROM chunks WHERE {text} ORDER BY rid", values)]
        self._matched[key] = written, found  # of before the next write, even if that has ended by now
        for oldest in list(self._matched)[:-_MATCHED]:
            self._matched.pop(oldest, None)
        return found

    def ids(self) -> dict[int, str]:
        """rid -> id of all chunks, out of the index on ids: texts are not read for it."""
        return dict(self._read("SELECT rid, id FROM chunks INDEXED BY sqlite_autoindex_chunks_1").fetchall())

    def fetch(self, ids: Sequence[str], *, vectors: bool) -> dict[str, Chunk]:
        query = _select(vectors) + "WHERE id IN (SELECT value FROM json_each(?))"
        return {row[0]: _chunk(row) for row in self._read(query, [_json(list(ids))])}

    def listing(self, condition: Filter | None, sort: Sequence[Sort], limit: int, offset: int) -> list[Chunk]:
        text, values = sql.where(condition) if condition is not None else ("1", [])
        order, more = sql.order_by(sort)
        query = f"{_select(False)} WHERE {text} ORDER BY {order} LIMIT ? OFFSET ?"
        return [_chunk(row) for row in self._read(query, [*values, *more, limit, offset])]

    def page(self, after: str, limit: int, *, vectors: bool) -> list[Chunk]:
        query = f"{_select(vectors)} WHERE id > ? ORDER BY id LIMIT ?"
        return [_chunk(row) for row in self._read(query, [after, limit])]

    # Connections

    @contextmanager
    def writing(self) -> Iterator[sqlite3.Connection]:
        """A transaction: all of it is on disk when the block has ended, or nothing is.

        Raises:
            EngineFailed: the disk is full, or the file cannot be written.
        """
        with self._writing:
            try:
                connection = self._connection()
                with connection:
                    connection.execute("BEGIN IMMEDIATE")
                    yield connection
                self._written += 1
            except sqlite3.Error as error:
                raise self._failure(error, "nothing of this was stored") from error

    def _read(self, query: str, values: Sequence[Any] = ()) -> sqlite3.Cursor:
        try:
            return self._connection().execute(query, values)
        except sqlite3.Error as error:
            raise self._failure(error, "it cannot be read") from error

    def _failure(self, error: sqlite3.Error, outcome: str) -> EngineFailed:
        words = str(error)
        if "full" in words:
            words = "the disk is full: free some space there"
        elif "malformed" in words or "not a database" in words:
            words = (
                f"{words}: drop the store (`modelbus storage drop`), then restore it from an export or build it anew"
            )
        return EngineFailed(f"{self.path}: {words}; {outcome}")

    def _connection(self) -> sqlite3.Connection:
        found: sqlite3.Connection | None = getattr(self._here, "connection", None)
        if found is not None:
            return found
        if self._closed:
            raise EngineFailed(f"{self.path} is closed")
        connection = sqlite3.connect(self.path, timeout=30.0, isolation_level=None, check_same_thread=False)
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute(f"PRAGMA synchronous = {self._durability.upper()}")
        self._here.connection = connection
        self._all.append(connection)
        return connection


def _select(vectors: bool) -> str:
    if vectors:
        return f"SELECT {_COLUMNS}, vector FROM chunks LEFT JOIN vectors USING (rid) "
    return f"SELECT {_COLUMNS} FROM chunks "


def _chunk(row: tuple[Any, ...]) -> Chunk:
    id_, file_id, ordinal, attributes, start, end, title, text, *vector = row
    return Chunk(
        id=id_, file_id=file_id, ordinal=ordinal, attributes=_attributes.decode(attributes), start=start, end=end,
        title=title, text=text, vector=vector[0] or b"" if vector else b"",
    )  # fmt: skip


def _json(value: Any) -> str:
    return msgspec.json.encode(value).decode()
