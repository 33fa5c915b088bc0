"""All vectors of a store in memory, searched exactly: one product of a matrix with the query.

Rows are only appended, and marked when they are gone, so that a search needs no lock: it looks at the rows that were there
when it began. When a quarter of them is gone they are packed into new arrays.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

_FIRST_ROWS = 1024


class _Rows(msgspec.Struct, frozen=True):
    """What a search sees: the first ``count`` rows of arrays that may have room for more."""

    matrix: NDArray[np.float32]  #: unit vectors
    rids: NDArray[np.int64]  #: ascending
    alive: NDArray[np.bool_]
    count: int


class VectorMatrix:
    """Cosines of a query with all vectors. One writer at a time, any number of searches."""

    def __init__(self, dimensions: int, rows: int = 0) -> None:
        self.dimensions = dimensions
        self._rows = self._with_room(max(rows, _FIRST_ROWS))
        self._gone = 0

    def __len__(self) -> int:
        return self._rows.count - self._gone

    @property
    def nbytes(self) -> int:
        return self._rows.matrix.nbytes

    def add(self, pairs: Sequence[tuple[int, bytes]]) -> None:
        """Vectors (float32, little endian) with rids above all that are there."""
        rows = self._rows
        need = rows.count + len(pairs)
        if need > len(rows.rids):
            rows = self._packed(max(need, 2 * (rows.count - self._gone)))
            need = rows.count + len(pairs)
        added = np.frombuffer(b"".join(vector for _, vector in pairs), dtype="<f4").reshape(len(pairs), self.dimensions)
        norms = np.sqrt(np.einsum("ij,ij->i", added, added, dtype=np.float64))[:, None]
        rows.matrix[rows.count : need] = added / norms
        rows.rids[rows.count : need] = [rid for rid, _ in pairs]
        rows.alive[rows.count : need] = True
        self._rows = _Rows(rows.matrix, rows.rids, rows.alive, need)

    def remove(self, rids: Iterable[int]) -> None:
        """Those that have no vector here are left out."""
        rows = self._rows
        found = self._find(rows, np.fromiter(rids, dtype=np.int64))
        found = found[rows.alive[found]]
        rows.alive[found] = False
        self._gone += len(found)
        if self._gone > max(_FIRST_ROWS, rows.count // 4):
            self._rows = self._packed(2 * (rows.count - self._gone))

    def search(self, query: bytes, limit: int, among: Sequence[int] | None = None) -> list[tuple[int, float]]:
        """rid and cosine of the nearest, the nearest first.

        Args:
            among: only these rids.
        """
        rows = self._rows
        asked = np.frombuffer(query, dtype="<f4").astype(np.float64)
        unit = (asked / np.linalg.norm(asked)).astype(np.float32)
        if among is None:
            at = None
            scores = rows.matrix[: rows.count] @ unit
            alive = rows.alive[: rows.count]
        else:
            at = self._find(rows, np.asarray(among, dtype=np.int64))
            scores = rows.matrix[at] @ unit
            alive = rows.alive[at]
        if self._gone:
            scores = np.where(alive, scores, np.float32(-np.inf))
        best: NDArray[Any]
        if len(scores) > limit:
            best = np.argpartition(scores, len(scores) - limit)[-limit:]
        else:
            best = np.arange(len(scores))
        best = best[np.argsort(-scores[best], kind="stable")]
        rids = rows.rids[: rows.count] if at is None else rows.rids[at]
        return [(int(rids[i]), float(scores[i])) for i in best if scores[i] > -np.inf]

    @staticmethod
    def _find(rows: _Rows, rids: NDArray[np.int64]) -> NDArray[np.int64]:
        """The rows of these rids, without those that are not there."""
        known = rows.rids[: rows.count]
        at = np.searchsorted(known, rids)
        inside = at < rows.count
        at, rids = at[inside], rids[inside]
        found: NDArray[np.int64] = at[known[at] == rids]
        return found

    def _packed(self, rows: int) -> _Rows:
        """What is alive, in new arrays with room for so many."""
        old = self._rows
        keep = np.flatnonzero(old.alive[: old.count])
        new = self._with_room(max(rows, len(keep), _FIRST_ROWS))
        new.matrix[: len(keep)] = old.matrix[keep]
        new.rids[: len(keep)] = old.rids[keep]
        new.alive[: len(keep)] = True
        self._gone = 0
        self._rows = _Rows(new.matrix, new.rids, new.alive, len(keep))
        return self._rows

    def _with_room(self, rows: int) -> _Rows:
        return _Rows(
            np.empty((rows, self.dimensions), dtype=np.float32), np.empty(rows, dtype=np.int64),
            np.zeros(rows, dtype=np.bool_), 0,
        )  # fmt: skip
