"""Queues that stand still: requests wait, workers wait for them, and nothing is delivered.

A busy queue has requests that wait and no pull, an idle one has pulls and no request; both at once, for longer than a
moment, is a fault of the bus, and no request will ever say so by itself before its time is up.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence

import msgspec

from .connection import Bus
from .errors import ModelBusError
from .registry import Registry
from .topology import ConsumerRef, consumers_of

log = logging.getLogger(__name__)

#: So long nothing moves before somebody is told.
STUCK_S = 10.0


class Look(msgspec.Struct, frozen=True, kw_only=True):
    """One consumer of a queue at one moment."""

    pending: int  #: messages that it has not delivered
    waiting: int  #: pulls
    delivered: int  #: messages so far
    at: float  #: event-loop time


def stands(before: Look, now: Look) -> bool:
    """Both times messages and pulls waited, and nothing was delivered in between."""
    both = min(before.pending, before.waiting, now.pending, now.waiting) > 0
    return both and before.delivered == now.delivered


class Standstill:
    """From looks, one after another, to what stands still and for how long. No bus, no clock."""

    def __init__(self, after_s: float = STUCK_S) -> None:
        self._after_s = after_s
        self._since: dict[str, Look] = {}

    def take(self, looks: Mapping[str, Look]) -> dict[str, float]:
        """Seconds by consumer, of those that have stood still for long enough."""
        before, self._since = self._since, {}
        found: dict[str, float] = {}
        for name, look in looks.items():
            first = before.get(name)
            if first is None or not stands(first, look):
                first = look
            self._since[name] = first
            if first is not look and look.at - first.at >= self._after_s:
                found[name] = look.at - first.at
        return found


async def look_at(bus: Bus, consumers: Sequence[ConsumerRef]) -> dict[str, Look]:
    """How consumers are now, by name; those that do not exist, or say nothing, are left out."""
    looks = await asyncio.gather(*(_look(bus, consumer) for consumer in consumers))
    return {consumer.name: look for consumer, look in zip(consumers, looks, strict=True) if look is not None}


async def _look(bus: Bus, consumer: ConsumerRef) -> Look | None:
    try:
        info = await bus.js_request(f"CONSUMER.INFO.{consumer.stream}.{consumer.name}", timeout_s=2.0)
    except ModelBusError:
        return None
    return Look(
        pending=int(info["num_pending"]),
        waiting=int(info["num_waiting"]),
        delivered=int(info["delivered"]["consumer_seq"]),
        at=asyncio.get_running_loop().time(),
    )


def model_consumers(registry: Registry, model: str) -> list[ConsumerRef]:
    """All consumers that a model's requests may wait at."""
    shares = max((deployment.shares for deployment in registry.deployments_of(model)), default=1)
    compats = sorted({worker.compat for worker in registry.workers_of(model, "") if worker.compat})
    return consumers_of(model, shares, compats)


async def standing_models(bus: Bus, registry: Registry, models: Iterable[str], *, apart_s: float = 1.0) -> set[str]:
    """The models whose queues stand still, from two looks; the second is taken only where the first gives cause."""
    model_of = {consumer: model for model in models for consumer in model_consumers(registry, model)}
    before = await look_at(bus, list(model_of))
    if not any(look.pending and look.waiting for look in before.values()):
        return set()
    await asyncio.sleep(apart_s)
    now = await look_at(bus, list(model_of))
    standing = {name for name, look in now.items() if name in before and stands(before[name], look)}
    return {model for consumer, model in model_of.items() if consumer.name in standing}


class StandstillWatch:
    """Looks after the queues of the models that somebody waits for, and says in the log what stands still.

    Args:
        models: those that somebody waits for.
    """

    def __init__(
        self, bus: Bus, registry: Registry, models: Callable[[], Iterable[str]], *, after_s: float = STUCK_S
    ) -> None:
        self._bus = bus
        self._registry = registry
        self._models = models
        self._after_s = after_s
        self._standstill = Standstill(after_s)
        #: Seconds by model.
        self.standing: dict[str, float] = {}

    async def run(self) -> None:
        while True:
            await asyncio.sleep(self._after_s / 2)
            if self._bus.is_connected:
                await self.look()

    async def look(self) -> None:
        """Looks once."""
        model_of = {consumer: model for model in self._models() for consumer in model_consumers(self._registry, model)}
        looks = await look_at(self._bus, list(model_of))
        models = {consumer.name: model for consumer, model in model_of.items()}
        standing: dict[str, float] = {}
        for name, seconds in self._standstill.take(looks).items():
            model, look = models[name], looks[name]
            standing[model] = max(seconds, standing.get(model, 0.0))
            if model not in self.standing:
                log.warning(
                    "the queue of %r stands still: %d request(s) and %d pull(s) wait at consumer %s, "
                    "and nothing was delivered for %.0f s",
                    model, look.pending, look.waiting, name, seconds,
                )  # fmt: skip
        for model in self.standing.keys() - standing.keys():
            log.warning("the queue of %r moves again, or nobody waits for it", model)
        self.standing = standing
