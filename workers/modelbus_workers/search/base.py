"""The port of a store engine: where chunks are kept and ranked, by text and by vector.

An engine keeps and ranks; what its rankings mean together (fusion, coverage, highlights) is decided in ``service``, so
that every engine answers alike. What comes here has passed ``checks``. All methods may be called at the same time.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import ClassVar

import msgspec
from modelbus_broker.messages.search import Chunk, Filter, Sort, StoreRecord, StoreStatus

from .fusion import Scored


class Ranking(msgspec.Struct, frozen=True, kw_only=True):
    """What to rank. By neither terms nor vector nothing is ranked."""

    terms: list[str] = []  #: the query's different terms
    vector: bytes = b""  #: float32, little endian
    filter: Filter | None = None
    window: int = 50


class Rankings(msgspec.Struct, frozen=True, kw_only=True):
    """The best first, at most ``window`` each, ids as keys."""

    text: list[Scored] = []  #: BM25, k1 1.2, b 0.75
    vector: list[Scored] = []  #: cosine
    best: Chunk | None = None  #: the first by text, where the engine has it at hand


class StoreEngine(ABC):
    """The port. What it raises: ``NotFound`` for a store that is not there, ``Conflict`` for one that is, ``EngineFailed``
    (or what the service behind it says) where it cannot do what it should; then nothing has been acknowledged."""

    name: ClassVar[str]

    @abstractmethod
    async def start(self) -> None:
        """Opens what is there. Raises with words that help when it cannot."""

    @abstractmethod
    async def create(self, record: StoreRecord) -> None:
        """Makes an empty store."""

    @abstractmethod
    async def records(self) -> dict[str, StoreRecord]:
        """All stores by name."""

    def damaged(self) -> Mapping[str, str]:
        """Stores that cannot be opened, by their names as far as they are known, and what is wrong with them."""
        return {}

    @abstractmethod
    async def record(self, store: str) -> StoreRecord:
        """What a store is."""

    @abstractmethod
    async def update(self, record: StoreRecord) -> None:
        """Writes a store's record over the one that is there."""

    @abstractmethod
    async def status(self, store: str) -> StoreStatus:
        """A store's record and what is in it."""

    @abstractmethod
    async def drop(self, store: str) -> int:
        """Deletes a store and all that is in it. Returns how many chunks that were."""

    @abstractmethod
    async def upsert(self, store: str, chunks: Sequence[Chunk], *, searchable: bool = True) -> int:
        """Writes chunks over those with the same ids. When it returns they are on disk, and with ``searchable`` found.

        When it raises none is written, or some of them where the engine has no transactions: then writing them again is
        harmless.
        """

    @abstractmethod
    async def delete(
        self, store: str, *, ids: Sequence[str] = (), file_ids: Sequence[str] = (), filter: Filter | None = None,
        everything: bool = False,
    ) -> int:  # fmt: skip
        """Deletes the chunks that any of the conditions names. Returns how many there were."""

    @abstractmethod
    async def rank(self, store: str, ranking: Ranking) -> Rankings:
        """The best chunks by text and by vector."""

    @abstractmethod
    async def fetch(self, store: str, ids: Sequence[str], *, vectors: bool = False) -> Mapping[str, Chunk]:
        """Chunks by their ids; those that are not there are left out."""

    @abstractmethod
    async def listing(
        self, store: str, *, filter: Filter | None, sort: Sequence[Sort], limit: int, offset: int = 0
    ) -> list[Chunk]:
        """Chunks without their vectors, in the order of ``sort``, then of their ids (as UTF-8 bytes)."""

    @abstractmethod
    async def page(self, store: str, *, after: str, limit: int, vectors: bool) -> list[Chunk]:
        """Chunks in the order of their ids (as UTF-8 bytes), from the one after ``after``."""

    async def close(self) -> None:  # noqa: B027  # not every engine holds something
        """Lets go of everything."""
