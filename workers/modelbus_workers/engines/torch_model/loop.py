"""The thread that runs all requests: one forward pass for all, a step of each in turn, and one wake-up of the event loop per round."""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
from collections.abc import AsyncGenerator, Callable, Iterator

from modelbus_broker.errors import EngineFailed, ModelBusError

from ..base import Output
from .generation import Stepper
from .loading import is_out_of_memory
from .work import Work

log = logging.getLogger(__name__)


class _End:
    """The request is complete."""


class _Errand:
    """Something that is done once, between two rounds."""

    def __init__(self, function: Callable[[], object], done: asyncio.Future[None]) -> None:
        self.function, self.done = function, done


_Item = list[Output] | ModelBusError | type[_End]


class _Request:
    def __init__(self, work: Work) -> None:
        self.work = work
        self.items: asyncio.Queue[_Item] = asyncio.Queue()
        #: Set by the event loop, read by the thread before each step.
        self.aborted = False
        self.steps: Iterator[list[Output]] | None = None


class GenerationLoop:
    """Runs work on a model in one thread of its own."""

    def __init__(self, stepper: Stepper) -> None:
        self._stepper = stepper
        self._inbox: queue.SimpleQueue[_Request | _Errand | None] = queue.SimpleQueue()
        self._running: list[_Request] = []
        self._loop = asyncio.get_running_loop()
        self._thread = threading.Thread(target=self._run, name="generation", daemon=True)
        self._thread.start()

    @property
    def running(self) -> int:
        """Requests that hold a cache."""
        return len(self._running)

    async def outputs(self, work: Work) -> AsyncGenerator[list[Output]]:
        """What the steps give, all that is ready at a time. Closing the iterator takes the request out of the loop."""
        request = _Request(work)
        self._inbox.put(request)
        try:
            while True:
                item = await request.items.get()
                if isinstance(item, list):
                    yield item
                elif isinstance(item, ModelBusError):
                    raise item
                else:
                    return
        finally:
            request.aborted = True

    async def call(self, function: Callable[[], object]) -> None:
        """Runs something in the thread, between two rounds. Raises what it raises."""
        errand = _Errand(function, self._loop.create_future())
        self._inbox.put(errand)
        await errand.done

    async def close(self) -> None:
        """Stops the thread after the step that it is in."""
        self._inbox.put(None)
        await asyncio.to_thread(self._thread.join)

    def _run(self) -> None:
        import torch

        with torch.inference_mode():
            while self._take_new():
                self._round()
        self._running = []

    def _take_new(self) -> bool:
        """Takes in what is new, waiting for it if nothing runs. False: the loop is closed."""
        while not self._running or not self._inbox.empty():
            request = self._inbox.get()
            if request is None:
                return False
            if isinstance(request, _Errand):
                self._run_errand(request)
                continue
            request.steps = self._stepper.answer(request.work)
            self._running.append(request)
        return True

    def _run_errand(self, errand: _Errand) -> None:
        try:
            errand.function()
        except Exception as error:
            self._loop.call_soon_threadsafe(_end_errand, errand, error)
        else:
            self._loop.call_soon_threadsafe(_end_errand, errand, None)

    def _round(self) -> None:
        self._stepper.read_wanted()
        ready: list[tuple[_Request, _Item]] = []
        for request in list(self._running):
            item = self._step(request)
            if item is not None and not isinstance(item, list):
                self._running.remove(request)
                request.steps = None
            if item:
                ready.append((request, item))
        if ready:
            self._loop.call_soon_threadsafe(_deliver, ready)

    def _step(self, request: _Request) -> _Item | None:
        assert request.steps is not None
        if request.aborted:
            return _End
        try:
            return next(request.steps, _End)
        except ModelBusError as error:
            return error
        except Exception as error:
            log.exception("a step failed")
            return _failure(error)


def _end_errand(errand: _Errand, error: Exception | None) -> None:
    if errand.done.done():
        return  # whoever waited for it has gone
    if error is None:
        errand.done.set_result(None)
    else:
        errand.done.set_exception(error)


def _deliver(ready: list[tuple[_Request, _Item]]) -> None:
    for request, item in ready:
        request.items.put_nowait(item)


def _failure(error: Exception) -> EngineFailed:
    if is_out_of_memory(error):
        import torch

        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return EngineFailed(f"out of memory: {error}")
    return EngineFailed(f"{type(error).__name__}: {error}")
