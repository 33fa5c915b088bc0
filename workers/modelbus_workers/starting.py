"""Whether a run may start: its publisher still wants it, nobody else runs it, and it is alone where it has to be."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable

from modelbus_broker.connection import Bus
from modelbus_broker.errors import DeadlineExceeded, ModelBusError
from modelbus_broker.starts import Starts

from .answers import AnswerKeeper
from .detached import runs_elsewhere
from .endings import Endings
from .execution import Execution
from .liveness import PUBLISHER_DEAD_S

log = logging.getLogger(__name__)

#: How long a publisher has to say whether a run shall count, and between two looks for one that is gone.
GO_WAIT_S = 0.3


class Starting:
    """What a worker's runs wait for before their engine gets them.

    Attributes:
        reach: tells a publisher what runs for it; False when nobody listens there.
    """

    def __init__(self, worker_id: str, bus: Bus, starts: Starts, answers: AnswerKeeper, endings: Endings) -> None:
        self._worker_id, self._bus = worker_id, bus
        self._starts, self._answers, self._endings = starts, answers, endings
        self.reach: Callable[[str], Awaitable[bool]] = _nobody
        #: The request that has this worker to itself, or waits for that, and what tells it that the others have gone.
        self._alone: Execution | None = None
        self._others_gone = asyncio.Event()

    @property
    def one_alone(self) -> bool:
        """A request has the worker to itself, or waits for that: nothing else may start."""
        return self._alone is not None

    def needs_all(self, execution: Execution, executions: int) -> None:
        """A request has to be alone; ``executions``: how many are here, itself included."""
        self._alone = execution
        self._others_gone.clear()
        if executions == 1:
            self._others_gone.set()

    def ended(self, execution: Execution, left: int) -> None:
        """A request is over; ``left``: how many are still here."""
        if self._alone is execution:
            self._alone = None
        elif self._alone is not None and left == 1:
            self._others_gone.set()

    def has_to_wait(self, execution: Execution) -> bool:
        """Something is to be done before the run may start; False for most."""
        request = execution.request
        kept = request.background or request.idempotency_key
        return bool(kept) or execution.asks or self._alone is execution

    async def may_start(self, execution: Execution) -> bool:
        """Waits until the run may start; False when another run counts.

        Raises:
            DeadlineExceeded: its time was up before it could be alone.
        """
        request = execution.request
        again = execution.pulled.delivery > 1
        if request.detached:
            if not await self._is_open(execution):
                return False
        elif execution.asks and not await self._is_wanted(execution):
            return False
        if self._alone is execution:
            try:
                async with asyncio.timeout_at(execution.deadline):
                    await self._others_gone.wait()
            except TimeoutError as error:
                raise DeadlineExceeded("its time was up before it could run alone in its worker") from error
        # Who publishes the next attempt counts the lost runs; these may lose their publisher and run on.
        if again or request.background or request.idempotency_key:
            await self._starts.count(request.id, request.attempt)
            execution.counted = True
        check_time(execution)
        return True

    async def _is_open(self, execution: Execution) -> bool:
        """Whether a job is still to be run: nobody else runs it, and it has not ended or been cancelled."""
        try:
            if execution.asks and await runs_elsewhere(self._bus, self._worker_id, execution.request.id):
                # Who runs it keeps the message in progress and acknowledges it.
                execution.counts = False
                return False
            if await self._answers.settled(execution.request.id):
                execution.counts = False
                self._endings.spawn(self._endings.answer(execution.pulled, b"+ACK"))
                return False
        except ModelBusError as error:
            log.warning("whether job %s is still open is not known now: %s", execution.request.id, error.message)
        return True

    async def _is_wanted(self, execution: Execution) -> bool:
        """Asks the publisher whether this run shall count.

        Where it is gone, a request that is to run to its end runs, and any other ends here: its client is gone too,
        perhaps with the whole answer, and one that comes back has it published anew.
        """
        execution.go = asyncio.get_running_loop().create_future()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(GO_WAIT_S):
                return await execution.go
        request = execution.request
        if request.background or request.idempotency_key:
            return True
        until = time.monotonic() + PUBLISHER_DEAD_S
        while not await self.reach(execution.ring.publisher):
            if time.monotonic() > until:
                # Nothing is said: whoever reads the frames later shall not take this for the end of the answer.
                execution.counts = False
                self._endings.spawn(self._endings.answer(execution.pulled, b"+TERM its publisher is gone"))
                return False
            await asyncio.sleep(GO_WAIT_S)
        await asyncio.sleep(0)  # if it answered that nobody wants this run, it ends here
        return execution.counts


def check_time(execution: Execution) -> None:
    """Work whose time was up while it was being prepared is not started. Raises DeadlineExceeded."""
    if asyncio.get_running_loop().time() > execution.deadline:
        raise DeadlineExceeded("the time of the request was up before the engine could have it")


async def _nobody(_publisher: str) -> bool:
    """Publishers are told of runs once the worker serves."""
    return False
