"""Whether a deployment's replica fits on a node, and on which GPUs. Pure: no clock, no bus, no processes."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path

import msgspec
from modelbus_broker.messages import Deployment, NodeRecord

from .resources import Offer

#: Sums of fractions such as 0.1 are not exact.
_SLACK = 1e-6


class Share(msgspec.Struct, frozen=True, kw_only=True):
    """What one worker takes of its host."""

    cpus: float = 0.0
    memory_mb: int = 0
    gpus: tuple[int, ...] = ()  #: indexes of devices
    gpu_fraction: float = 1.0  #: of each of them


class Free(msgspec.Struct, frozen=True, kw_only=True):
    """What is left of an offer."""

    cpus: float
    memory_mb: int
    gpus: dict[int, float]  #: per device index, 1.0 = all of it


def free(offer: Offer, taken: Iterable[Share]) -> Free:
    """What is left when these shares are taken."""
    cpus, memory_mb = offer.cpus, offer.memory_mb
    gpus = {gpu.index: 1.0 for gpu in offer.gpus}
    for share in taken:
        cpus -= share.cpus
        memory_mb -= share.memory_mb
        for index in share.gpus:
            gpus[index] -= share.gpu_fraction
    return Free(cpus=max(0.0, cpus), memory_mb=max(0, memory_mb), gpus=gpus)


def free_of(node: NodeRecord) -> Free:
    """What another node says is left of its offer."""
    rests = dict(zip((gpu.index for gpu in node.gpus), node.gpus_free, strict=False))
    return Free(cpus=node.cpus_free, memory_mb=node.memory_free_mb, gpus=rests)


def why_no_room(deployment: Deployment, offer: Offer, left: Free) -> str:
    """Why one more replica does not fit here, in words for the one who deploys; "" if it does.

    What the host never can give is named before what is merely taken.
    """
    if deployment.engine not in offer.engines:
        return offer.missing.get(deployment.engine) or f"there is no engine {deployment.engine!r} here"
    if deployment.model_path and not Path(deployment.model_path).expanduser().exists():
        return f"there is no {deployment.model_path} here"
    for name, value in sorted(deployment.require.items()):
        # "" asks for the label, whatever its value.
        if name not in offer.labels or value not in ("", offer.labels[name]):
            has = f"{name}={offer.labels[name]}" if name in offer.labels else f"no label {name}"
            return f"it requires {name}{'=' + value if value else ''}, here is {has}"
    if deployment.cpus > left.cpus + _SLACK:
        return f"it needs {deployment.cpus:g} CPUs, {left.cpus:g} of {offer.cpus:g} are free"
    if deployment.memory_mb > left.memory_mb:
        return f"it needs {deployment.memory_mb} MB of memory, {left.memory_mb} of {offer.memory_mb} are free"
    if place(deployment, left) is None:
        return _why_no_gpu(deployment, offer, left)
    return ""


def place(deployment: Deployment, left: Free) -> Share | None:
    """The share that a replica would take; None if its GPUs do not fit.

    From 1 on GPUs are whole devices. A fraction goes to the fullest device that has it left, so that whole
    devices stay whole.
    """
    gpus: tuple[int, ...] = ()
    fraction = 1.0
    if deployment.gpus >= 1:
        count = math.ceil(deployment.gpus - _SLACK)
        whole = [index for index, rest in sorted(left.gpus.items()) if rest > 1 - _SLACK]
        if len(whole) < count:
            return None
        gpus = tuple(whole[:count])
    elif deployment.gpus > 0:
        fraction = deployment.gpus
        fitting = sorted((rest, index) for index, rest in left.gpus.items() if rest >= fraction - _SLACK)
        if not fitting:
            return None
        gpus = (fitting[0][1],)
    return Share(cpus=deployment.cpus, memory_mb=deployment.memory_mb, gpus=gpus, gpu_fraction=fraction)


def _why_no_gpu(deployment: Deployment, offer: Offer, left: Free) -> str:
    if not offer.gpus:
        return f"it needs {deployment.gpus:g} GPUs, here are none"
    rests = ", ".join(f"{max(0.0, rest):g}" for _, rest in sorted(left.gpus.items()))
    return f"it needs {deployment.gpus:g} GPUs, of {len(offer.gpus)} devices are free: {rests}"
