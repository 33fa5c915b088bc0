"""What a prompt function adds to the client's own call, alone and a thousand at once, and what it leaves behind."""

from __future__ import annotations

import asyncio
import gc
import statistics
import time
from collections.abc import Awaitable, Callable

import modelbus

from .plan import Line, Plan
from .stand import QUESTION, Stand

AT_ONCE = 1000


@modelbus.prompt(model="chat")
def asked(question: str) -> str:
    """{{ question }}"""
    return modelbus.context()


async def prompts(stand: Stand, plan: Plan) -> list[Line]:
    """Prompt functions beside the client's own calls: added time of one, throughput of 1,000 at once, objects left."""
    await stand.model("chat")
    async with modelbus.connect(stand.server.url) as client:
        mine = asked.with_llm(client)

        async def raw() -> None:
            await client.chat("chat", QUESTION)

        async def prompted() -> None:
            await mine.aio(QUESTION)

        await _at_once(raw, 1)
        await _at_once(prompted, 1)
        added_us, raw_us = await _added(raw, prompted, plan)
        before = _objects()
        rounds = []
        for _ in range(plan.rounds):
            rates = [await _at_once(call, plan.seconds) for call in (raw, prompted)]
            rounds.append((rates[1] / rates[0], *rates))
        await asyncio.sleep(1.0)  # what acknowledges and books is through
        left = _objects() - before
    ratio, raw_rate, rate = (statistics.median(column) for column in zip(*rounds, strict=True))
    calls = sum(int((raw_rate + rate) * plan.seconds) for _ in rounds)
    return [
        Line(
            what="a prompt function beside the client's call, one at a time: added p50",
            modelbus=f"{raw_us + added_us:,.0f} us",
            other=f"{raw_us:,.0f} us (client.chat)",
            result=f"+{added_us:.0f} us",
            goal="100 us or less",
            met=added_us <= 100,
        ),
        Line(
            what=f"{AT_ONCE:,} prompt calls at once from one process",
            modelbus=f"{rate:,.0f} requests/s",
            other=f"{raw_rate:,.0f} requests/s (client.chat)",
            result=f"{ratio:.2f}",
            goal="0.8 or more",
            met=ratio >= 0.8,
        ),
        Line(
            what=f"... objects left after {calls:,} calls",
            modelbus=f"{left:+,}",
            other="",
            result=f"{left / calls:+.4f} per call",
            goal="0.01 or less",
            met=left / calls <= 0.01,
        ),
    ]


async def _added(
    raw: Callable[[], Awaitable[None]], prompted: Callable[[], Awaitable[None]], plan: Plan
) -> tuple[float, float]:
    """Microseconds, both medians: what the prompt function adds, and what the raw call takes. The two take turns."""
    times: tuple[list[float], list[float]] = ([], [])
    end = time.perf_counter() + plan.seconds * plan.rounds
    while time.perf_counter() < end:
        for call, taken in zip((raw, prompted), times, strict=True):
            began = time.perf_counter()
            await call()
            taken.append((time.perf_counter() - began) * 1e6)
    middle = [statistics.median(taken) for taken in times]
    return middle[1] - middle[0], middle[0]


async def _at_once(call: Callable[[], Awaitable[None]], seconds: float) -> float:
    """Calls per second, ``AT_ONCE`` of them under way all the time."""
    began = time.perf_counter()
    end = began + seconds
    done = 0

    async def caller() -> None:
        nonlocal done
        while time.perf_counter() < end:
            await call()
            done += 1

    await asyncio.gather(*(caller() for _ in range(AT_ONCE)))
    return done / (time.perf_counter() - began)


def _objects() -> int:
    gc.collect()
    return len(gc.get_objects())
