"""What this host has to offer."""

from __future__ import annotations

import logging
import os
import socket

import msgspec
from modelbus_broker.errors import ModelBusError
from modelbus_broker.messages import GPU, NodeRecord

from modelbus_workers.engines.base import engine_class, engine_names

log = logging.getLogger(__name__)


class Offer(msgspec.Struct, frozen=True, kw_only=True):
    """A host's resources and what can run there."""

    cpus: float
    memory_mb: int
    gpus: tuple[GPU, ...] = ()
    labels: dict[str, str] = {}
    engines: frozenset[str] = frozenset()  #: that can be used here
    missing: dict[str, str] = {}  #: engine -> why it cannot be used here


def offer(
    *,
    cpus: float | None = None,
    memory_mb: int | None = None,
    gpus: int | None = None,
    labels: dict[str, str] | None = None,
) -> Offer:
    """What the host has, or what the caller says of it."""
    engines, missing = usable_engines()
    return Offer(
        cpus=float(_cpus() if cpus is None else cpus),
        memory_mb=_memory_mb() if memory_mb is None else memory_mb,
        gpus=_take(detected_gpus(), gpus),
        # What is bound to this host, such as the folder of a store, asks for it by name.
        labels={"host": socket.gethostname(), **(labels or {})},
        engines=frozenset(engines),
        missing=missing,
    )


def offer_of(node: NodeRecord) -> Offer:
    """What another node says that it has."""
    return Offer(
        cpus=node.cpus,
        memory_mb=node.memory_mb,
        gpus=tuple(node.gpus),
        labels=node.labels,
        engines=frozenset(node.engines),
        missing=node.missing,
    )


def usable_engines() -> tuple[list[str], dict[str, str]]:
    """(engines that can run here, why the others cannot). Imports no model library."""
    usable, missing = [], {}
    for name in engine_names():
        try:
            why = engine_class(name).missing()
        except ModelBusError as error:
            why = str(error)
        if why:
            missing[name] = why
        else:
            usable.append(name)
    return usable, missing


def detected_gpus() -> list[GPU]:
    """The GPUs that NVML shows, less those that CUDA_VISIBLE_DEVICES hides; none when NVML is not there."""
    try:
        import pynvml
    except ImportError:
        return []
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        log.info("no GPU is offered: %s", error)
        return []
    try:
        found = []
        for index in range(pynvml.nvmlDeviceGetCount()):
            handle = pynvml.nvmlDeviceGetHandleByIndex(index)
            memory_mb = int(pynvml.nvmlDeviceGetMemoryInfo(handle).total) >> 20
            found.append(
                GPU(
                    index=index,
                    name=_text(pynvml.nvmlDeviceGetName(handle)),
                    memory_mb=memory_mb,
                    uuid=_text(pynvml.nvmlDeviceGetUUID(handle)),
                )
            )
    except pynvml.NVMLError as error:
        log.warning("no GPU is offered, NVML says: %s", error)
        return []
    finally:
        pynvml.nvmlShutdown()
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return found
    wanted = {entry.strip() for entry in visible.split(",")}
    return [gpu for gpu in found if str(gpu.index) in wanted or gpu.uuid in wanted]


def _take(found: list[GPU], count: int | None) -> tuple[GPU, ...]:
    if count is None:
        return tuple(found)
    used = {gpu.index for gpu in found}
    more = (index for index in range(count + len(used)) if index not in used)
    while len(found) < count:
        found.append(GPU(index=next(more), name="unknown", memory_mb=0))
    return tuple(found[:count])


def _cpus() -> int:
    """The CPUs that this process may use: a container or taskset may give fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _memory_mb() -> int:
    import psutil

    return int(psutil.virtual_memory().total) >> 20


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value
