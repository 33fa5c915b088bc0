"""``/v1/vector_stores``: one function per route."""

from __future__ import annotations

import msgspec
from aiohttp import web
from modelbus.gathering import gathered
from modelbus_broker.messages.files import VectorStoreFileRecord
from msgspec import UNSET

from ..checks import not_one_of
from ..gateway import GATEWAY, json_response
from ..paging import Deleted, list_page, paging
from . import types
from .indexing import chunks_of_file
from .searching import search as search_store
from .stores import VectorStores
from .types import TextContent

_STATUSES = ("in_progress", "completed", "failed", "cancelled")


def _stores(request: web.Request) -> VectorStores:
    return request.app[GATEWAY].vector_stores


async def create(request: web.Request) -> web.Response:
    gateway, stores = request.app[GATEWAY], _stores(request)
    asked = types.CREATE_BODY.read(await gateway.body(request) or b"{}")
    model = gateway.model(asked.embedding_model) if asked.embedding_model else asked.embedding_model
    record = await stores.create(asked, model)
    return json_response(types.store_object(record, await stores.records.files(record.id)))


async def list_stores(request: web.Request) -> web.Response:
    records, wanted = _stores(request).records, paging(request.query)
    found, more = wanted.of(await records.stores(), lambda record: (record.created_ms, record.id))
    files = await gathered([records.files(record.id) for record in found], 8)
    data = [types.store_object(record, its) for record, its in zip(found, files, strict=True)]
    return json_response(list_page(data, more))


async def retrieve(request: web.Request) -> web.Response:
    records = _stores(request).records
    record = await records.store(_store_id(request))
    return json_response(types.store_object(record, await records.files(record.id)))


async def update(request: web.Request) -> web.Response:
    records = _stores(request).records
    asked = types.UPDATE_BODY.read(await request.app[GATEWAY].body(request))
    changed: dict[str, object] = {}
    if asked.name is not None:
        changed["name"] = asked.name
    if asked.metadata is not UNSET:
        changed["metadata"] = types.checked("metadata", asked.metadata)
    if asked.expires_after is not UNSET:
        changed["expires_days"] = types.days_of(asked.expires_after)
    record = await records.change_store(_store_id(request), lambda it: msgspec.structs.replace(it, **changed))
    return json_response(types.store_object(record, await records.files(record.id)))


async def delete(request: web.Request) -> web.Response:
    stores = _stores(request)
    record = await stores.records.store(_store_id(request))
    await stores.delete(record)
    return json_response(Deleted(id=record.id, object="vector_store.deleted"))


async def search(request: web.Request) -> web.Response:
    gateway, stores = request.app[GATEWAY], _stores(request)
    asked = types.SEARCH_BODY.read(await gateway.body(request))
    record = await stores.usable(_store_id(request))
    rewriter = gateway.model(asked.rewrite_model or gateway.settings.rewrite_model)
    answer = await search_store(stores.client, stores.chunks(record), asked, rewriter)
    await stores.records.touch(record)
    return json_response(answer)


# Files


async def attach(request: web.Request) -> web.Response:
    stores = _stores(request)
    asked = types.ATTACH_BODY.read(await request.app[GATEWAY].body(request))
    record = await stores.usable(_store_id(request))
    (file,) = await stores.put_files(record, await stores.prepare([asked]))
    return json_response(types.file_object(file))


async def list_files(request: web.Request) -> web.Response:
    records = _stores(request).records
    store = await records.store(_store_id(request))
    return _file_page(request, await records.files(store.id))


async def retrieve_file(request: web.Request) -> web.Response:
    records = _stores(request).records
    store = await records.store(_store_id(request))
    return json_response(types.file_object(await records.file(store.id, request.match_info["file_id"])))


async def update_file(request: web.Request) -> web.Response:
    stores = _stores(request)
    asked = types.UPDATE_FILE_BODY.read(await request.app[GATEWAY].body(request))
    store = await stores.usable(_store_id(request))
    return json_response(
        types.file_object(await stores.set_attributes(store, request.match_info["file_id"], asked.attributes))
    )


async def delete_file(request: web.Request) -> web.Response:
    stores = _stores(request)
    store = await stores.records.store(_store_id(request))
    file = await stores.records.file(store.id, request.match_info["file_id"])
    await stores.take_out(store, file.file)
    return json_response(Deleted(id=file.file, object="vector_store.file.deleted"))


async def file_content(request: web.Request) -> web.Response:
    """The text that was read out of the file, a piece for each chunk; what a chunk repeats of the one before is left out."""
    stores = _stores(request)
    store = await stores.usable(_store_id(request))
    file = await stores.records.file(store.id, request.match_info["file_id"])
    pieces, end = [], 0
    for chunk in await chunks_of_file(stores.chunks(store), file):
        pieces.append(TextContent(text=chunk.text[max(0, end - chunk.start) :]))
        end = max(end, chunk.end)
    return json_response(
        types.FileContent(file_id=file.file, filename=file.filename, attributes=file.attributes, data=pieces)
    )  # fmt: skip


# Batches


async def create_batch(request: web.Request) -> web.Response:
    stores = _stores(request)
    asked = types.BATCH_BODY.read(await request.app[GATEWAY].body(request))
    store = await stores.usable(_store_id(request))
    batch, files = await stores.create_batch(store, types.batch_files(asked))
    return json_response(types.batch_object(batch, files))


async def retrieve_batch(request: web.Request) -> web.Response:
    stores = _stores(request)
    batch = await stores.records.batch(_store_id(request), request.match_info["batch_id"])
    return json_response(types.batch_object(batch, await stores.files_of(batch)))


async def cancel_batch(request: web.Request) -> web.Response:
    stores = _stores(request)
    batch = await stores.cancel_batch(await stores.records.batch(_store_id(request), request.match_info["batch_id"]))
    return json_response(types.batch_object(batch, await stores.files_of(batch)))


async def list_batch_files(request: web.Request) -> web.Response:
    stores = _stores(request)
    batch = await stores.records.batch(_store_id(request), request.match_info["batch_id"])
    return _file_page(request, await stores.files_of(batch))


# Chunks without a file


async def upsert_chunks(request: web.Request) -> web.Response:
    stores = _stores(request)
    asked = types.UPSERT_BODY.read(await request.app[GATEWAY].body(request))
    store = await stores.usable(_store_id(request))
    items = [
        {
            "id": chunk.id, "text": chunk.text, "vector": chunk.vector or b"", "file_id": chunk.file_id,
            "ordinal": chunk.ordinal, "title": chunk.heading,
            "attributes": types.attributes_of(f"chunks[{at}].attributes", chunk.attributes),
        }
        for at, chunk in enumerate(asked.chunks)
    ]  # fmt: skip
    ids = await stores.chunks(store).upsert(items)
    await stores.records.touch(store)
    return json_response(types.ChunkIds(ids=ids))


async def delete_chunks(request: web.Request) -> web.Response:
    stores = _stores(request)
    asked = types.DELETE_CHUNKS_BODY.read(await request.app[GATEWAY].body(request))
    store = await stores.usable(_store_id(request))
    return json_response(
        types.ChunksDeleted(deleted=await stores.chunks(store).delete(asked.ids, filter=asked.filters))
    )


def _file_page(request: web.Request, files: list[VectorStoreFileRecord]) -> web.Response:
    wanted, status = paging(request.query), request.query.get("filter")
    if status is not None and status not in _STATUSES:
        raise not_one_of("filter", status, _STATUSES)
    found, more = wanted.of(
        [file for file in files if status in (None, file.status)], lambda file: (file.created_ms, file.file)
    )
    return json_response(list_page([types.file_object(file) for file in found], more))


def _store_id(request: web.Request) -> str:
    return request.match_info["store_id"]
