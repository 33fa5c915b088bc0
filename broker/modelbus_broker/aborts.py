"""Requests that were taken back, until the workers that had them say that their engines have let go."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable

from .errors import RequestCancelled
from .messages import Failed, Frame

#: A worker that has said nothing for so long says no more.
KEPT_S = 60.0


class _Abort:
    __slots__ = ("begun", "model", "over")

    def __init__(self, model: str) -> None:
        self.model = model
        self.begun = time.monotonic()
        self.over: asyncio.Future[None] | None = None


class Aborts:
    """The aborts of one publisher.

    Attributes:
        observe: told the model and the seconds of each abort, from the moment the publisher took the request back to
            the worker's last word on it. Requests that no worker had are not aborts.
    """

    def __init__(self) -> None:
        self.observe: Callable[[str, float], None] = _nothing
        self._open: dict[str, _Abort] = {}

    def begun(self, request_id: str, model: str) -> None:
        """The request is being taken back."""
        self._open.setdefault(request_id, _Abort(model))

    def ended(self, frame: Frame) -> None:
        """The last frame of a request that nobody waits for has come."""
        abort = self._open.pop(frame.id, None)
        if abort is None:
            return
        if isinstance(frame, Failed) and frame.code == RequestCancelled.code:
            self.observe(abort.model, time.monotonic() - abort.begun)
        if abort.over is not None and not abort.over.done():
            abort.over.set_result(None)

    async def wait(self, request_id: str, timeout_s: float) -> bool:
        """Whether the worker has said its last word within the time."""
        abort = self._open.get(request_id)
        if abort is None:
            return True
        if abort.over is None:
            abort.over = asyncio.get_running_loop().create_future()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await asyncio.shield(abort.over)
        return abort.over.done()

    def sweep(self) -> None:
        """Forgets what was never heard of again: it was still queued, or its worker is gone."""
        if not self._open:
            return
        old = time.monotonic() - KEPT_S
        for request_id in [key for key, abort in self._open.items() if abort.begun < old]:
            del self._open[request_id]


def _nothing(model: str, seconds: float) -> None:
    """Nobody counts."""
