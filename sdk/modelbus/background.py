"""One event loop on a thread of its own, for callers who are not asynchronous."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine
from concurrent.futures import CancelledError, Future
from typing import Any, TypeVar

T = TypeVar("T")

_CANCEL_S = 3.0


class BackgroundLoop:
    """Runs coroutines for other threads. The thread is a daemon: it never keeps a program alive."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None

    def submit(self, coroutine: Coroutine[Any, Any, T]) -> Future[T]:
        """Starts a coroutine from another thread. Cancelling the future cancels it."""
        return asyncio.run_coroutine_threadsafe(coroutine, self._running())

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Waits for a coroutine's result. Ctrl-C cancels it, and gives it a moment to take its request back.

        Raises:
            RuntimeError: called on the loop's own thread, where waiting would never end.
        """
        if threading.current_thread() is self._thread:
            coroutine.close()
            raise RuntimeError(
                "a blocking modelbus call was made on modelbus' own event loop, for instance in a callback: "
                "use `modelbus.connect()` and await there"
            )
        return wait_for(self._running(), coroutine)

    def stop(self) -> None:
        """Ends the loop and its thread; the next ``run`` starts them again."""
        with self._lock:
            loop, thread = self._loop, self._thread
            self._loop = self._thread = None
        if loop is not None and thread is not None:
            loop.call_soon_threadsafe(loop.stop)
            thread.join()

    def _running(self) -> asyncio.AbstractEventLoop:
        with self._lock:
            if self._loop is None or self._thread is None or not self._thread.is_alive():
                # The thread is not alive either in a process that was forked from one that used the loop.
                self._loop = asyncio.new_event_loop()
                self._thread = threading.Thread(target=_serve, args=(self._loop,), name="modelbus", daemon=True)
                self._thread.start()
            return self._loop


def wait_for(loop: asyncio.AbstractEventLoop, coroutine: Coroutine[Any, Any, T]) -> T:
    """A coroutine's result, from a loop that runs in another thread; see ``BackgroundLoop.run``."""
    ended = threading.Event()
    future = asyncio.run_coroutine_threadsafe(_until_ended(coroutine, ended), loop)
    try:
        return future.result()
    except CancelledError:
        raise RuntimeError("the call was cancelled: modelbus was disconnected meanwhile") from None
    except BaseException:
        # The thread dies with the program, which may end now.
        if future.cancel():
            ended.wait(_CANCEL_S)
        raise


async def _until_ended(coroutine: Coroutine[Any, Any, T], ended: threading.Event) -> T:
    try:
        return await coroutine
    finally:
        ended.set()


def _serve(loop: asyncio.AbstractEventLoop) -> None:
    asyncio.set_event_loop(loop)
    try:
        loop.run_forever()
    finally:
        tasks = asyncio.all_tasks(loop)
        for task in tasks:
            task.cancel()
        loop.run_until_complete(asyncio.gather(*tasks, return_exceptions=True))
        loop.run_until_complete(loop.shutdown_asyncgens())
        loop.close()
