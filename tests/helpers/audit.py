"""What must be true on the bus when all requests have come to an end."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Collection

import msgspec
from modelbus_broker import names
from modelbus_broker.connection import Bus
from modelbus_broker.errors import ModelBusError
from modelbus_broker.topology import depths, queued, running

from tests.helpers.asking import usage_events


class Audit(msgspec.Struct, frozen=True, kw_only=True):
    """What the bus holds at the end."""

    outcomes: Counter[str]  #: of all runs, by their usage events
    unbilled: int  #: answers whose worker was killed between the last frame and the bill, and then their gateway
    replaced: int  #: answers of which an earlier run was booked too: its worker, or its publisher, was killed
    failures: list[str]  #: what must not be


async def audit(bus: Bus, model: str, answered: Collection[str], *, timeout_s: float = 120.0) -> Audit:
    """Waits until the queues are empty, and then compares the ledger with the answers.

    Args:
        answered: ids of the requests that a client got a whole answer to.
    """
    failures = await _left_in_queues(bus, model, timeout_s)
    dead = (await bus.js_request(f"STREAM.INFO.{names.STREAM_DEAD}"))["state"]["messages"]
    if dead:
        failures.append(f"{dead} dead letters")
    events = await usage_events(bus)
    done: dict[str, list[str]] = {}
    for event in events:
        if event.outcome == "done":
            done.setdefault(event.id, []).append(event.run)
        elif event.outcome == "failed":
            failures.append(f"run {event.run} of {event.id} failed: {event.code}")
    outcomes = Counter(event.outcome for event in events)
    unbilled = replaced = 0
    for id in answered:
        runs = done.get(id, [])
        unbilled += not runs
        # A later run takes the place of an earlier one that was booked by a worker which died, with its publisher or
        # before its last frame had arrived: who bills an id takes its last run.
        replaced += len(runs) > 1
        order = [names.parse_run(run)[:2] for run in runs]
        if len(set(order)) < len(order):
            failures.append(f"{id} was answered and which of its runs is billed is not clear: {runs}")
    return Audit(outcomes=outcomes, unbilled=unbilled, replaced=replaced, failures=failures)


async def _left_in_queues(bus: Bus, model: str, timeout_s: float) -> list[str]:
    left = "the bus did not answer"
    try:
        async with asyncio.timeout(timeout_s):
            while left:
                try:
                    counts = await queued(bus, model), await running(bus, model), sum((await depths(bus)).values())
                    left = "{} waiting, {} with a worker, {} stored".format(*counts) if any(counts) else ""
                except ModelBusError as error:
                    left = error.message
                await asyncio.sleep(0.2)
    except TimeoutError:
        return [f"left in the queues: {left}"]
    return []
