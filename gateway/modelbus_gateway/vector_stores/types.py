"""What clients of ``/v1/vector_stores`` send and get, in the shapes of the OpenAI API, and what is checked of it. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Literal, TypeVar

import msgspec
from modelbus_broker.attributes import name_problem, value_problem
from modelbus_broker.errors import InvalidRequest
from modelbus_broker.messages.files import (
    FileBatchRecord,
    StaticChunking,
    VectorStoreFileRecord,
    VectorStoreRecord,
)
from modelbus_broker.messages.search import Filter, Mode, Value
from msgspec import UNSET, UnsetType

from ..bodies import Body
from ..checks import decimal, integer, pairs
from .chunks import OURS
from .records import expires_ms, has_expired

V = TypeVar("V", bound=Value)

MAX_BATCH = 2000  #: files
_MAX_DAYS = 365

Attributes = dict[str, str | bool | int | float]


class ExpiresAfter(msgspec.Struct, frozen=True, kw_only=True):
    anchor: Literal["last_active_at"]
    days: int


class StaticStrategy(msgspec.Struct, frozen=True, kw_only=True):
    max_chunk_size_tokens: int
    chunk_overlap_tokens: int


class ChunkingStrategy(msgspec.Struct, frozen=True, kw_only=True):
    type: Literal["auto", "static"]
    static: StaticStrategy | None = None


class CreateRequest(msgspec.Struct, frozen=True, kw_only=True):
    """POST /v1/vector_stores"""

    name: str | None = None
    description: str | None = None
    file_ids: list[str] | None = None
    chunking_strategy: ChunkingStrategy | None = None
    expires_after: ExpiresAfter | None = None
    metadata: dict[str, str] | None = None
    embedding_model: str | None = None  #: of this gateway: on the bus; "": none; without it the gateway's default
    query_prefix: str = ""  #: of this gateway: before texts that are embedded, as e5 models want it
    passage_prefix: str = ""


class UpdateRequest(msgspec.Struct, frozen=True, kw_only=True):
    """POST /v1/vector_stores/{id}"""

    name: str | None = None
    expires_after: ExpiresAfter | None | UnsetType = UNSET
    metadata: dict[str, str] | None | UnsetType = UNSET


class AttachRequest(msgspec.Struct, frozen=True, kw_only=True):
    """POST /v1/vector_stores/{id}/files, and one of a batch's ``files``"""

    file_id: str
    attributes: Attributes | None = None
    chunking_strategy: ChunkingStrategy | None = None


class UpdateFileRequest(msgspec.Struct, frozen=True, kw_only=True):
    """POST /v1/vector_stores/{id}/files/{file_id}"""

    attributes: Attributes | None


class BatchRequest(msgspec.Struct, frozen=True, kw_only=True):
    """POST /v1/vector_stores/{id}/file_batches"""

    file_ids: list[str] | None = None
    files: list[AttachRequest] | None = None
    attributes: Attributes | None = None
    chunking_strategy: ChunkingStrategy | None = None


class HybridSearch(msgspec.Struct, frozen=True, kw_only=True):
    embedding_weight: float
    text_weight: float


class RankingOptions(msgspec.Struct, frozen=True, kw_only=True):
    ranker: Literal["none", "auto", "default-2024-11-15"] | None = None
    score_threshold: float | None = None
    hybrid_search: HybridSearch | None = None


class SearchRequest(msgspec.Struct, frozen=True, kw_only=True):
    """POST /v1/vector_stores/{id}/search"""

    query: str | list[str]
    filters: Filter | None = None
    max_num_results: int | None = None
    ranking_options: RankingOptions | None = None
    rewrite_query: bool | None = None
    mode: Mode | None = None  #: of this gateway, as the rest
    rerank: str | None = None  #: a rerank model
    rewrite_model: str | None = None  #: a chat model; without it the gateway's


class ChunkBody(msgspec.Struct, frozen=True, kw_only=True):
    text: str = ""
    id: str = ""
    vector: list[float] | None = None
    file_id: str = ""
    ordinal: int = 0
    heading: str = ""
    attributes: Attributes | None = None


class UpsertRequest(msgspec.Struct, frozen=True, kw_only=True):
    """POST /v1/vector_stores/{id}/chunks"""

    chunks: list[ChunkBody]


class DeleteChunksRequest(msgspec.Struct, frozen=True, kw_only=True):
    """POST /v1/vector_stores/{id}/chunks/delete"""

    ids: list[str] = []
    filters: Filter | None = None


CREATE_BODY, UPDATE_BODY, SEARCH_BODY = Body(CreateRequest), Body(UpdateRequest), Body(SearchRequest)
ATTACH_BODY, UPDATE_FILE_BODY, BATCH_BODY = Body(AttachRequest), Body(UpdateFileRequest), Body(BatchRequest)
UPSERT_BODY, DELETE_CHUNKS_BODY = Body(UpsertRequest), Body(DeleteChunksRequest)


class FileCounts(msgspec.Struct, frozen=True, kw_only=True):
    in_progress: int = 0
    completed: int = 0
    failed: int = 0
    cancelled: int = 0
    total: int = 0


class VectorStoreObject(msgspec.Struct, frozen=True, kw_only=True):
    id: str
    object: str = "vector_store"
    created_at: int
    name: str
    description: str | None
    usage_bytes: int
    file_counts: FileCounts
    status: Literal["in_progress", "completed", "expired"]
    expires_after: ExpiresAfter | None
    expires_at: int | None
    last_active_at: int
    metadata: dict[str, str]
    embedding_model: str | None


class LastError(msgspec.Struct, frozen=True, kw_only=True):
    code: str
    message: str


class ShownStrategy(msgspec.Struct, frozen=True, kw_only=True):
    type: Literal["static", "other"]
    static: StaticStrategy | UnsetType = UNSET


class VectorStoreFileObject(msgspec.Struct, frozen=True, kw_only=True):
    id: str
    object: str = "vector_store.file"
    created_at: int
    vector_store_id: str
    status: str
    usage_bytes: int
    last_error: LastError | None
    attributes: dict[str, Value]
    chunking_strategy: ShownStrategy


class FileBatchObject(msgspec.Struct, frozen=True, kw_only=True):
    id: str
    object: str = "vector_store.files_batch"
    created_at: int
    vector_store_id: str
    status: str
    file_counts: FileCounts


class TextContent(msgspec.Struct, frozen=True, kw_only=True):
    text: str
    type: str = "text"


class FileContent(msgspec.Struct, frozen=True, kw_only=True):
    object: str = "vector_store.file_content.page"
    file_id: str
    filename: str
    attributes: dict[str, Value]
    data: list[TextContent]
    has_more: bool = False
    next_page: str | None = None


class ChunkIds(msgspec.Struct, frozen=True, kw_only=True):
    object: str = "vector_store.chunks"
    ids: list[str]


class ChunksDeleted(msgspec.Struct, frozen=True, kw_only=True):
    object: str = "vector_store.chunks.deleted"
    deleted: int


def counts(files: Iterable[VectorStoreFileRecord]) -> FileCounts:
    found = dict.fromkeys(("in_progress", "completed", "failed", "cancelled"), 0)
    for file in files:
        found[file.status] += 1
    return FileCounts(**found, total=sum(found.values()))


def store_object(record: VectorStoreRecord, files: list[VectorStoreFileRecord]) -> VectorStoreObject:
    counted = counts(files)
    expires = expires_ms(record)
    return VectorStoreObject(
        id=record.id, created_at=record.created_ms // 1000, name=record.name, description=record.description or None,
        usage_bytes=sum(file.usage_bytes for file in files), file_counts=counted,
        status="expired" if has_expired(record) else "in_progress" if counted.in_progress else "completed",
        expires_after=ExpiresAfter(anchor="last_active_at", days=record.expires_days) if record.expires_days else None,
        expires_at=expires // 1000 if expires else None, last_active_at=record.active_ms // 1000,
        metadata=record.metadata, embedding_model=record.embedding_model or None,
    )  # fmt: skip


def file_object(record: VectorStoreFileRecord) -> VectorStoreFileObject:
    strategy = ShownStrategy(type="other")  # ours: by headings, paragraphs and sentences
    if (static := record.chunking) is not None:
        strategy = ShownStrategy(
            type="static",
            static=StaticStrategy(
                max_chunk_size_tokens=static.max_tokens, chunk_overlap_tokens=static.overlap_tokens
            ),
        )  # fmt: skip
    error = LastError(code=record.error_code, message=record.error) if record.error_code else None
    return VectorStoreFileObject(
        id=record.file, created_at=record.created_ms // 1000, vector_store_id=record.store, status=record.status,
        usage_bytes=record.usage_bytes, last_error=error, attributes=record.attributes, chunking_strategy=strategy,
    )  # fmt: skip


def batch_object(record: FileBatchRecord, files: list[VectorStoreFileRecord]) -> FileBatchObject:
    """``files``: those of the batch that are still in the store."""
    counted = counts(files)
    status = "cancelled" if record.cancelled else "in_progress" if counted.in_progress else "completed"
    if status == "completed" and counted.failed and counted.failed == counted.total:
        status = "failed"
    return FileBatchObject(
        id=record.id, created_at=record.created_ms // 1000, vector_store_id=record.store, status=status,
        file_counts=counted,
    )  # fmt: skip


def days_of(expires: ExpiresAfter | None) -> int:
    if expires is None:
        return 0
    integer("expires_after.days", expires.days, 1, _MAX_DAYS)
    return expires.days


def chunking_of(strategy: ChunkingStrategy | None) -> StaticChunking | None:
    """Raises InvalidRequest: the lengths are not between OpenAI's bounds."""
    if strategy is None or strategy.type == "auto":
        return None
    static = strategy.static
    if static is None:
        raise InvalidRequest(
            "Missing required parameter: 'chunking_strategy.static'.", param="chunking_strategy.static"
        )
    integer("chunking_strategy.static.max_chunk_size_tokens", static.max_chunk_size_tokens, 100, 4096)
    integer(
        "chunking_strategy.static.chunk_overlap_tokens", static.chunk_overlap_tokens, 0,
        static.max_chunk_size_tokens // 2,
    )  # fmt: skip
    return StaticChunking(max_tokens=static.max_chunk_size_tokens, overlap_tokens=static.chunk_overlap_tokens)


def checked(param: str, given: Mapping[str, V] | None) -> dict[str, V]:
    """Metadata or attributes within OpenAI's bounds. Raises InvalidRequest."""
    return pairs(param, given, reserved=("$", OURS))


def attributes_of(param: str, given: Mapping[str, V] | None) -> dict[str, V]:
    """The same for what chunks get as attributes, which a search service has to take."""
    found = checked(param, given)
    for key, value in found.items():
        if problem := name_problem(key) or value_problem(key, value):
            raise InvalidRequest(f"Invalid '{param}': {problem}.", param=param)
    return found


def batch_files(asked: BatchRequest) -> list[AttachRequest]:
    """Each file of a batch once, with what holds for it.

    Raises:
        InvalidRequest: there are none or too many, or both ways are used.
    """
    if (asked.file_ids is None) == (asked.files is None):
        raise InvalidRequest("Give either 'file_ids' or 'files'.", param="file_ids")
    files = asked.files
    if files is None:
        files = [
            AttachRequest(file_id=id_, attributes=asked.attributes, chunking_strategy=asked.chunking_strategy)
            for id_ in asked.file_ids or ()
        ]
    param = "files" if asked.files is not None else "file_ids"
    if not 1 <= len(files) <= MAX_BATCH:
        raise InvalidRequest(f"Invalid '{param}': 1 to {MAX_BATCH} files, not {len(files)}.", param=param)
    return list({file.file_id: file for file in files}.values())


def check_ranking(options: RankingOptions) -> None:
    if options.score_threshold is not None:
        decimal("ranking_options.score_threshold", options.score_threshold, 0, 1)
    if (hybrid := options.hybrid_search) is not None:
        for name in ("embedding_weight", "text_weight"):
            decimal(f"ranking_options.hybrid_search.{name}", getattr(hybrid, name), 0, 1e6)
        if not (hybrid.embedding_weight or hybrid.text_weight):
            raise InvalidRequest(
                "Invalid 'ranking_options.hybrid_search': one of the weights must be more than 0.",
                param="ranking_options.hybrid_search",
            )
