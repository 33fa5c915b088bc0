"""One job: a question whose answer is kept for whoever knows its id."""

from __future__ import annotations

from collections.abc import Callable, Generator
from typing import Any, Generic, TypeVar

from modelbus_broker.jobs import Ended, Jobs, JobStatus

T = TypeVar("T")


class Job(Generic[T]):
    """A job, waited for with ``await job`` or :meth:`result`. Made by ``client.submit`` and ``client.job``.

    It needs neither the program that submitted it nor this one: its id is enough to find it from anywhere.
    """

    def __init__(self, jobs: Jobs, job_id: str, read: Callable[[Ended], T]) -> None:
        self.id = job_id
        self._jobs, self._read = jobs, read

    def __repr__(self) -> str:
        return f"Job({self.id!r})"

    def __await__(self) -> Generator[Any, None, T]:
        return self.result().__await__()

    async def result(self, timeout_s: float | None = None) -> T:
        """The answer, as soon as there is one. Cancelling the task that waits does not cancel the job.

        Raises:
            NotFound: there is no such job (any more).
            TimeoutError: it has not ended within ``timeout_s``; it goes on.
            AnswerNotKept: it has ended, and how is not known any more.
            RequestCancelled: somebody has cancelled it.
            ModelBusError: what it ended with, in the engine's or the provider's words.
        """
        return self._read(await self._jobs.ended(self.id, timeout_s))

    async def status(self) -> JobStatus:
        """How it is now. Raises NotFound."""
        return await self._jobs.status(self.id)

    async def cancel(self) -> JobStatus:
        """Takes it back, whoever submitted it, and says how it is then: one that has ended stays as it is.

        Raises:
            NotFound: there is no such job (any more).
        """
        return await self._jobs.cancel(self.id)
