"""What can be done with vector stores and their files, between the routes and the search service."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence

import msgspec
from modelbus.client import Client
from modelbus.gathering import gathered
from modelbus.search.store import AsyncStore
from modelbus_broker.connection import Bus
from modelbus_broker.errors import InvalidRequest, ModelBusError, ModelUnavailable, NotFound
from modelbus_broker.messages.files import (
    FileBatchRecord,
    VectorStoreFileRecord,
    VectorStoreRecord,
)
from modelbus_broker.names import random_token
from modelbus_broker.publisher import Publisher
from modelbus_broker.registry import Registry

from ..files.store import FileStore
from .indexing import Indexer, rewrite_attributes
from .records import VectorStoreRecords, has_expired, now_ms
from .types import (
    AttachRequest,
    Attributes,
    BatchRequest,
    CreateRequest,
    attributes_of,
    batch_files,
    checked,
    chunking_of,
    days_of,
)

log = logging.getLogger(__name__)

#: Purposes of files that can be put into a vector store.
PURPOSES = ("assistants", "user_data")
_AT_ONCE = 16
#: Stores whose settings are remembered.
_REMEMBERED = 1000


class VectorStores:
    """The vector stores of a bus.

    Args:
        service: the search service in which stores are made.
        embedding_model: of stores that name none; "": they are searched by words.
    """

    def __init__(
        self,
        bus: Bus,
        registry: Registry,
        publisher: Publisher,
        files: FileStore,
        *,
        service: str,
        embedding_model: str,
    ) -> None:
        self.client = Client(bus, registry, publisher)
        self.records = VectorStoreRecords(bus)
        self.indexer = Indexer(bus, self.records, files, self.chunks)
        self._registry = registry
        self._files = files
        self._service = service
        self._embedding_model = embedding_model
        self._known: dict[str, AsyncStore] = {}

    def chunks(self, record: VectorStoreRecord) -> AsyncStore:
        """The search service's store of a vector store."""
        if record.id not in self._known:
            if len(self._known) >= _REMEMBERED:
                self._known.clear()
            self._known[record.id] = AsyncStore(record.id, client=self.client, service=record.service)
        return self._known[record.id]

    def check_service(self, service: str) -> None:
        """Raises ModelUnavailable: there is no such search service."""
        if not self._registry.deployments_of(service):
            raise ModelUnavailable(f"There is no search service {service!r}: `modelbus storage start` starts one.")

    async def usable(self, store_id: str) -> VectorStoreRecord:
        """A store that can be searched and written to.

        Raises:
            NotFound: there is no such store.
            InvalidRequest: it has expired.
            ModelUnavailable: there is no search service.
        """
        record = await self.records.store(store_id)
        if has_expired(record):
            raise InvalidRequest(f"The vector store {store_id} has expired.", param="vector_store_id")
        self.check_service(record.service)
        return record

    async def create(self, asked: CreateRequest, model: str | None) -> VectorStoreRecord:
        """Makes one, and puts its files into it.

        Args:
            model: the embedding model that is asked for, by its name on the bus; None: the default.

        Raises:
            InvalidRequest, NotFound: something of it cannot be; nothing was made.
            ModelUnavailable: there is no search service.
        """
        model = self._embedding_model if model is None else model
        metadata, days = checked("metadata", asked.metadata), days_of(asked.expires_after)
        if model and not self._registry.deployments_of(model):
            raise InvalidRequest(f"There is no embedding model {model!r}.", param="embedding_model")
        batch = BatchRequest(file_ids=asked.file_ids, chunking_strategy=asked.chunking_strategy)
        prepared = await self.prepare(batch_files(batch)) if asked.file_ids else []
        self.check_service(self._service)
        now = now_ms()
        record = VectorStoreRecord(
            id=f"vs_{now:011x}{random_token(12)}", created_ms=now, active_ms=now, name=asked.name or "",
            description=asked.description or "", metadata=metadata, expires_days=days, service=self._service,
            embedding_model=model,
        )  # fmt: skip
        await self.records.announce_store(record.id, record.service)
        await AsyncStore(
            record.id, client=self.client, service=record.service, embedding_model=model,
            query_prefix=asked.query_prefix, passage_prefix=asked.passage_prefix,
        ).create(must_be_new=True)  # fmt: skip
        await self.records.put_store(record)
        await self.records.forget_announcement(record.id)
        await self.put_files(record, prepared)
        return record

    async def forget_unmade(self, before_ms: int) -> None:
        """Drops what gateways that were killed, or gave up, left at a search service while they made a store.

        Args:
            before_ms: those that were begun earlier; the ids tell.
        """
        for store_id, service in await self.records.announced_stores():
            if int(store_id[3:14], 16) >= before_ms:
                continue
            try:
                await self._drop_unless_made(store_id, service)
            except ModelBusError as error:  # its search service is away: the next time
                log.info("what may be left of %s stays: %s", store_id, error.message)
            else:
                await self.records.forget_announcement(store_id)

    async def _drop_unless_made(self, store_id: str, service: str) -> None:
        try:
            await self.records.store(store_id)
        except NotFound:
            self.check_service(service)
            await AsyncStore(store_id, client=self.client, service=service).drop()

    async def delete(self, record: VectorStoreRecord) -> None:
        """Its chunks first, its record last: until then it can be deleted again."""
        self.check_service(record.service)
        await self.chunks(record).drop()
        self._known.pop(record.id, None)
        await self.records.forget_store(record.id)

    # Files

    async def prepare(self, wanted: Sequence[AttachRequest]) -> list[VectorStoreFileRecord]:
        """Their records, for a store that is still to be said.

        Raises:
            NotFound: there is no such file.
            InvalidRequest: it is for something else, or what is said of it cannot be.
        """
        files = await gathered([self._files.get(one.file_id) for one in wanted], _AT_ONCE)
        found = []
        for one, file in zip(wanted, files, strict=True):
            if file.purpose not in PURPOSES:
                raise InvalidRequest(
                    f"The file {file.id} has the purpose {file.purpose!r}; files of vector stores have "
                    f"{' or '.join(map(repr, PURPOSES))}.",
                    param="file_id",
                )
            found.append(
                VectorStoreFileRecord(
                    store="", file=file.id, filename=file.filename, created_ms=now_ms(), revision=random_token(16),
                    attributes=attributes_of("attributes", one.attributes), chunking=chunking_of(one.chunking_strategy),
                )
            )  # fmt: skip
        return found

    async def put_files(
        self, store: VectorStoreRecord, prepared: Sequence[VectorStoreFileRecord], batch: str = ""
    ) -> list[VectorStoreFileRecord]:
        """Writes their records, then the tasks. A record without its task gets one from ``upkeep``."""

        async def put(record: VectorStoreFileRecord) -> VectorStoreFileRecord:
            record = msgspec.structs.replace(record, store=store.id, batch=batch)
            await self.records.put_file(record)
            await self.records.enqueue(record)
            return record

        put_down = await gathered([put(record) for record in prepared], _AT_ONCE)
        await self.records.touch(store)
        return put_down

    async def take_out(self, store: VectorStoreRecord, file_id: str) -> None:
        """The file is no longer in the store; the file itself stays."""
        self.check_service(store.service)
        await self.chunks(store).delete(file_id=file_id)
        await self.records.forget_file(store.id, file_id)

    async def take_out_everywhere(self, file_id: str) -> None:
        for record in await self.records.files(file_id=file_id):
            try:
                store = await self.records.store(record.store)
            except NotFound:  # it is being deleted
                continue
            await self.take_out(store, file_id)

    async def set_attributes(
        self, store: VectorStoreRecord, file_id: str, given: Attributes | None
    ) -> VectorStoreFileRecord:
        """Of a file and of its chunks. One that is being indexed gets them with its chunks."""
        attributes = attributes_of("attributes", given)
        record = await self.records.change_file(
            store.id, file_id, lambda it: msgspec.structs.replace(it, attributes=attributes)
        )
        if record.status == "completed":
            await rewrite_attributes(self.chunks(store), record)
        return record

    # Batches

    async def create_batch(
        self, store: VectorStoreRecord, wanted: Sequence[AttachRequest]
    ) -> tuple[FileBatchRecord, list[VectorStoreFileRecord]]:
        """Raises as :meth:`prepare`; then nothing was put in."""
        prepared = await self.prepare(wanted)
        batch = FileBatchRecord(
            id=f"vsfb_{random_token(16)}", store=store.id, created_ms=now_ms(), files=[one.file for one in prepared]
        )
        await self.records.put_batch(batch)
        return batch, await self.put_files(store, prepared, batch.id)

    async def files_of(self, batch: FileBatchRecord) -> list[VectorStoreFileRecord]:
        return [record for record in await self.records.files(batch.store) if record.batch == batch.id]

    async def cancel_batch(self, batch: FileBatchRecord) -> FileBatchRecord:
        """What is not done is not done any more."""

        def cancelled(record: VectorStoreFileRecord) -> VectorStoreFileRecord | None:
            mine = record.batch == batch.id and record.status == "in_progress"
            return msgspec.structs.replace(record, status="cancelled") if mine else None

        waiting = [record for record in await self.files_of(batch) if record.status == "in_progress"]
        if not waiting:
            return batch
        batch = msgspec.structs.replace(batch, cancelled=True)
        await self.records.put_batch(batch)
        await asyncio.gather(
            *(self.records.change_file(record.store, record.file, cancelled) for record in waiting),
            return_exceptions=True,  # one that was taken out meanwhile
        )
        return batch
