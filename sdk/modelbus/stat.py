"""What is deployed and how busy it is, worked out from the registry's records."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import msgspec
from modelbus_broker.adapters import resolve
from modelbus_broker.errors import ModelNotFound
from modelbus_broker.messages import Capabilities, Deployment, WorkerRecord

if TYPE_CHECKING:
    from modelbus_broker.registry import Registry


class ModelStat(msgspec.Struct, frozen=True, kw_only=True):
    """How busy a model is; field for field what byzerllm's ``stat`` printed. Lists have one item per worker."""

    total_workers: int = 0
    busy_workers: int = 0  #: those that run at least one request
    idle_workers: int = 0
    load_balance_strategy: str = "lru"  #: the server serves the pull that has waited longest
    total_requests: list[int] = []
    state: list[int] = []  #: free slots
    worker_max_concurrency: int = 0  #: slots per worker
    workers_last_work_time: list[str] = []  #: seconds since the last request, "631.7s"; since the start if none came


class ModelInfo(msgspec.Struct, frozen=True, kw_only=True):
    """One model as a list shows it."""

    model: str
    engine: str
    workers: int = 0  #: ready now
    wanted: int = 0
    slots: int = 0  #: of all ready workers
    busy: int = 0
    queued: int = 0
    tasks: list[str] = []  #: chat, completion, embedding
    context_length: int = 0  #: tokens; 0 = not known
    deployments: list[str] = []
    total_requests: int = 0
    stuck: bool = False  #: requests and workers wait for each other: the bus delivers nothing


def worker_order(worker: WorkerRecord) -> tuple[str, int, str]:
    """The order in which lists show workers."""
    return worker.deployment, worker.replica, worker.id


def model_stat(workers: Sequence[WorkerRecord], *, now_ms: int) -> ModelStat:
    """The stat of the ready workers of one model."""
    ready = sorted((worker for worker in workers if worker.state == "ok"), key=worker_order)
    busy = sum(worker.busy > 0 for worker in ready)
    return ModelStat(
        total_workers=len(ready),
        busy_workers=busy,
        idle_workers=len(ready) - busy,
        total_requests=[worker.total_requests for worker in ready],
        state=[max(worker.slots - worker.busy, 0) for worker in ready],
        worker_max_concurrency=max((worker.slots for worker in ready), default=0),
        workers_last_work_time=[
            f"{max(now_ms - (worker.last_work_ms or worker.started_ms), 0) / 1000:.3f}s" for worker in ready
        ],
    )


def model_info(
    model: str,
    deployments: Sequence[Deployment],
    workers: Sequence[WorkerRecord],
    *,
    queued: int = 0,
    stuck: bool = False,
) -> ModelInfo:
    """One row of the list of models."""
    ready = [worker for worker in workers if worker.state == "ok"]
    return ModelInfo(
        model=model,
        engine=", ".join(sorted({deployment.engine for deployment in deployments})),
        workers=len(ready),
        wanted=sum(deployment.replicas for deployment in deployments),
        slots=sum(worker.slots for worker in ready),
        busy=sum(worker.busy for worker in ready),
        queued=queued,
        tasks=sorted({task for worker in ready for task in worker.capabilities.tasks}),
        context_length=min(
            (worker.capabilities.context_length for worker in ready if worker.capabilities.context_length), default=0
        ),
        deployments=sorted(deployment.name for deployment in deployments),
        total_requests=sum(worker.total_requests for worker in ready),
        stuck=stuck,
    )


def stat_of(registry: Registry, model: str) -> ModelStat:
    """The stat of one model.

    Raises:
        ModelNotFound: no deployment serves it.
    """
    if not registry.deployments_of(model):
        raise ModelNotFound(f"model {model!r} is not deployed; `modelbus models` lists those that are")
    return model_stat(registry.workers_of(model), now_ms=time.time_ns() // 1_000_000)


def capabilities_of(registry: Registry, model: str) -> Capabilities:
    """What all ready workers of a model can do, which is what any request to it, or to an adapter of it, can rely on.

    Raises:
        ModelNotFound: no deployment serves it, or it has no such adapter.
    """
    model = resolve(registry, model).model
    if not registry.deployments_of(model):
        raise ModelNotFound(f"model {model!r} is not deployed; `modelbus models` lists those that are")
    return shared_capabilities([worker.capabilities for worker in registry.workers_of(model)])


def shared_capabilities(each: Sequence[Capabilities]) -> Capabilities:
    """What all of them have: the least of each; nothing of nobody."""
    if not each:
        return Capabilities(streaming=False)
    first = each[0]
    if all(other == first for other in each[1:]):
        return first
    shared: dict[str, Any] = {}
    for name in Capabilities.__struct_fields__:
        values = [getattr(capabilities, name) for capabilities in each]
        if isinstance(values[0], bool):
            shared[name] = all(values)
        elif isinstance(values[0], int):
            shared[name] = min((value for value in values if value), default=0)
        elif name == "extra_fields":
            lists = [value for value in values if "*" not in value]
            shared[name] = [field for field in lists[0] if all(field in value for value in lists)] if lists else ["*"]
        else:
            shared[name] = [item for item in values[0] if all(item in value for value in values)]
    return Capabilities(**shared)
