"""Who runs this request? A worker's answers to publishers that look for one, and how a run changes its publisher."""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING

import msgspec
from modelbus_broker import names
from modelbus_broker.connection import Msg
from modelbus_broker.messages import Adopt, FoundRun, RunState, decode_find

from .execution import Execution
from .outbox import Ring

if TYPE_CHECKING:
    from .intake import Intake

log = logging.getLogger(__name__)


class Finding:
    """Knows what a worker runs, and what it has ended lately."""

    def __init__(self, worker_id: str, intake: Intake) -> None:
        self._worker_id = worker_id
        self._intake = intake

    def found(self, msg: Msg) -> FoundRun | None:
        """The answer to a question on ``mb.find``; None: this worker has nothing to say."""
        try:
            return self.look(decode_find(msg.data).id)
        except msgspec.MsgspecError as error:
            log.warning("a question on mb.find cannot be decoded: %s", error)
            return None

    def look(self, request_id: str) -> FoundRun | None:
        """The newest run of a request that is here, else the last one that was."""
        ring = self._newest(request_id, "")
        if ring is not None:
            return self._describe(ring)
        for execution in self._intake.executions.values():
            if execution.request.id == request_id:  # a job: its frames go to nobody
                state = RunState(id=request_id, run=execution.run, seq=execution.ring.sent_seq, state=execution.state)
                return _with_execution(FoundRun(worker=self._worker_id, state=state), execution, self._intake.compat)
        if (run := self._intake.ended_run(request_id)) is not None:
            return FoundRun(worker=self._worker_id, state=RunState(id=request_id, run=run, seq=-1, state="ended"))
        return None

    def adopt(self, adopt: Adopt) -> FoundRun | None:
        """Gives a run to another publisher, if it is still with the one who is named, and says with whom it is now."""
        ring = self._newest(adopt.id, adopt.run)
        if ring is None:
            return self.look(adopt.id)
        if adopt.of in ("", ring.publisher) or ring.publisher == adopt.publisher:
            self._intake.outbox.adopt(ring, adopt.publisher, adopt.seq)
        return self._describe(ring)

    def _newest(self, request_id: str, run: str) -> Ring | None:
        """Among the runs of a request; other runs of it are rivals, or were lost and have come back."""
        rings = self._intake.outbox.rings
        if run:
            return rings.get(names.run_key(request_id, run))
        own = [ring for ring in rings.values() if ring.request_id == request_id]
        return max(own, key=lambda ring: names.parse_run(ring.run)[:2], default=None)

    def _describe(self, ring: Ring) -> FoundRun:
        execution = ring.execution
        state = RunState(
            id=ring.request_id, run=ring.run, seq=ring.sent_seq, state=execution.state if execution else "ended"
        )
        found = FoundRun(worker=self._worker_id, state=state, publisher=ring.publisher, first=ring.first)
        return found if execution is None else _with_execution(found, execution, self._intake.compat)


def _with_execution(found: FoundRun, execution: Execution, compat: str) -> FoundRun:
    left_s = execution.deadline - asyncio.get_running_loop().time()
    return msgspec.structs.replace(
        found,
        ack_subject=execution.pulled.ack_subject,
        compat=compat,
        delivery=execution.pulled.delivery,
        left_ms=max(0, round(left_s * 1000)),
        request=execution.request,
    )
