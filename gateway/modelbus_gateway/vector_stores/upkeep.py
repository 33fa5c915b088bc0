"""What is done now and then, by one gateway for all: stores and files that have expired go, tasks that were never queued are, what was left half made goes."""

from __future__ import annotations

import asyncio
import logging

from modelbus_broker.errors import Conflict, ModelBusError

from ..files.store import FileStore
from .records import has_expired, now_ms
from .stores import VectorStores

log = logging.getLogger(__name__)

EVERY_S = 600
#: A record whose task is not in the queue: its gateway was killed between the two.
_FORGOTTEN_MS = 900_000


async def keep_up(stores: VectorStores, files: FileStore) -> None:
    """Does it for as long as it runs."""
    while True:
        try:
            await stores.records.bucket.create("upkeep", b"1", ttl_s=EVERY_S - 10)
            await once(stores, files)
        except Conflict:
            log.debug("another gateway does the upkeep of files")
        except (ModelBusError, TimeoutError) as error:
            log.info("upkeep of files: %s", error or "the bus does not answer")
        except Exception:
            log.exception("upkeep of files failed")
        await asyncio.sleep(EVERY_S)


async def once(stores: VectorStores, files: FileStore, *, forgotten_ms: int = _FORGOTTEN_MS) -> None:
    """Does it now."""
    await files.forget_orphans()
    before_ms = now_ms() - forgotten_ms
    for file in await stores.records.files():
        if file.status == "in_progress" and file.created_ms < before_ms:
            # One that is being indexed after all is found done by whoever takes this task.
            await stores.records.enqueue(file, again=f".{now_ms() // (EVERY_S * 1000)}")
    await stores.forget_unmade(before_ms)
    for store in await stores.records.stores():
        if has_expired(store):
            await stores.chunks(store).delete(everything=True)
