"""Answers that are read while they are written."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine, Iterator
from typing import Any, Self, TypeVar

from modelbus_broker.errors import PromptError

from ..model_client import ModelClient
from ..structure import Result
from .cuts import Cut
from .running import RenderedCall, run

T = TypeVar("T")
U = TypeVar("U")

#: Renders the call and finds the client for it, on the loop that will read the stream.
Start = Callable[[], Coroutine[Any, Any, tuple[RenderedCall, ModelClient]]]


class AsyncStream(AsyncIterator[T]):
    """What a prompt function gives that returns an ``AsyncIterator``.

    The request is made when the first item is asked for. Leaving ``async with`` early takes it back; so does
    cancelling the task that reads.
    """

    def __init__(self, start: Start, cut: Cut[T]) -> None:
        self._results: list[Result[Any]] = []
        # Not a method: nothing that runs may hold the stream, so that one which is dropped (a loop that was left with
        # `break`) is taken back there and then, and not when the cyclic collector comes by.
        self._items = _read(start, cut, self._results)

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> T:
        return await anext(self._items)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Takes the request back if it still runs."""
        await self._items.aclose()

    @property
    def result(self) -> Result[Any]:
        """The whole answer, with its usage.

        Raises:
            PromptError: it has not been read to its end.
        """
        if not self._results:
            raise PromptError("the stream has not been read to its end: its result is not known yet")
        return self._results[0]


class Stream(Iterator[T]):
    """What a prompt function gives that returns an ``Iterator``.

    The request is made when the first item is asked for. Leaving ``with`` early takes it back.
    """

    def __init__(self, stream: AsyncStream[T], run: Callable[[Coroutine[Any, Any, Any]], Any]) -> None:
        """``run`` waits for a coroutine on the loop of the stream's connection."""
        self._stream = stream
        self._run = run

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> T:
        try:
            item: T = self._run(_following(self._stream))
        except _End:
            raise StopIteration from None
        return item

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Takes the request back if it still runs."""
        self._run(self._stream.aclose())

    @property
    def result(self) -> Result[Any]:
        """See ``AsyncStream.result``."""
        return self._stream.result


async def _read(start: Start, cut: Cut[T], results: list[Result[Any]]) -> AsyncGenerator[T]:
    """The items of a call, and at their end its result.

    The call runs in a task of its own, through all that is laid around it. What it raises is raised when all that came
    before has been given out.
    """
    call, client = await start()
    pieces: asyncio.Queue[str | None] = asyncio.Queue()
    task = asyncio.create_task(run(call, client, pieces.put_nowait), name=f"stream of {call.name}")
    task.add_done_callback(lambda _: pieces.put_nowait(None))
    try:
        came = False
        while (piece := await pieces.get()) is not None:
            came = True
            for item in cut.feed(piece):
                yield item
        result = await task
        if not came:  # who answered does not stream: a cache for instance
            for item in cut.feed(result.raw):
                yield item
        for item in cut.finish(result):
            yield item
        results.append(result)
    finally:
        if not task.done():
            task.cancel()
            await asyncio.wait([task])
        if not task.cancelled():
            task.exception()  # raised above, or less telling than what was


class _End(Exception):
    """An iterator has ended; ``StopIteration`` cannot leave a coroutine."""


async def _following(items: AsyncIterator[U]) -> U:
    try:
        return await anext(items)
    except StopAsyncIteration:
        raise _End from None
