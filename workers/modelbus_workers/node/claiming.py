"""Decisions about claims and rollouts. Pure: ``agent`` and ``running`` act on them.

A claim is a key of the bucket ``claims``, written with the sequence of the last message there. It may be written only
over nothing, a release, a delete or an expiry marker, or over one's own value: never over another node's live one.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Literal

from modelbus_broker.buckets import Entry
from modelbus_broker.messages import Deployment, WorkerRecord, decode_claim
from modelbus_broker.names import claim_key


def wished(deployments: Iterable[Deployment]) -> dict[str, tuple[Deployment, int]]:
    """Claim key -> (deployment, replica) of all replicas that shall run somewhere."""
    return {
        claim_key(deployment.name, replica): (deployment, replica)
        for deployment in deployments
        for replica in range(deployment.replicas)
    }


def may_claim(entry: Entry | None, node: str) -> bool:
    """Whether the last message under a claim's key lets this node write its claim over it."""
    return entry is None or entry.deleted or decode_claim(entry.value).node == node


Renewal = Literal["go on", "claim", "stop"]


def after_refusal(entry: Entry | None, node: str) -> Renewal:
    """What a refused renewal means, from what lies under the key now.

    "go on": our own value; an earlier renewal was stored though its answer was lost. "claim": it expired while the bus
    was away, and only we may take it now. "stop": another node has it.
    """
    if entry is None or entry.deleted:
        return "claim"
    return "go on" if decode_claim(entry.value).node == node else "stop"


def held_off(since_reconnect_s: float, hold_off_s: float) -> bool:
    """Whether it is too soon after a reconnect to claim what did not run here.

    After an outage longer than a claim's TTL all claims have expired, and every owner is about to claim its own again.
    """
    return since_reconnect_s < hold_off_s


Roll = Literal["stay", "beside", "stop first"]


def next_roll(
    deployment: Deployment,
    replica: int,
    running: str,
    workers: Collection[WorkerRecord],
    *,
    excluded: bool,
    room_beside: bool,
    room_after: bool,
) -> Roll:
    """How a replica that runs the revision ``running`` goes on towards the one that is wished for.

    It moves when all replicas below it are ok on the new revision. The new worker comes first where both fit;
    an ``exclusive`` deployment never has two. ``room_after``: it fits here without the old one, or on another node.
    When it fits nowhere, a mistake such as a path that is not there leaves the old one running.
    """
    if running == deployment.revision or excluded:
        return "stay"
    ok = {
        worker.replica
        for worker in workers
        if worker.deployment == deployment.name and worker.revision == deployment.revision and worker.state == "ok"
    }
    if not ok.issuperset(range(replica)):
        return "stay"
    if room_beside and not deployment.exclusive:
        return "beside"
    return "stop first" if room_after else "stay"


def backoff_s(crashes: int, first_s: float, most_s: float) -> float:
    """How long to wait before the start after the n-th crash in a row (n from 1)."""
    return min(most_s, first_s * 2.0 ** min(crashes - 1, 30))
