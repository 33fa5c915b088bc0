"""An engine that hangs while its process lives: found by its step counter, and the process ends, so that its node starts
another. So it does when the engine says itself that it is broken.

A thread looks, because what hangs may keep the event loop for itself. What keeps Python's interpreter lock for itself too
is ended by ``faulthandler`` after twice the time; it needs no lock, and writes into the log where every thread stands.
"""

from __future__ import annotations

import asyncio
import faulthandler
import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Iterable

import msgspec

from .engines.base import Engine
from .execution import Execution
from .job import EXIT_HUNG

log = logging.getLogger(__name__)

#: While a running request has no output yet its prompt is being read, and one step may take so many times as long.
PREFILL_TIMES = 5
#: The record has so long to say why the worker ends.
_WORDS_S = 1.0


class Sample(msgspec.Struct, frozen=True):
    """How the worker was, seen from its event loop."""

    turn: int  #: counts the samples: stands still when the event loop does
    steps: int  #: of the engine
    running: int  #: requests that the engine has
    reading: int  #: those of them that have no output yet
    broken: str = ""  #: why the engine can serve nothing any more, in its own words


class StallJudge:
    """Decides whether an engine hangs or is broken. Pure: no clock, no threads.

    Args:
        stall_s: the time without a step.
        counts_steps: whether the engine counts its steps; if not, only the event loop is judged.
    """

    def __init__(self, stall_s: float, *, counts_steps: bool) -> None:
        self._stall_s = stall_s
        self._counts_steps = counts_steps
        self._last = Sample(-1, -1, 0, 0)
        self._loop_s = self._engine_s = 0.0

    def look(self, now: Sample, passed_s: float) -> str:
        """Why the worker must end, in words; "" as a rule.

        Args:
            now: the newest sample that there is.
            passed_s: since the last look. A process that stood still as a whole must not count that as time.
        """
        if now.broken:
            return f"the engine is broken: {now.broken}"
        last, self._last = self._last, now
        self._loop_s = self._loop_s + passed_s if now.turn == last.turn else 0.0
        works = now.steps != last.steps or not now.running or not last.running
        self._engine_s = 0.0 if works else self._engine_s + passed_s
        if self._loop_s > self._stall_s:
            return f"the event loop has stood still for {self._loop_s:.0f} s"
        if self._counts_steps and self._engine_s > self._stall_s * (PREFILL_TIMES if now.reading else 1):
            return f"the engine has made no step for {self._engine_s:.0f} s while {now.running} request(s) ran"
        return ""


def sample_of(turn: int, engine: Engine, executions: Iterable[Execution]) -> Sample:
    """What there is to see."""
    running = [execution for execution in executions if execution.state == "running"]
    reading = sum(not execution.has_output for execution in running)
    return Sample(turn, engine.steps, len(running), reading, engine.broken)


class StallWatch:
    """Looks at a worker from a thread and ends the process when its engine hangs.

    Args:
        stall_s: see ``StallJudge``; 0 looks at nothing.
        sample: called on the event loop, with the number of the turn.
        say: called on the event loop, if that still turns, with the reason, before the process ends.
    """

    def __init__(
        self, stall_s: float, *, counts_steps: bool, sample: Callable[[int], Sample], say: Callable[[str], object]
    ) -> None:
        self._stall_s = stall_s
        self._judge = StallJudge(stall_s, counts_steps=counts_steps)
        self._interval_s = min(1.0, stall_s / 10)
        self._sample = sample
        self._say = say
        self._newest = Sample(0, 0, 0, 0)
        self._stopped = threading.Event()
        self._loop: asyncio.AbstractEventLoop | None = None

    async def run(self) -> None:
        """Watches until it is cancelled."""
        if not self._stall_s:
            return
        self._loop = asyncio.get_running_loop()
        thread = threading.Thread(target=self._watch, name="stall watch", daemon=True)
        turn = 0
        try:
            while True:
                turn += 1
                self._newest = self._sample(turn)
                if turn == 1:
                    thread.start()
                await asyncio.sleep(self._interval_s)
        finally:
            self._stopped.set()
            faulthandler.cancel_dump_traceback_later()

    def _watch(self) -> None:
        last = time.monotonic()
        while not self._stopped.wait(self._interval_s):
            faulthandler.dump_traceback_later(2 * self._stall_s, exit=True)
            now = time.monotonic()
            why = self._judge.look(self._newest, min(now - last, 2 * self._interval_s))
            last = now
            if why:
                self._end(why)
        faulthandler.cancel_dump_traceback_later()

    def _end(self, why: str) -> None:
        log.error("%s: this worker ends, its node starts another; where its threads stand:", why)
        faulthandler.dump_traceback()
        assert self._loop is not None
        self._loop.call_soon_threadsafe(self._say, why)
        time.sleep(_WORDS_S)
        # The node shows the last line.
        sys.stderr.write(f"the worker ended itself: {why}\n")
        sys.stderr.flush()
        os._exit(EXIT_HUNG)
