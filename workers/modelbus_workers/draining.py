"""How a worker stops: it takes nothing new, finishes what it can and hands over what is left.

Handing over is the way of a lost worker without the crash: the last frame of the run tells the publisher, which has
all frames before it, to publish the next attempt with the tokens so far. Nothing is left to a timeout.
"""

from __future__ import annotations

import asyncio
import logging
import os
import threading
from collections.abc import Callable, Iterable

from modelbus_broker import names

from .execution import Execution
from .intake import Intake
from .job import DRAIN_END_S
from .liveness import Liveness

log = logging.getLogger(__name__)

#: An engine has so long to let go of a run.
ABORT_S = 2.0
#: Publishers have so long to confirm the last frames.
CONFIRM_S = 3.0


def left_s(now: float, asked_at: float, drain_s: float, deadlines: Iterable[float]) -> float:
    """How long running requests may go on.

    Args:
        now: event-loop time, as the other two.
        asked_at: when the worker was told to stop; 0: it may finish what it has.
        drain_s: the time for finishing, from then on.
        deadlines: of what runs.
    """
    if asked_at:
        return asked_at + drain_s - now
    return max(deadlines, default=now) + ABORT_S - now


class Draining:
    """What a worker was told about its end, and how it gets there."""

    def __init__(
        self, intake: Intake, liveness: Liveness, drain_s: float, exit_after: Callable[[float], object]
    ) -> None:
        self._intake = intake
        self._liveness = liveness
        self._drain_s = drain_s
        self._exit_after = exit_after
        self._asked_at = 0.0
        self.begun = asyncio.Event()

    def retire(self) -> None:
        """Nothing new is taken; all that runs is finished, at most to its deadline."""
        self.begun.set()

    def stop(self) -> None:
        """Nothing new is taken; what runs has ``drain_s``, then it is handed over and the process ends."""
        if not self._asked_at:
            self._asked_at = asyncio.get_running_loop().time()
            self._exit_after(self._drain_s + DRAIN_END_S)
        self.begun.set()

    async def run(self) -> None:
        """Returns when nothing is left in the worker's hands. The worker has stopped pulling before."""
        executions = self._intake.executions
        # What the engine has not seen goes to another worker at once.
        waiting = [execution for execution in executions.values() if execution.state == "held"]
        for execution in waiting:
            execution.hand_over()
        now = asyncio.get_running_loop().time
        while executions:
            left = left_s(now(), self._asked_at, self._drain_s, (e.deadline for e in executions.values()))
            if left <= 0:
                break
            await asyncio.wait([e.task for e in executions.values() if e.task], timeout=min(left, 0.5))
        self._exit_after(DRAIN_END_S)
        await self._hand_over(list(executions.values()), waiting)

    async def _hand_over(self, left: list[Execution], handed: list[Execution]) -> None:
        for execution in left:
            execution.hand_over()
        if tasks := [execution.task for execution in left if execution.task]:
            await asyncio.wait(tasks, timeout=ABORT_S)
        for execution in list(self._intake.executions.values()):
            log.warning("the engine does not let go of request %s", execution.request.id)
            self._intake.hand_over_now(execution)
        self._intake.outbox.flush()
        await self._liveness.settle(CONFIRM_S)
        for execution in [*left, *handed]:
            key = names.run_key(execution.request.id, execution.run)
            if execution.handed_over and key in self._intake.outbox.rings:
                # Its publisher is gone or cut off. Another worker gets the message now, not after its ack wait.
                await self._intake.give_again(execution)
        await self._intake.endings.settle(ABORT_S)


def exit_after(seconds: float) -> None:
    """Ends the process after this time, even when an engine keeps the event loop for itself."""

    def leave() -> None:
        log.error("the worker did not come to its end in time: leaving what hangs behind")
        os._exit(1)

    timer = threading.Timer(seconds, leave)
    timer.daemon = True
    timer.start()
