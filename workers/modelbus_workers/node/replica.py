"""One replica that this node has claimed, and the workers that run it."""

from __future__ import annotations

import asyncio
import time

from modelbus_broker.messages import Claim, Deployment

from .processes import WorkerProcess
from .room import Share


class Replica:
    """What the node knows of one claimed replica. ``running`` changes it.

    Usually ``current`` runs. During a rollout the new worker starts as ``beside``; the old one then is ``retiring``
    until it has finished what it holds.
    """

    def __init__(self, key: str, deployment: Deployment, number: int, seq: int, share: Share) -> None:
        self.key = key
        self.number = number
        self.deployment = deployment  #: the revision that runs, or shall be started
        self.seq = seq  #: of the claim
        self.share = share  #: kept free for it while none of its workers runs
        self.current: WorkerProcess | None = None
        self.beside: WorkerProcess | None = None
        self.retiring: set[WorkerProcess] = set()
        self.proven: set[str] = set()  #: revisions that have been ok here: their end is a crash, not a failed start
        self.crashes = 0  #: in a row
        self.not_before = 0.0  #: monotonic; when a crashed worker may start again
        self.renewed_at = time.monotonic()
        self.claimed_ms = time.time_ns() // 1_000_000
        #: Held while the claim is written, so that no renewal comes after the release.
        self.writing = asyncio.Lock()
        self.released = False
        self.closing: asyncio.Task[None] | None = None

    def __str__(self) -> str:
        return f"{self.deployment.name}.{self.number}"

    def workers(self) -> list[WorkerProcess]:
        """All whose process has not ended."""
        found = [worker for worker in (self.current, self.beside, *self.retiring) if worker is not None]
        return [worker for worker in found if worker.code is None]

    def shares(self) -> list[Share]:
        """What it takes of the host now."""
        return [worker.share for worker in self.workers()] or [self.share]

    def claim(self, node: str) -> Claim:
        return Claim(
            deployment=self.deployment.name,
            replica=self.number,
            node=node,
            revision=self.deployment.revision,
            worker=self.current.id if self.current else "",
            claimed_ms=self.claimed_ms,
        )
