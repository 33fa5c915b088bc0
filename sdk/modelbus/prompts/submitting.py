"""Prompt functions as jobs: ``submit``, ``job``, ``batch`` and ``map``, blocking and not."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Generic, ParamSpec, TypeVar

from modelbus_broker.errors import PromptError
from modelbus_broker.jobs import KEPT_S, Ended, Jobs

from ..jobs import Batch, Job, Progress, Row
from ..jobs.blocking import BlockingJob
from ..shared import background, connected
from .base import Prompt
from .durable import BlockingBatch, RowArguments, arguments, batch, jobs_here, map_calls, reader_of, submit
from .llm import Target, refuse_in_loop
from .running import RenderedCall

P = ParamSpec("P")
R = TypeVar("R")


class _Durable(Prompt[P], Generic[P, R]):
    def _reader(self) -> Callable[[Ended], R]:
        """Of the answers of jobs.

        Raises:
            PromptError: the function gives something that no job has kept.
        """
        if self._reply.shape != "whole" or self._reply.result or self._reply.calls:
            raise PromptError(f"{self._declaration.name}: a job gives a whole value: no stream, no calls, no Result")
        return reader_of(self._output)


class Submitting(_Durable[P, R]):
    """Of a ``def``."""

    def submit(self, *args: P.args, **kwargs: P.kwargs) -> BlockingJob[R]:
        """Asks durably: returns when the question is on disk. ``job.result()`` gives the value here, and
        ``f.job(job.id).result()`` in any other program.

        Raises:
            PromptError: the call needs more than one request, or this process (tools).
            ModelNotFound, QueueFull, BusUnavailable: it is not in the queue.
        """
        self._check_waiting(self._target(args))
        call = self.render(*args, **kwargs)
        return self.job(background.run(submit(connected().jobs, call, self._reader())).id)

    def job(self, job_id: str) -> BlockingJob[R]:
        """The job of this id, whoever submitted it, whose answer becomes this function's value."""
        read = self._reader()
        return BlockingJob(job_id, lambda client, id: Job(client.jobs, id, read))

    def batch(self, rows: Iterable[RowArguments], *, name: str = "", kept_s: int = KEPT_S) -> BlockingBatch[R]:
        """Submits a job for each row, in lane lo.

        Args:
            rows: arguments of calls: a mapping has them by name, a tuple by position, anything else is the only one.
            name: under the same name the same rows are taken up and not asked again, also by another program.
            kept_s: seconds that the answers are kept, each from its end on.
        """
        calls, read = self._calls(rows), self._reader()
        return BlockingBatch(background.run(batch(connected().jobs, calls, read, name=name, kept_s=kept_s)))

    def map(
        self,
        rows: Iterable[RowArguments],
        *,
        concurrency: int = 64,
        progress: Callable[[Progress], None] | None = None,
        name: str = "",
        kept_s: int = KEPT_S,
    ) -> list[Row[R]]:
        """Asks all rows, in lane lo, at most ``concurrency`` at a time, and returns what became of each, in order: a row
        that fails has its error in its place. With a ``name`` a program that was killed goes on where it stopped.

        Args:
            progress: called after each row, in another thread.
        """
        calls, read = self._calls(rows), self._reader()
        mapping = map_calls(
            connected().jobs, calls, read, name=name, kept_s=kept_s, concurrency=concurrency, progress=progress
        )
        return background.run(mapping)

    def _calls(self, rows: Iterable[RowArguments]) -> list[RenderedCall]:
        """Templates and bodies of all rows run before the first is submitted."""
        calls = []
        for args, kwargs in map(arguments, rows):
            self._check_waiting(target := self._target(args))
            body = self._declaration.body(self._owner + args, kwargs)
            calls.append(self._rendered(target, self._messages(args, kwargs, body)))
        return calls

    def _check_waiting(self, target: Target) -> None:
        refuse_in_loop(self._declaration.name)
        if target.client is not None:
            raise PromptError(
                f"{self._declaration.name}: jobs of a `def` go over the connection that the process shares: name the model"
            )


class AsyncSubmitting(_Durable[P, R]):
    """Of an ``async def``."""

    async def submit(self, *args: P.args, **kwargs: P.kwargs) -> Job[R]:
        """Asks durably: returns when the question is on disk. ``await job`` gives the value; see ``PromptFunction.submit``."""
        read, target = self._reader(), self._target(args)
        return await submit(await jobs_here(target), await self._aio_rendered(target, args, kwargs), read)

    async def job(self, job_id: str) -> Job[R]:
        """The job of this id, whoever submitted it, whose answer becomes this function's value."""
        return Job(await jobs_here(self._target(())), job_id, self._reader())

    async def batch(self, rows: Iterable[RowArguments], *, name: str = "", kept_s: int = KEPT_S) -> Batch[R]:
        """See ``PromptFunction.batch``."""
        read = self._reader()
        jobs, calls = await self._calls(rows)
        return await batch(jobs, calls, read, name=name, kept_s=kept_s)

    async def map(
        self,
        rows: Iterable[RowArguments],
        *,
        concurrency: int = 64,
        progress: Callable[[Progress], None] | None = None,
        name: str = "",
        kept_s: int = KEPT_S,
    ) -> list[Row[R]]:
        """See ``PromptFunction.map``."""
        read = self._reader()
        jobs, calls = await self._calls(rows)
        return await map_calls(jobs, calls, read, name=name, kept_s=kept_s, concurrency=concurrency, progress=progress)

    async def _calls(self, rows: Iterable[RowArguments]) -> tuple[Jobs, list[RenderedCall]]:
        """Templates and bodies of all rows run before the first is submitted."""
        made = [arguments(row) for row in rows]
        calls = [await self._aio_rendered(self._target(args), args, kwargs) for args, kwargs in made]
        return await jobs_here(self._target(made[0][0] if made else ())), calls
