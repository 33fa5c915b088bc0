"""``/v1/batches``: one function per route."""

from __future__ import annotations

import re

import msgspec
from aiohttp import web
from modelbus_broker.errors import InvalidRequest
from modelbus_broker.messages.files import BatchRecord

from ..bodies import Body
from ..checks import life_s, not_one_of, pairs
from ..gateway import GATEWAY, json_response
from ..paging import list_page, paging
from .records import KEPT_S, OVER, BatchRecords, entered, new_batch_id, now_ms
from .rows import ENDPOINTS

_HOUR_MS = 3600 * 1000


class _Expiry(msgspec.Struct, frozen=True):
    anchor: str
    seconds: int


class _Create(msgspec.Struct, frozen=True):
    input_file_id: str
    endpoint: str
    completion_window: str
    metadata: dict[str, str] | None = None
    output_expires_after: _Expiry | None = None


class _Counts(msgspec.Struct, frozen=True):
    total: int
    completed: int
    failed: int


class _Error(msgspec.Struct, frozen=True):
    code: str
    message: str
    line: int | None
    param: str | None


class _Errors(msgspec.Struct, frozen=True):
    data: list[_Error]
    object: str = "list"


class _InputDetails(msgspec.Struct, frozen=True):
    cached_tokens: int


class _OutputDetails(msgspec.Struct, frozen=True):
    reasoning_tokens: int


class _Usage(msgspec.Struct, frozen=True):
    input_tokens: int
    input_tokens_details: _InputDetails
    output_tokens: int
    output_tokens_details: _OutputDetails
    total_tokens: int


class BatchObject(msgspec.Struct, frozen=True, kw_only=True):
    """A batch as clients get it; times are seconds of Unix time."""

    id: str
    object: str = "batch"
    endpoint: str
    errors: _Errors | None
    input_file_id: str
    completion_window: str
    status: str
    output_file_id: str | None
    error_file_id: str | None
    created_at: int
    in_progress_at: int | None
    expires_at: int
    finalizing_at: int | None
    completed_at: int | None
    failed_at: int | None
    expired_at: int | None
    cancelling_at: int | None
    cancelled_at: int | None
    request_counts: _Counts
    usage: _Usage | None
    metadata: dict[str, str] | None


_CREATE = Body(_Create)


async def create(request: web.Request) -> web.Response:
    """The batch is begun by whichever gateway sees it first, this one most likely."""
    gateway = request.app[GATEWAY]
    asked = _CREATE.read(await gateway.body(request))
    if asked.endpoint not in ENDPOINTS:
        raise not_one_of("endpoint", asked.endpoint, list(ENDPOINTS))
    hours = re.fullmatch(r"([1-9]\d?)h", asked.completion_window)
    if hours is None or int(hours[1]) > 24:
        raise InvalidRequest(
            f"Invalid 'completion_window': expected 1h to 24h, but got {asked.completion_window!r}.",
            param="completion_window",
        )
    lives_s = KEPT_S
    if (expiry := asked.output_expires_after) is not None:
        lives_s = life_s("output_expires_after.{}", expiry.anchor, expiry.seconds)
    file = await gateway.files.get(asked.input_file_id)
    if file.purpose != "batch":
        raise InvalidRequest(
            f"Invalid 'input_file_id': the file has the purpose {file.purpose!r}; upload it with the purpose 'batch'.",
            param="input_file_id",
        )
    now = now_ms()
    record = BatchRecord(
        id=new_batch_id(), endpoint=asked.endpoint, input_file=file.id, created_ms=now,
        expires_ms=now + int(hours[1]) * _HOUR_MS, window=asked.completion_window,
        metadata=pairs("metadata", asked.metadata), output_lives_s=lives_s,
    )  # fmt: skip
    await gateway.batches.records.create(record)
    gateway.batches.wake()
    return json_response(batch_object(record))


async def list_batches(request: web.Request) -> web.Response:
    wanted = paging(request.query)
    found, more = wanted.of(await _records(request).all(), lambda record: (record.created_ms, record.id))
    return json_response(list_page([batch_object(record) for record in found], more))


async def retrieve(request: web.Request) -> web.Response:
    return json_response(batch_object(await _records(request).get(request.match_info["batch_id"])))


async def cancel(request: web.Request) -> web.Response:
    """What runs is taken back, what is waiting is not asked; what has been answered is in the output."""

    def cancelling(record: BatchRecord) -> BatchRecord:
        return entered(record, "cancelling") if record.status in ("validating", "in_progress") else record

    batch_id = request.match_info["batch_id"]
    before = await _records(request).get(batch_id)
    if before.status in OVER:
        raise InvalidRequest(f"Cannot cancel a batch with the status '{before.status}'.", param="batch_id", status=409)
    return json_response(batch_object(await _records(request).change(batch_id, cancelling)))


def _records(request: web.Request) -> BatchRecords:
    return request.app[GATEWAY].batches.records


def batch_object(record: BatchRecord) -> BatchObject:
    def at(status: str) -> int | None:
        return record.at_ms[status] // 1000 if status in record.at_ms else None

    usage = record.usage
    errors = [_Error(error.code, error.message, error.line, error.param) for error in record.errors]
    return BatchObject(
        id=record.id, endpoint=record.endpoint, errors=_Errors(errors) if errors else None,
        input_file_id=record.input_file, completion_window=record.window, status=record.status,
        output_file_id=record.output_file or None, error_file_id=record.error_file or None,
        created_at=record.created_ms // 1000, expires_at=record.expires_ms // 1000, in_progress_at=at("in_progress"),
        finalizing_at=at("finalizing"), completed_at=at("completed"), failed_at=at("failed"), expired_at=at("expired"),
        cancelling_at=at("cancelling"), cancelled_at=at("cancelled"),
        request_counts=_Counts(record.total, record.completed, record.failed),
        usage=_Usage(
            usage.prompt_tokens, _InputDetails(usage.cached_tokens), usage.completion_tokens,
            _OutputDetails(usage.reasoning_tokens), usage.prompt_tokens + usage.completion_tokens,
        ) if record.status in OVER else None,
        metadata=record.metadata or None,
    )  # fmt: skip
