"""What becomes of a request whose run ended without a whole answer: the decision alone. No bus, no clock.

A run ends so when its worker is lost, or when the worker lives and says that another one may do better (its provider
refuses connections, is overloaded, fell silent ...). The client must see one answer, whole or with an error at its end.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from .errors import ModelBusError, WorkerLost
from .messages import Request, WorkerRecord

#: How often a request goes to another worker because one said that it cannot; its tries inside a worker come on top.
MAX_RESCUES = 3
#: With less time left than this a new attempt could only run out of it.
LEAST_BUDGET_MS = 1000


class RunEnd(msgspec.Struct, frozen=True, kw_only=True):
    """How the run that counted ended."""

    worker: str
    why: str  #: for the client and the log
    compat: str = ""  #: of the worker
    crashed: bool = False  #: the engine had the request when the worker was lost
    failure: ModelBusError | None = None  #: the worker lives and failed; another one may not
    run: str = ""  #: its name
    handover: bool = False  #: the worker was stopped and gave the request up


class Progress(msgspec.Struct, frozen=True, kw_only=True):
    """How far the answer has come."""

    output: bool = False  #: some output has come
    shown: bool = False  #: and it was passed on to a client that reads as it comes: nobody can take it back
    token_ids: list[list[int]] = []  #: per choice
    chars: list[int] = []  #: per choice


class Again(msgspec.Struct, frozen=True):
    """From the start, by any worker; output that has come is thrown away."""

    request: Request


class GoOn(msgspec.Struct, frozen=True):
    """From the tokens so far, by a worker that can; there may be none yet, see :func:`heir_lives`."""

    request: Request


class GiveUp(msgspec.Struct, frozen=True):
    """The client gets this error."""

    error: ModelBusError


def next_attempt(
    request: Request, end: RunEnd, progress: Progress, workers: Sequence[WorkerRecord], *, attempt: int, budget_ms: int
) -> Again | GoOn | GiveUp:
    """Decides what follows.

    Args:
        request: as it was published last.
        workers: the live ones of its model, the one of this run perhaps among them.
        attempt: the number of the attempt that would follow.
        budget_ms: the time that the request has left.
    """
    changes: dict[str, object] = {}
    if end.failure is not None:
        rescue = _rescue(request, end, progress, workers)
        if rescue is None or budget_ms < LEAST_BUDGET_MS:
            return GiveUp(end.failure)
        changes = rescue
    follower = msgspec.structs.replace(
        request,
        attempt=attempt,
        lane="re",
        crashes=request.crashes + end.crashed,
        lost_runs=[*request.lost_runs, end.run] if end.run else request.lost_runs,
        budget_ms=max(LEAST_BUDGET_MS, budget_ms),
        compat="",
        output_token_ids=[],
        emitted_chars=[],
        continues="",
        earlier=b"",
        earlier_blob=None,
        handover=end.handover,
        **changes,
    )
    # What a client has seen nobody can take back: it waits for a worker that goes on, one that is started anew perhaps.
    waits = progress.shown and end.failure is None and bool(end.compat)
    if progress.output and (waits or heir_lives(end, workers)):
        tokens = [list(ids) for ids in progress.token_ids]
        return GoOn(
            msgspec.structs.replace(
                follower, compat=end.compat, output_token_ids=tokens, emitted_chars=list(progress.chars)
            )
        )
    if not progress.shown:
        return Again(follower)
    return GiveUp(
        end.failure or WorkerLost(f"the answer was cut: {end.why}, and no other worker can go on from what was sent")
    )


def _rescue(
    request: Request, end: RunEnd, progress: Progress, workers: Sequence[WorkerRecord]
) -> dict[str, object] | None:
    """What changes in the request when a worker has failed, so that another one takes it; None: nobody is left."""
    if request.rescues >= MAX_RESCUES:
        return None
    failed = next((worker.deployment for worker in workers if worker.id == end.worker), "")
    avoid = dict.fromkeys([*request.avoid, end.worker])
    able = [worker for worker in workers if request.revision in ("", worker.revision)]
    untried = [worker for worker in able if worker.id not in avoid]
    if any(worker.deployment != failed for worker in untried):
        # Workers of one deployment have one provider: those of another come first.
        avoid.update(dict.fromkeys(worker.id for worker in workers if worker.deployment == failed))
    if untried:
        return {"avoid": list(avoid), "rescues": request.rescues + 1}
    assert end.failure is not None
    if (request.fail_fast or progress.output) and end.failure.status != 504:
        # All have failed at their first try, or in the middle, where a worker does not begin anew by itself. Once more,
        # with the patience of a worker that is the only one; a provider that was silent was waited for already.
        return {"avoid": [], "rescues": MAX_RESCUES, "fail_fast": False}
    return None


def heir_lives(end: RunEnd, workers: Sequence[WorkerRecord]) -> bool:
    """Whether one of the live workers can go on from the tokens of a run that ended."""
    return bool(end.compat) and any(
        worker.compat == end.compat and worker.capabilities.can_continue and worker.id != end.worker
        for worker in workers
    )
