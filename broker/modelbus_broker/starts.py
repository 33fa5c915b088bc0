"""How often attempts were started, in the bucket ``runs``: of those whose publisher may not be there to count lost runs."""

from __future__ import annotations

import logging

from . import names
from .buckets import Bucket, Entry
from .connection import Bus
from .errors import Conflict, ModelBusError

log = logging.getLogger(__name__)


class Starts:
    """Reads and counts them."""

    def __init__(self, bus: Bus) -> None:
        self._bucket = Bucket(bus, names.BUCKET_RUNS)

    async def read(self, request_id: str, attempt: int) -> int:
        """As far as they were counted. Raises BusUnavailable."""
        return _count(await self._bucket.get(names.message_id(request_id, attempt)))

    async def count(self, request_id: str, attempt: int, by: int = 1) -> None:
        """Counts a start, or with -1 takes one back that ended in good order. What cannot be counted is logged."""
        key = names.message_id(request_id, attempt)
        for _ in range(5):
            try:
                entry = await self._bucket.get(key)
                counted = str(max(0, _count(entry) + by)).encode()
                await self._bucket.update(key, counted, entry.seq if entry else 0)
                return
            except Conflict:
                continue
            except ModelBusError as error:
                log.warning("the start of %s cannot be counted: %s", request_id, error.message)
                return


def _count(entry: Entry | None) -> int:
    return int(entry.value) if entry is not None and not entry.deleted else 0
