"""When a worker is judged to hang."""

from __future__ import annotations

import asyncio
import subprocess
import sys

import pytest
from modelbus_workers.stall import PREFILL_TIMES, Sample, StallJudge, StallWatch

STALL_S = 60.0

#: A regular expression that holds the interpreter's lock for years.
GREEDY = """
import asyncio, re
from modelbus_workers.stall import Sample, StallWatch

async def main() -> None:
    watch = StallWatch(0.5, counts_steps=True, sample=lambda turn: Sample(turn, turn, 1, 0), say=print)
    watching = asyncio.create_task(watch.run())
    await asyncio.sleep(1.5)  # all is well
    print("now", flush=True)
    re.match("(a+)+$", "a" * 60 + "b")

asyncio.run(main())
"""


def look(judge: StallJudge, seconds: int, *, steps: int = 0, turns: int = 1, running: int = 1, reading: int = 0) -> str:
    """What the judge says after so many looks, a second apart; ``turns`` and ``steps`` are per second."""
    why = ""
    for second in range(seconds):
        why = why or judge.look(Sample(1 + second * turns, 7 + second * steps, running, reading), 1.0)
    return why


def test_an_engine_without_a_step_while_requests_run_hangs() -> None:
    assert look(StallJudge(STALL_S, counts_steps=True), 61) == ""
    assert "no step for 61 s while 2 request(s) ran" in look(StallJudge(STALL_S, counts_steps=True), 63, running=2)


def test_an_engine_that_steps_or_has_nothing_to_do_does_not_hang() -> None:
    assert look(StallJudge(STALL_S, counts_steps=True), 10_000, steps=1) == ""
    assert look(StallJudge(STALL_S, counts_steps=True), 10_000, running=0) == ""


def test_the_time_begins_when_there_is_something_to_do() -> None:
    judge = StallJudge(STALL_S, counts_steps=True)
    assert look(judge, 1000, running=0) == ""
    assert look(judge, 60) == ""
    assert look(judge, 3) != ""


def test_reading_a_prompt_may_take_longer() -> None:
    seconds = int(STALL_S * PREFILL_TIMES)
    assert look(StallJudge(STALL_S, counts_steps=True), seconds, running=2, reading=1) == ""
    assert look(StallJudge(STALL_S, counts_steps=True), seconds + 3, running=2, reading=1) != ""


def test_an_engine_that_does_not_count_is_not_judged_by_it_but_its_event_loop_is() -> None:
    assert look(StallJudge(STALL_S, counts_steps=False), 10_000) == ""
    assert "event loop has stood still" in look(StallJudge(STALL_S, counts_steps=False), 63, turns=0, running=0)


def test_a_process_that_was_stopped_as_a_whole_is_not_judged_by_that_time() -> None:
    judge = StallJudge(STALL_S, counts_steps=True)
    assert judge.look(Sample(1, 1, 1, 0), 1.0) == ""
    # The watch counts at most twice its interval for one look, however long ago the last one was.
    assert judge.look(Sample(1, 1, 1, 0), 2.0) == ""


async def test_a_time_of_0_looks_at_nothing() -> None:
    watch = StallWatch(0.0, counts_steps=True, sample=lambda turn: Sample(turn, 0, 1, 0), say=print)
    async with asyncio.timeout(20):
        await watch.run()


@pytest.mark.timeout(60)
async def test_code_that_holds_the_interpreter_s_lock_is_ended_too_and_the_log_says_where_it_was() -> None:
    done = await asyncio.to_thread(
        subprocess.run, [sys.executable, "-c", GREEDY], capture_output=True, text=True, timeout=50
    )
    assert done.stdout == "now\n"
    assert done.returncode == 1
    assert "Timeout" in done.stderr and "in match" in done.stderr


def test_an_engine_that_says_it_is_broken_ends_its_worker_at_once() -> None:
    judge = StallJudge(STALL_S, counts_steps=False)
    assert judge.look(Sample(1, 0, 0, 0), 1.0) == ""
    assert judge.look(Sample(2, 0, 0, 0, "its core has died"), 1.0) == "the engine is broken: its core has died"
