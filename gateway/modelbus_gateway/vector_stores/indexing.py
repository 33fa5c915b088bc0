"""Files of vector stores become chunks: taken from a durable queue, read, cut, embedded, written, and only then acknowledged.

Any gateway takes the next file. One that is killed loses nothing: its file comes to another one after ten seconds, whose
chunks have the same ids. What has happened to a file is in its record; its revision says whether a task is still meant.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Callable, Sequence

import msgspec
from modelbus.knowledge.documents import check_size
from modelbus.knowledge.reading import Reader
from modelbus.search.store import AsyncStore
from modelbus_broker import names
from modelbus_broker.connection import Bus, Msg
from modelbus_broker.errors import BusUnavailable, InvalidRequest, MissingExtra, ModelBusError, NotFound
from modelbus_broker.messages.files import (
    FileErrorCode,
    IndexFile,
    VectorStoreFileRecord,
    VectorStoreRecord,
    decode_index_file,
)
from modelbus_broker.messages.search import Chunk
from modelbus_broker.pulling import parse_ack_subject

from ..files.store import FileStore
from .chunks import OURS, REVISION, ours, stored_attributes
from .records import VectorStoreRecords

log = logging.getLogger(__name__)

#: Files that one gateway process indexes at the same time: most of the work is the embedding model's.
AT_ONCE = 2
#: A file that has ended so many gateways is not tried again.
_MOST_ENDED = 5
#: A gateway that stops waits so long for the queue to take what it has not done.
_HAND_ON_S = 2.0
_PULL_S, _PROGRESS_S = 20, 3.0
#: While a service or a model cannot be asked, a file waits so long before it fails.
_PATIENCE_S = 600.0
_PAGE = 1000


class Indexer:
    """The tasks of one gateway process.

    Args:
        store_of: the search service's store of a vector store.
    """

    def __init__(
        self,
        bus: Bus,
        records: VectorStoreRecords,
        files: FileStore,
        store_of: Callable[[VectorStoreRecord], AsyncStore],
    ) -> None:
        self._bus = bus
        self._records = records
        self._files = files
        self._store_of = store_of
        self._reader = Reader()
        self._tasks: list[asyncio.Task[None]] = []

    def start(self) -> None:
        self._tasks = [asyncio.create_task(self._run(), name=f"indexing-{n}") for n in range(AT_ONCE)]

    async def close(self) -> None:
        """What is not done goes to another gateway at once."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._reader.close()

    async def _run(self) -> None:
        while True:
            try:
                if (taken := await self._next()) is not None:
                    await self._do(taken)
            except (ModelBusError, TimeoutError) as error:
                log.info("indexing: %s", error or "the bus does not answer")
                await asyncio.sleep(2)
            except Exception:
                log.exception("indexing failed")
                await asyncio.sleep(2)

    async def _next(self) -> Msg | None:
        """The next task, or None after a while without one."""
        come: asyncio.Future[Msg] = asyncio.get_running_loop().create_future()

        def take(msg: Msg) -> None:
            if not come.done():
                come.set_result(msg)

        # It comes under its own subject, so the connection's inbox for replies would not know it.
        inbox = self._bus.new_inbox()
        subscription = await self._bus.subscribe(inbox, take)
        try:
            api = f"$JS.API.CONSUMER.MSG.NEXT.{names.STREAM_INDEXING}.{names.INDEXERS}"
            body = msgspec.json.encode({"batch": 1, "expires": _PULL_S * 1_000_000_000})
            await self._bus.publish(api, body, reply=inbox)
            async with asyncio.timeout(_PULL_S + 5):
                msg = await come
        except asyncio.CancelledError:
            if come.done() and not come.cancelled() and not come.result().status:
                await self._bus.publish(come.result().reply, b"-NAK")  # it came just now
            raise
        finally:
            await subscription.unsubscribe()
        if msg.status == "503":
            raise BusUnavailable("there is no queue of files to index: run `modelbus start --head` once more")
        return msg if not msg.status else None

    async def _do(self, msg: Msg) -> None:
        delivery = parse_ack_subject(msg.reply)[2]
        try:
            task = decode_index_file(msg.data)
        except msgspec.MsgspecError:
            log.exception("a task cannot be read")
            await self._bus.publish(msg.reply, b"+TERM")
            return
        begun = task.begun + delivery - 1  # by gateways that it has ended
        async with self._in_progress(msg):
            try:
                await self._index(task, begun)
            except asyncio.CancelledError:
                await self._hand_on(msg, msgspec.structs.replace(task, begun=begun))
                raise
            except Exception:
                with contextlib.suppress(ModelBusError):
                    await self._bus.publish(msg.reply, b"-NAK")
                raise
        # Now its record says what became of it.
        await self._bus.publish(msg.reply, b"+ACK")

    async def _hand_on(self, msg: Msg, task: IndexFile) -> None:
        """This gateway stops. A task that is given back is delivered once more, which counts as an end by it; a new one does not."""
        try:
            async with asyncio.timeout(_HAND_ON_S):
                await self._records.enqueue_task(task, again=f".{msg.reply}")
                await self._bus.publish(msg.reply, b"+ACK")
        except (ModelBusError, TimeoutError):
            with contextlib.suppress(ModelBusError):
                await self._bus.publish(msg.reply, b"-NAK")

    @contextlib.asynccontextmanager
    async def _in_progress(self, msg: Msg) -> AsyncIterator[None]:
        """The queue is told again and again that somebody works on it."""

        async def tell() -> None:
            while True:
                await asyncio.sleep(_PROGRESS_S)
                with contextlib.suppress(ModelBusError):
                    await self._bus.publish(msg.reply, b"+WPI")

        telling = asyncio.create_task(tell(), name="indexing-progress")
        try:
            yield
        finally:
            telling.cancel()

    async def _index(self, task: IndexFile, begun: int) -> None:
        try:
            record = await self._records.file(task.store, task.file)
            store = await self._records.store(task.store)
        except NotFound:
            return  # it was taken out meanwhile
        if (record.revision, record.status) != (task.revision, "in_progress"):
            return
        chunks = self._store_of(store)
        try:
            if begun >= _MOST_ENDED:
                raise ModelBusError(f"it was begun {begun} times, and whoever had begun it was ended")
            usage = await self._patiently(chunks, record)
        except ModelBusError as error:
            code, message = _what_failed(error), error.message
            log.warning("%s in %s: %s", task.file, task.store, message)
            with contextlib.suppress(ModelBusError):  # what is left of it is no reason to try it again
                await chunks.delete(filter=_of(record))
            await self._settle(
                record, lambda it: msgspec.structs.replace(it, status="failed", error_code=code, error=message)
            )
            return
        settled = await self._settle(
            record, lambda it: msgspec.structs.replace(it, status="completed", usage_bytes=usage)
        )
        if settled is None or settled.status != "completed":  # taken out or cancelled in the meantime
            await chunks.delete(filter=_of(record))
        elif settled.attributes != record.attributes:
            await rewrite_attributes(chunks, settled)

    async def _settle(
        self, record: VectorStoreFileRecord, change: Callable[[VectorStoreFileRecord], VectorStoreFileRecord]
    ) -> VectorStoreFileRecord | None:
        """Writes down how it ended; None if it is not there any more, or another time."""

        def still(found: VectorStoreFileRecord) -> VectorStoreFileRecord | None:
            same = (found.revision, found.status) == (record.revision, "in_progress")
            return change(found) if same else None

        try:
            settled = await self._records.change_file(record.store, record.file, still)
        except NotFound:
            return None
        return settled if settled.revision == record.revision else None

    async def _patiently(self, store: AsyncStore, record: VectorStoreFileRecord) -> int:
        """Tries again while the search service or the embedding model is away; what is written twice is the same."""
        now = asyncio.get_running_loop().time
        until, pause_s = now() + _PATIENCE_S, 1.0
        while True:
            try:
                return await self._write(store, record)
            except ModelBusError as error:
                if not error.retryable or now() + pause_s > until:
                    raise
                log.info("%s in %s waits: %s", record.file, record.store, error.message)
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, 30.0)

    async def _write(self, store: AsyncStore, record: VectorStoreFileRecord) -> int:
        """The file's chunks are in the store, and nothing else of it. Returns their bytes."""
        chunks = await self._chunks(record)
        old = {chunk.id: chunk for chunk in await store.get([chunk.id for chunk in chunks], vectors=True)}
        attributes = stored_attributes(record)
        chunks = [
            msgspec.structs.replace(
                chunk, attributes={**attributes, **ours(chunk.attributes)},
                # The same text has the same vector.
                vector=old[chunk.id].vector if chunk.id in old else b"",
            )
            for chunk in chunks
        ]  # fmt: skip
        await store.upsert(chunks, lane="lo")
        left = {"type": "ne", "key": REVISION, "value": record.revision}
        await store.delete(filter={"type": "and", "filters": [_of_file(record), left]})
        return sum(len(chunk.text.encode()) for chunk in chunks)

    async def _chunks(self, record: VectorStoreFileRecord) -> Sequence[Chunk]:
        file = await self._files.get(record.file)
        check_size(file.size)
        data = b"".join([piece async for piece in self._files.content(file)])
        chunks = await self._reader.read(file.filename, file.id, data, record.chunking)
        if not chunks:
            raise InvalidRequest("it has no text")
        return chunks


async def rewrite_attributes(store: AsyncStore, record: VectorStoreFileRecord) -> None:
    """Gives the chunks of a file the attributes that its record has."""
    attributes = stored_attributes(record)
    for chunk in await chunks_of_file(store, record, vectors=True):
        places = {key: value for key, value in chunk.attributes.items() if key.startswith(OURS)}
        await store.write_as_it_is([msgspec.structs.replace(chunk, attributes={**places, **attributes})])


async def chunks_of_file(store: AsyncStore, record: VectorStoreFileRecord, *, vectors: bool = False) -> list[Chunk]:
    """In their order."""
    found: list[Chunk] = []
    while True:
        after = {"type": "gt", "key": "$ordinal", "value": found[-1].ordinal if found else -1}
        page = await store.find(
            filter={"type": "and", "filters": [_of_file(record), after]}, sort="$ordinal", limit=_PAGE
        )
        found += await store.get([chunk.id for chunk in page], vectors=True) if vectors else page
        if len(page) < _PAGE:
            return found


def _of_file(record: VectorStoreFileRecord) -> dict[str, object]:
    return {"type": "eq", "key": "$file_id", "value": record.file}


def _of(record: VectorStoreFileRecord) -> dict[str, object]:
    """What this revision of the file has written."""
    revision = {"type": "eq", "key": REVISION, "value": record.revision}
    return {"type": "and", "filters": [_of_file(record), revision]}


def _what_failed(error: ModelBusError) -> FileErrorCode:
    if isinstance(error, MissingExtra):
        return "unsupported_file"
    return "invalid_file" if isinstance(error, InvalidRequest | NotFound) else "server_error"
