"""What is asked of a search service, and what it answers: stores, chunks, filters, hits.

A search service is a worker like any other: its task is ``Storage`` with one operation inside, and its answer is one
encoded reply. Filters have the shape of OpenAI's vector stores, with ``not`` added.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from .base import Message

#: The engine of the deployments that are search services.
SEARCH_ENGINE = "search"

#: An attribute of a chunk.
Value = str | bool | int | float
ValueKind = Literal["string", "number", "boolean"]
Mode = Literal["hybrid", "text", "vector"]


class Filter(Message, frozen=True, kw_only=True):
    """A condition on chunks: a comparison (``key``, ``value``) or a combination of ``filters``.

    ``key`` is an attribute, or ``$id``, ``$file_id`` or ``$ordinal``. A chunk without the attribute satisfies ``ne``,
    ``nin`` and ``not``, and no other comparison; neither does one whose value is of another kind.
    """

    type: Literal["eq", "ne", "gt", "gte", "lt", "lte", "in", "nin", "and", "or", "not"]
    key: str = ""
    value: Value | list[Value] | None = None
    filters: list[Filter] = []  #: of ``and`` and ``or``; the one of ``not``


class Sort(Message, frozen=True, kw_only=True):
    """An order by an attribute or a ``$`` key. Chunks without it come last."""

    key: str
    descending: bool = False


class Fusion(Message, frozen=True, kw_only=True):
    """How the ranking by text and the ranking by vector become one."""

    #: ``minmax``: scores of each list scaled to 0..1; ``rrf``: 1 / (constant + rank), Cormack et al. 2009.
    kind: Literal["minmax", "rrf"] = "minmax"
    text_weight: float = 0.5
    vector_weight: float = 0.5
    cover: bool = True  #: the text list counts as much as its best hit covers of the query; only for ``minmax``
    constant: float = 60.0  #: of ``rrf``
    window: int = 50  #: best hits taken from each list


class Chunk(Message, frozen=True, kw_only=True):
    """A piece of text that is found as a whole. ``id`` is its key in the store: writing it again replaces it."""

    id: str
    text: str = ""
    vector: bytes = b""  #: float32, little endian; b"": it has none
    file_id: str = ""  #: of the file that it is a part of
    ordinal: int = 0  #: among the chunks of its file
    title: str = ""  #: headings above it; searched with the text
    start: int = 0  #: of the text in its file, characters
    end: int = 0
    attributes: dict[str, Value] = {}


class StoreRecord(Message, frozen=True, kw_only=True):
    """What a store is. Stands in the store itself."""

    name: str
    id: str = ""  #: given by the service
    embedding_model: str = ""  #: that made its vectors; "": whoever writes brings them
    dimensions: int = 0  #: of its vectors; 0: none has come yet
    query_prefix: str = ""  #: before a text that is embedded to search for it, such as "query: "
    passage_prefix: str = ""  #: before a text that is embedded to be found, such as "passage: "
    schema: dict[str, ValueKind] = {}  #: attributes that chunks may have; {}: any
    metadata: dict[str, str] = {}
    fusion: Fusion = Fusion()  #: where a search says nothing
    created_ms: int = 0  #: Unix time
    tokenizer: int = 0  #: version of the tokenizer that its text index is made with


class StoreStatus(Message, frozen=True, kw_only=True, tag="store"):
    """A store, and what is in it."""

    record: StoreRecord
    engine: str = ""  #: of the service: embedded, elasticsearch
    chunks: int = 0
    vectors: int = 0
    files: int = 0
    bytes: int = 0  #: on disk


class CreateStore(Message, frozen=True, kw_only=True, tag="create"):
    """Answered with a ``StoreStatus``. One that is there is taken as it is, if it was made for the same model."""

    record: StoreRecord
    must_be_new: bool = False


class GetStore(Message, frozen=True, kw_only=True, tag="get"):
    """Answered with a ``StoreStatus``."""

    store: str


class ListStores(Message, frozen=True, kw_only=True, tag="list"):
    """Answered with ``Stores``."""


class UpdateStore(Message, frozen=True, kw_only=True, tag="update"):
    """Answered with a ``StoreStatus``. ``None`` leaves a field as it is."""

    store: str
    metadata: dict[str, str] | None = None
    fusion: Fusion | None = None
    schema: dict[str, ValueKind] | None = None


class DropStore(Message, frozen=True, kw_only=True, tag="drop"):
    """Answered with ``Written``: the chunks that are gone with it."""

    store: str


class Upsert(Message, frozen=True, kw_only=True, tag="upsert"):
    """Answered with ``Written`` when all chunks are on disk. Sent again it changes nothing."""

    store: str
    chunks: list[Chunk]
    embedding_model: str = ""  #: that made the vectors; must be the store's
    #: Answered only when searches find the chunks. Without it they do within a second or so: for all but the last of many.
    searchable: bool = True


class Delete(Message, frozen=True, kw_only=True, tag="delete"):
    """Answered with ``Written``. Chunks that any of the fields names."""

    store: str
    ids: list[str] = []
    file_ids: list[str] = []
    filter: Filter | None = None
    everything: bool = False


class Search(Message, frozen=True, kw_only=True, tag="search"):
    """Answered with ``Found``. By text, by vector, by both; by neither it lists what the filter lets through."""

    stores: list[str]
    text: str = ""
    vector: bytes = b""  #: float32, little endian
    embedding_model: str = ""  #: that made the vector
    filter: Filter | None = None
    limit: int = 10
    offset: int = 0  #: of a listing
    sort: list[Sort] = []  #: of a listing: its order; else the order in which the hits are given
    fusion: Fusion | None = None  #: None: the first store's
    score_threshold: float | None = None  #: hits with less are left out
    highlights: bool = True
    vectors: bool = False  #: the hits' vectors come too


class ReadChunks(Message, frozen=True, kw_only=True, tag="read"):
    """Answered with ``Chunks``: those with these ids; without ids a page of all, in the order of their ids."""

    store: str
    ids: list[str] = []
    after: str = ""  #: the last id of the page before
    limit: int = 200
    vectors: bool = True


Operation = CreateStore | GetStore | ListStores | UpdateStore | DropStore | Upsert | Delete | Search | ReadChunks


class Span(Message, frozen=True, kw_only=True, omit_defaults=False):
    """Characters of a chunk's text, from ``start`` up to ``end``."""

    start: int
    end: int


class ScoreParts(Message, frozen=True, kw_only=True):
    """Where a score comes from. None: not found that way, or not looked for."""

    text: float | None = None  #: BM25
    vector: float | None = None  #: cosine
    rerank: float | None = None
    text_rank: int | None = None  #: from 1
    vector_rank: int | None = None


class Hit(Message, frozen=True, kw_only=True):
    """A chunk that was found."""

    store: str
    chunk: Chunk
    score: float = 0.0
    scores: ScoreParts = ScoreParts()
    highlights: list[Span] = []  #: words of the query
    passage: Span | None = None  #: the part of the text where they are densest


class Found(Message, frozen=True, kw_only=True, tag="found"):
    """Hits, the best first."""

    hits: list[Hit] = []
    cover: float = 0.0  #: share of the query's terms in the best hit by text


class Chunks(Message, frozen=True, kw_only=True, tag="chunks"):
    chunks: list[Chunk] = []


class Stores(Message, frozen=True, kw_only=True, tag="stores"):
    stores: list[StoreStatus] = []


class Written(Message, frozen=True, kw_only=True, tag="written"):
    """It is on disk."""

    chunks: int = 0  #: written, or deleted


Reply = StoreStatus | Stores | Written | Found | Chunks

_reply_decoder: msgspec.msgpack.Decoder[Reply] = msgspec.msgpack.Decoder(Reply)
decode_reply = _reply_decoder.decode
