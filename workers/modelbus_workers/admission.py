"""What to do with a message that came out of the queue. Pure: no bus, no engine."""

from __future__ import annotations

from typing import Literal

import msgspec
from modelbus_broker.messages import Request


class Decision(msgspec.Struct, frozen=True):
    """What to do, and why, in words for the client or the dead letter."""

    action: Literal["run", "run_alone", "expire", "give_back", "leave", "dead", "done", "cancelled"]
    why: str = ""
    delay_ms: int = 0  #: of a give_back: where this very worker would get it again at once


RUN = Decision("run")
#: One more lost run and it is poison: nobody else shall be lost with it.
RUN_ALONE = Decision("run_alone")

#: So long a worker that has failed a request leaves it to others. Then it takes it all the same: they may all be gone.
AVOID_MS = 30_000


def clock_offset_ms(asked_ms: float, answered_ms: float, server_ms: float) -> float:
    """The server's clock minus ours, from one question to it: it looked at its clock halfway, as far as we know.

    Args:
        asked_ms, answered_ms: Unix time by our clock.
        server_ms: Unix time in its answer.
    """
    return server_ms - (asked_ms + answered_ms) / 2


def decide(
    request: Request,
    *,
    now_ms: float,
    stored_ms: float,
    starts: int,
    revision: str,
    compat: str,
    free: int,
    ended: bool,
    worker: str = "",
    cancelled: bool = False,
) -> Decision:
    """Judges one delivery.

    Args:
        now_ms: Unix time by the server's clock.
        stored_ms: when the stream stored the message.
        starts: how often this attempt has been started before, as far as it was counted (``runs`` bucket).
        revision: of this worker's deployment.
        compat: of this worker.
        free: slots that are free now; none while a request that has to be alone is here.
        ended: this worker has already answered this attempt.
        worker: the id of this worker.
        cancelled: someone told this worker to stop the request before it came.
    """
    if ended:
        return Decision("done", "it was answered here before its acknowledgement was stored")
    if cancelled:
        return Decision("cancelled", "it was cancelled before it was started")
    if now_ms > stored_ms + request.budget_ms:
        return Decision("expire", f"its {request.budget_ms / 1000:g} s were over before a worker was free")
    lost = request.crashes + starts
    if lost >= request.max_crashes:
        return Decision("dead", f"its worker was lost {lost} times while it ran")
    if request.revision and request.revision != revision:
        return Decision("give_back", f"it is for revision {request.revision}", 200)
    if request.compat and request.compat != compat:
        return Decision("give_back", f"it can only go on where the compat is {request.compat}", 200)
    if worker in request.avoid and now_ms < stored_ms + min(AVOID_MS, request.budget_ms / 2):
        return Decision("leave", "it failed here, others may do it")
    if free <= 0:
        return Decision("give_back", "no slot is free")
    return RUN_ALONE if lost and lost == request.max_crashes - 1 else RUN
