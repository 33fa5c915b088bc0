"""What the workers' engines count themselves: asked over the bus, since workers have no port, and shown with ours."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable, Iterator

import msgspec
from modelbus_broker import names
from modelbus_broker.connection import Bus
from modelbus_broker.errors import ModelBusError
from modelbus_broker.messages import Measure, WorkerRecord, encode
from prometheus_client import Metric, generate_latest
from prometheus_client.parser import text_string_to_metric_families

log = logging.getLogger(__name__)

ASK_S = 1.0
_ASK = encode(Measure())


class Measured(msgspec.Struct, frozen=True, kw_only=True):
    """What one worker said."""

    worker: str
    model: str
    text: str


async def measure(bus: Bus, workers: Iterable[WorkerRecord]) -> list[Measured]:
    """Asks all of them at once; one that does not answer in time is left out."""

    async def ask(worker: WorkerRecord) -> Measured | None:
        try:
            answer = await bus.request(names.control_subject(worker.id), _ASK, timeout_s=ASK_S)
        except (ModelBusError, TimeoutError):
            return None
        return Measured(worker=worker.id, model=worker.model, text=answer.data.decode(errors="replace"))

    found = await asyncio.gather(*(ask(worker) for worker in workers))
    return [measured for measured in found if measured is not None and measured.text]


def exposition(measured: Iterable[Measured]) -> bytes:
    """One text of all, in which ``modelbus_worker`` and ``modelbus_model`` tell whose a number is. Pure."""
    families: dict[str, Metric] = {}
    for one in measured:
        labels = {"modelbus_worker": one.worker, "modelbus_model": one.model}
        try:
            for family in text_string_to_metric_families(one.text):
                known = families.setdefault(family.name, Metric(family.name, family.documentation, family.type))
                if known.type == family.type:
                    known.samples += [s._replace(labels={**s.labels, **labels}) for s in family.samples]
        except ValueError as error:
            log.warning("the metrics of worker %s cannot be read: %s", one.worker, error)
    return generate_latest(_Families(families.values()))


class _Families:
    def __init__(self, families: Iterable[Metric]) -> None:
        self._families = families

    def collect(self) -> Iterator[Metric]:
        return iter(self._families)
