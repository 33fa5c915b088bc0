"""What a worker does by itself for a job, which has no publisher to do it: another try, and whether it runs elsewhere."""

from __future__ import annotations

import asyncio
import contextlib

import msgspec
from modelbus_broker import names
from modelbus_broker.connection import Bus, Msg
from modelbus_broker.messages import FindRun, decode_found, encode

#: How often a job is given to a worker that says it may succeed later: a provider that is down for a quarter of an hour
#: is waited for.
TRIES = 12
#: Between two tries, at most.
LONGEST_S = 300.0
#: With less time left than this a new try could only run out of it.
LEAST_LEFT_S = 1.0
#: Other workers say within so long that they have the job.
ASK_S = 0.3


def again_s(*, delivery: int, left_s: float, retry_after_s: float = 0.0) -> float | None:
    """After how long a job that failed, and may succeed later, is tried again; None: it has failed for good. Pure.

    Args:
        delivery: how often its message has been delivered, this time included.
        left_s: until its deadline.
        retry_after_s: what the provider asks for, 0 if it does not.
    """
    if delivery >= TRIES:
        return None
    pause_s = min(LONGEST_S, max(retry_after_s, 2.0 ** (delivery - 1)))
    return pause_s if left_s - pause_s > LEAST_LEFT_S else None


async def runs_elsewhere(bus: Bus, worker_id: str, request_id: str) -> bool:
    """Whether another worker says that it has this job in hand. One that is frozen or cut off says nothing.

    Raises:
        BusUnavailable: nobody can be asked.
    """
    heard = asyncio.Event()

    def take(msg: Msg) -> None:
        if not msg.status:
            with contextlib.suppress(msgspec.MsgspecError):
                found = decode_found(msg.data)
                if found.worker != worker_id and found.state.state != "ended":
                    heard.set()

    inbox = bus.new_inbox()
    subscription = await bus.subscribe(inbox, take)
    try:
        await bus.publish(names.FIND, encode(FindRun(id=request_id)), reply=inbox)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(ASK_S):
                await heard.wait()
        return heard.is_set()
    finally:
        await subscription.unsubscribe()
