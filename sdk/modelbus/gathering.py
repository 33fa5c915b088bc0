"""Many coroutines, so many at the same time."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Sequence
from typing import Any, TypeVar

T = TypeVar("T")


async def gathered(work: Sequence[Coroutine[Any, Any, T]], at_once: int) -> list[T]:
    """The results in their order; so many run at the same time. The first error ends the others and is raised."""
    gate = asyncio.Semaphore(at_once)

    async def one(coroutine: Coroutine[Any, Any, T]) -> T:
        async with gate:
            return await coroutine

    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(one(coroutine)) for coroutine in work]
    except ExceptionGroup as errors:
        raise errors.exceptions[0] from errors
    finally:
        for coroutine in work:
            coroutine.close()  # those that never began
    return [task.result() for task in tasks]
