"""What gateways keep of files, batches of requests and vector stores (buckets ``files`` and ``vector_stores``), and the work on them that waits (``MB_INDEXING``)."""

from __future__ import annotations

from typing import Literal

import msgspec

from .base import Message
from .search import Value
from .usage import Usage


class FileRecord(Message, frozen=True, kw_only=True, tag="file"):
    """A file that was uploaded. Key: its id."""

    id: str
    filename: str
    purpose: str
    size: int  #: bytes
    sha256: str
    created_ms: int  #: Unix time, as all below
    expires_ms: int = 0  #: 0: never
    place: Literal["bus", "root"] = "bus"  #: the object bucket ``files``, or the gateways' ``--files-root``


BatchStatus = Literal[
    "validating", "failed", "in_progress", "finalizing", "completed", "expired", "cancelling", "cancelled"
]


class BatchError(Message, frozen=True, kw_only=True):
    """Why a batch could not be begun, or not be ended."""

    code: str
    message: str
    line: int | None = None  #: of the input file, from 1
    param: str | None = None


class BatchRecord(Message, frozen=True, kw_only=True, tag="batch"):
    """Requests in a file that are answered in another one. Key: ``batch.<id>`` in the bucket ``files``."""

    id: str
    endpoint: str
    input_file: str
    created_ms: int  #: Unix time, as all below; 0: not yet
    expires_ms: int
    window: str = "24h"
    metadata: dict[str, str] = {}
    output_lives_s: int = 0
    status: BatchStatus = "validating"
    at_ms: dict[str, int] = {}  #: when it came into each status
    errors: list[BatchError] = []
    total: int = 0
    completed: int = 0
    failed: int = 0
    usage: Usage = Usage()
    output_file: str = ""
    error_file: str = ""
    written: list[
        str
    ] = []  #: files that gateways have written for it; those that it does not name above are taken away


class VectorStoreRecord(Message, frozen=True, kw_only=True, tag="vector_store"):
    """A vector store; its chunks are in the search service's store of the same name. Key: ``store.<id>``."""

    id: str
    created_ms: int
    active_ms: int  #: last searched or changed, as far as expiry cares
    name: str = ""
    description: str = ""
    metadata: dict[str, str] = {}
    expires_days: int = 0  #: after ``active_ms``; 0: never
    service: str = "storage"
    embedding_model: str = ""


FileStatus = Literal["in_progress", "completed", "cancelled", "failed"]
FileErrorCode = Literal["server_error", "unsupported_file", "invalid_file"]


class StaticChunking(Message, frozen=True, kw_only=True):
    """How long the chunks of a file are, in tokens."""

    max_tokens: int
    overlap_tokens: int


class VectorStoreFileRecord(Message, frozen=True, kw_only=True, tag="vector_store_file"):
    """A file in a vector store. Key: ``file.<store>.<file>``."""

    store: str
    file: str
    filename: str
    created_ms: int
    revision: str  #: another one each time that the file is put into the store
    status: FileStatus = "in_progress"
    attributes: dict[str, Value] = {}
    chunking: StaticChunking | None = None  #: None: the reader decides
    batch: str = ""
    usage_bytes: int = 0
    error_code: FileErrorCode | None = None
    error: str = ""


class FileBatchRecord(Message, frozen=True, kw_only=True, tag="file_batch"):
    """Files that were put into a vector store together. Key: ``batch.<store>.<id>``."""

    id: str
    store: str
    created_ms: int
    files: list[str]
    cancelled: bool = False


class IndexFile(Message, frozen=True, kw_only=True, tag="index_file"):
    """A file of a vector store is to be read, cut and embedded; whoever takes this looks whether it still is."""

    store: str
    file: str
    revision: str
    begun: int = 0  #: gateways that it has ended, under tasks before this one


decode_file = msgspec.msgpack.Decoder(FileRecord).decode
decode_batch = msgspec.msgpack.Decoder(BatchRecord).decode
decode_vector_store = msgspec.msgpack.Decoder(VectorStoreRecord).decode
decode_vector_store_file = msgspec.msgpack.Decoder(VectorStoreFileRecord).decode
decode_file_batch = msgspec.msgpack.Decoder(FileBatchRecord).decode
decode_index_file = msgspec.msgpack.Decoder(IndexFile).decode
