"""Jobs for callers who are not asynchronous; they share the connection of ``modelbus.connect_cluster``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, TypeVar

from modelbus_broker.jobs import JobStatus

from ..answer_types import ChatAnswer
from ..client import Client
from ..shared import background, connected
from .job import Job

T = TypeVar("T")


class BlockingJob(Generic[T]):
    """A job, waited for with :meth:`result`. Made by :func:`job` and by ``submit``.

    It needs neither the program that submitted it nor this one: its id is enough to find it from anywhere.
    """

    def __init__(self, job_id: str, find: Callable[[Client, str], Job[T]]) -> None:
        self.id = job_id
        self._find = find

    def __repr__(self) -> str:
        return f"BlockingJob({self.id!r})"

    def result(self, timeout_s: float | None = None) -> T:
        """The answer, as soon as there is one; see :meth:`modelbus.jobs.Job.result` for the errors."""
        return background.run(self._job().result(timeout_s))

    def status(self) -> JobStatus:
        """How it is now. Raises NotFound."""
        return background.run(self._job().status())

    def cancel(self) -> JobStatus:
        """Takes it back, and says how it is then: one that has ended stays as it is. Raises NotFound."""
        return background.run(self._job().cancel())

    def _job(self) -> Job[T]:
        return self._find(connected(), self.id)


def job(job_id: str) -> BlockingJob[ChatAnswer]:
    """The job of this id, whoever submitted it, for plain programs: ``modelbus.job(id).result()``.

    Whether there is one shows when it is asked for something.
    """
    return BlockingJob(job_id, Client.job)
