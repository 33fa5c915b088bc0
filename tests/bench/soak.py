"""Whether memory grows with the requests that were answered."""

from __future__ import annotations

import asyncio
import sys

import msgspec

from .load import LoadJob
from .plan import Line, Plan
from .stand import Stand

#: Tables that have an upper bound, the worker's memory of 20,000 ended requests above all, are full after so many, and have
#: been made anew by Python as often as it takes until they stay in their place. (Measured: nothing grows from here on.)
FULL = 80_000
GOAL = 0.05


async def soak(stand: Stand, plan: Plan) -> list[Line]:
    """The memory of gateway and worker before and after many requests, plain ones and streams in turn."""
    await stand.model("chat")
    port = await stand.gateway()
    jobs = [
        LoadJob(port=port, body=stand.body("chat", stream=stream), stream=stream, connections=64, warmup_s=0.0)
        for stream in (False, True)
    ]
    await _ask(stand, jobs, FULL)
    before = await _memory(stand)
    await _ask(stand, jobs, plan.requests)
    after = await _memory(stand)
    lines = []
    for name in before:
        growth = after[name] / before[name] - 1
        lines.append(
            Line(
                what=f"memory of the {name} after {plan.requests:,} requests",
                modelbus=f"{after[name]:.1f} MiB",
                other=f"{before[name]:.1f} MiB (before)",
                result=f"{growth:+.1%}",
                goal="5 % more or less",
                met=growth <= GOAL,
            )
        )
    return lines


async def _ask(stand: Stand, jobs: list[LoadJob], requests: int) -> None:
    for part in range(10):
        if sys.stderr.isatty():
            print(f"\r    {part} of 10 parts of {requests:,} requests", end="", file=sys.stderr, flush=True)
        for job in jobs:
            await stand.load(msgspec.structs.replace(job, requests=max(64, requests // 20)))
    if sys.stderr.isatty():
        print("\r" + " " * 60, end="\r", file=sys.stderr, flush=True)


async def _memory(stand: Stand) -> dict[str, float]:
    await asyncio.sleep(2.0)  # what ended last is confirmed and booked
    return {"gateway": stand.gateway_rss_mib(), "worker": stand.worker_rss_mib("chat")}
