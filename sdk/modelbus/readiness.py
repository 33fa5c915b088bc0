"""Whether the workers of a deployment come: what each says, and why those that are missing will not."""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import TYPE_CHECKING

from modelbus_broker.errors import DeploymentFailed, NoRoom
from modelbus_broker.messages import Deployment, NodeRecord, StartFailure, WorkerRecord

from .stat import worker_order

if TYPE_CHECKING:
    from modelbus_broker.registry import Registry

    from .deploying import Progress

#: How long all nodes must go on saying no before a deploy believes them, seconds. While an older revision still
#: runs its workers may hold the room that the new one needs.
_REFUSED_S, _REFUSED_REDEPLOY_S = 3.0, 20.0


async def ready_workers(
    registry: Registry, wish: Deployment, *, replaces: bool, on_progress: Progress
) -> list[WorkerRecord]:
    """Waits for N good workers of this revision; raises as soon as it is plain that they will not come."""
    patience_s = _REFUSED_REDEPLOY_S if replaces else _REFUSED_S
    refused_since: float | None = None
    shown = ""
    while True:
        workers = _workers_of(registry, wish)
        line = situation(wish, registry)
        if line != shown:
            shown = line
            on_progress(line)
        ready = [worker for worker in workers if worker.state == "ok"]
        if len({worker.replica for worker in ready}) >= wish.replicas:
            return ready
        verdict = why_not(wish, registry.nodes.values(), workers, registry.failures.values())
        if verdict is None:
            refused_since = None
        elif type(verdict) is DeploymentFailed:
            raise verdict
        else:
            refused_since = refused_since or time.monotonic()
            if time.monotonic() - refused_since >= patience_s:
                raise verdict
        await registry.changed(0.5)


def why_not(
    wish: Deployment, nodes: Iterable[NodeRecord], workers: Iterable[WorkerRecord], failures: Iterable[StartFailure]
) -> DeploymentFailed | None:
    """Why the missing workers will not come: every node has failed to start one or has no room; None if one may yet."""
    nodes = list(nodes)
    coming = {worker.replica for worker in workers if worker.state in ("starting", "ok")}
    if len(coming) >= wish.replicas:
        return None
    if not nodes:
        return NoRoom("no node is running on this bus: start one with `modelbus start`")
    failed = {
        failure.node: failure.words
        for failure in failures
        if (failure.deployment, failure.revision) == (wish.name, wish.revision)
    }
    refused = {node.id: node.refused.get(f"{wish.name}.{wish.revision}", "") for node in nodes}
    if not all(node.id in failed or refused[node.id] for node in nodes):
        return None
    hosts = {node.id: node.host or node.id for node in nodes}
    words = [(hosts.get(node, node), text) for node, text in failed.items()]
    short = [(hosts[node], text) for node, text in refused.items() if text and node not in failed]
    if words:
        return DeploymentFailed(_by_host(words + short))
    return NoRoom(f"no node has room for {wish.replicas} worker(s) of {wish.name}: {_by_host(short, always=True)}")


def _by_host(words: list[tuple[str, str]], *, always: bool = False) -> str:
    texts = {text for _, text in words}
    if len(texts) == 1 and not always:
        return texts.pop()
    return "; ".join(f"{host}: {text}" for host, text in sorted(words))


def _workers_of(registry: Registry, wish: Deployment) -> list[WorkerRecord]:
    return sorted(
        (
            worker
            for worker in registry.workers.values()
            if (worker.deployment, worker.revision) == (wish.name, wish.revision)
        ),
        key=worker_order,
    )


def situation(wish: Deployment, registry: Registry) -> str:
    """One line: how many are ready and what each of the others says."""
    workers = _workers_of(registry, wish)
    ready = sum(worker.state == "ok" for worker in workers)
    said = [
        f"worker {worker.replica} {worker.state}" + (f" ({worker.words})" if worker.words else "")
        for worker in workers
        if worker.state != "ok"
    ]
    said += [
        f"no room on {node.host or node.id} ({words})"
        for node in registry.nodes.values()
        if (words := node.refused.get(f"{wish.name}.{wish.revision}", ""))
    ]
    said += [
        f"failed on {failure.node} ({failure.words})"
        for failure in registry.failures.values()
        if (failure.deployment, failure.revision) == (wish.name, wish.revision)
        and failure.node not in {worker.node for worker in workers if worker.state == "failed"}
    ]
    return ", ".join([f"{ready} of {wish.replicas} workers ready", *said])
