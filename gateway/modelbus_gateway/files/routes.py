"""``/v1/files``: upload, list, get, content, delete."""

from __future__ import annotations

import asyncio
import logging
import mimetypes
from collections.abc import Mapping

import msgspec
from aiohttp import BodyPartReader, web
from modelbus_broker.errors import InvalidRequest, ModelBusError
from modelbus_broker.messages.files import FileRecord

from ..checks import life_s, not_one_of
from ..edge import EXCHANGE
from ..gateway import GATEWAY, json_response
from ..paging import Deleted, list_page, paging
from .store import FileStore, Upload

log = logging.getLogger(__name__)

PURPOSES = ("assistants", "batch", "fine-tune", "vision", "user_data", "evals")
#: What is read of a form beside its file; anything else in it is passed over and not kept.
_FIELDS = ("purpose", "expires_after[anchor]", "expires_after[seconds]")
_PIECE = 256 << 10
_DAY_S = 24 * 3600
_BATCH_S = 30 * _DAY_S  #: files for batches expire where nobody says otherwise


class FileObject(msgspec.Struct, frozen=True, kw_only=True):
    id: str
    object: str = "file"
    bytes: int
    created_at: int
    expires_at: int | None
    filename: str
    purpose: str
    status: str = "processed"
    status_details: str | None = None


async def upload(request: web.Request) -> web.Response:
    """The bytes go to where they lie as they come."""
    files = request.app[GATEWAY].files
    if request.content_type != "multipart/form-data":
        raise InvalidRequest("Send the file as multipart/form-data, with the fields 'purpose' and 'file'.")
    taken = files.upload(request.content_length)
    try:
        fields, filename = await _read_form(request, taken)
        purpose = fields.get("purpose", "")
        if not purpose:
            raise InvalidRequest("Missing required parameter: 'purpose'.", param="purpose")
        if purpose not in PURPOSES:
            raise not_one_of("purpose", purpose, PURPOSES)
        if not filename:
            raise InvalidRequest("Missing required parameter: 'file'.", param="file")
        record = await taken.end(filename, purpose, _lives_s(fields, purpose))
    except BaseException:
        await asyncio.shield(taken.drop())
        raise
    return json_response(file_object(record))


async def _read_form(request: web.Request, taken: Upload) -> tuple[dict[str, str], str]:
    """The form's fields, and the name of the file, whose bytes have gone to ``taken``."""
    fields: dict[str, str] = {}
    filename = ""
    try:
        form = await request.multipart()
        while (part := await form.next()) is not None:
            if not isinstance(part, BodyPartReader):
                raise InvalidRequest("The form has a form in it.")
            if part.name in _FIELDS:
                fields[part.name] = await part.text()
            if part.name != "file":
                continue
            if filename:
                raise InvalidRequest("One file at a time: the form has two.", param="file")
            filename = (part.filename or "upload").replace("\\", "/").rpartition("/")[2][:255] or "upload"
            while piece := await part.read_chunk(_PIECE):
                await taken.write(piece)
    except (ValueError, UnicodeDecodeError) as error:  # what aiohttp says of a broken form
        raise InvalidRequest(f"We could not parse the form of your request: {error}") from error
    return fields, filename


def _lives_s(fields: Mapping[str, str], purpose: str) -> int:
    anchor, seconds = fields.get("expires_after[anchor]"), fields.get("expires_after[seconds]")
    if anchor is None and seconds is None:
        return _BATCH_S if purpose == "batch" else 0
    if seconds is None or not seconds.isascii() or not seconds.isdigit():
        raise InvalidRequest("Invalid 'expires_after[seconds]': expected an integer.", param="expires_after[seconds]")
    return life_s("expires_after[{}]", anchor, int(seconds))


async def list_files(request: web.Request) -> web.Response:
    wanted, purpose = paging(request.query, default=10_000, most=10_000), request.query.get("purpose")
    records = await request.app[GATEWAY].files.all()
    found, more = wanted.of(
        [record for record in records if purpose in (None, record.purpose)],
        lambda record: (record.created_ms, record.id),
    )
    return json_response(list_page([file_object(record) for record in found], more))


async def retrieve(request: web.Request) -> web.Response:
    return json_response(file_object(await _record(request, request.app[GATEWAY].files)))


async def delete(request: web.Request) -> web.Response:
    """The file, also in all vector stores that it is in."""
    gateway = request.app[GATEWAY]
    record = await _record(request, gateway.files)
    await gateway.vector_stores.take_out_everywhere(record.id)
    await gateway.files.delete(record)
    return json_response(Deleted(id=record.id, object="file"))


async def content(request: web.Request) -> web.StreamResponse:
    """The bytes as they were uploaded, piece by piece."""
    gateway, exchange = request.app[GATEWAY], request[EXCHANGE]
    record = await _record(request, gateway.files)
    pieces = gateway.files.content(record)
    first = await anext(pieces, b"")  # a file that cannot be read is an ordinary error as long as nothing went out
    response = web.StreamResponse(headers=exchange.headers)
    response.content_type = mimetypes.guess_type(record.filename)[0] or "application/octet-stream"
    response.content_length = record.size
    # A page that somebody uploaded is not to run as one of this host's.
    response.headers["Content-Disposition"] = "attachment"
    response.headers["X-Content-Type-Options"] = "nosniff"
    await response.prepare(request)
    try:
        await asyncio.wait_for(response.write(first), gateway.settings.client_stall_s)
        async for piece in pieces:
            await asyncio.wait_for(response.write(piece), gateway.settings.client_stall_s)
    except (ModelBusError, TimeoutError) as error:
        # The length that was said is not reached, so that nobody takes it for the whole.
        log.warning("the content of %s was cut off: %s", record.id, error or "its client takes nothing")
        exchange.status = error.status if isinstance(error, ModelBusError) else 499
        response.force_close()
        if request.transport is not None:
            request.transport.abort()
        return response
    await response.write_eof()
    return response


async def _record(request: web.Request, files: FileStore) -> FileRecord:
    return await files.get(request.match_info["file_id"])


def file_object(record: FileRecord) -> FileObject:
    return FileObject(
        id=record.id, bytes=record.size, created_at=record.created_ms // 1000, filename=record.filename,
        purpose=record.purpose, expires_at=record.expires_ms // 1000 if record.expires_ms else None,
    )  # fmt: skip
