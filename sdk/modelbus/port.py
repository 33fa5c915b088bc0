"""What a client needs of whatever carries its questions to models: the bus, or a model in this process."""

from __future__ import annotations

from collections.abc import AsyncIterator
from types import TracebackType
from typing import Protocol, Self

from modelbus_broker.asking import CallOptions
from modelbus_broker.calls import Answer
from modelbus_broker.messages import Task


class Answering(Protocol):
    """One question that was asked. Leaving ``async with`` before the end takes it back."""

    @property
    def id(self) -> str: ...

    async def batch(self) -> list[Answer]:
        """All frames that are ready, at least one; after ``Done`` there are no more.

        Raises:
            ModelBusError: the request failed, was cancelled or ran out of time.
        """
        ...

    def batches(self) -> AsyncIterator[list[Answer]]:
        """Yields what :meth:`batch` returns until ``Done`` has come. Raises what it raises."""
        ...

    async def cancel(self) -> None:
        """Takes the question back."""
        ...

    async def __aenter__(self) -> Self: ...

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None, /
    ) -> None: ...


class Publishing(Protocol):
    """Takes questions; ``modelbus_broker.publisher.Publisher`` puts them on the bus."""

    async def publish(self, model: str, task: Task, options: CallOptions | None = None) -> Answering:
        """Asks, for a caller who reads the answer now."""
        ...

    async def submit(self, model: str, task: Task, options: CallOptions | None = None) -> Answering:
        """Asks, and returns when the question cannot be lost any more."""
        ...
