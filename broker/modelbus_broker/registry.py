"""What is deployed and what is alive, as one process sees it now."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence

from . import names
from .buckets import BucketReader
from .connection import Bus
from .messages import (
    AdapterRecord,
    Deployment,
    NodeRecord,
    StartFailure,
    WorkerRecord,
    decode_adapter,
    decode_deployment,
    decode_node,
    decode_start_failure,
    decode_worker,
)
from .messages.search import SEARCH_ENGINE

RECORD_TTL_S = 10.0


class Registry:
    """Reads the buckets of deployments, adapters, workers, nodes and start failures, and keeps up with them."""

    def __init__(self, bus: Bus) -> None:
        self._deployments = BucketReader(bus, names.BUCKET_DEPLOYMENTS, decode_deployment)
        self._workers = BucketReader(bus, names.BUCKET_WORKERS, decode_worker, ttl_s=RECORD_TTL_S, trust=True)
        self._nodes = BucketReader(bus, names.BUCKET_NODES, decode_node, ttl_s=RECORD_TTL_S, trust=True)
        self._failures = BucketReader(bus, names.BUCKET_FAILURES, decode_start_failure)
        self._adapters = BucketReader(bus, names.BUCKET_ADAPTERS, decode_adapter)
        self._readers = (self._deployments, self._workers, self._nodes, self._failures, self._adapters)
        # Every request asks for these: they are put together once for each change.
        self._version = -1
        self._deployed: dict[str, list[Deployment]] = {}
        self._serving: set[str] = set()
        self._adapted: dict[str, dict[str, AdapterRecord]] = {}

    async def start(self) -> None:
        """Reads everything once and keeps up from then on.

        Raises:
            BusUnavailable: a bucket cannot be read; `declare_bus` makes them.
        """
        await asyncio.gather(*(reader.start() for reader in self._readers))

    async def close(self) -> None:
        await asyncio.gather(*(reader.close() for reader in self._readers))

    @property
    def ready(self) -> bool:
        return all(reader.ready for reader in self._readers)

    async def refresh(self) -> None:
        """Reads everything again now, for a caller who has just written."""
        await asyncio.gather(*(reader.reread() for reader in self._readers))

    async def look_again(self, model: str) -> None:
        """Reads the deployments of a model again now: their workers may have said more already than is known of them.

        Raises:
            BusUnavailable: the bucket does not answer.
        """
        for deployment in self.deployments_of(model):
            await self._deployments.look(names.deployment_key(deployment.name))

    async def changed(self, timeout_s: float) -> bool:
        """Waits until anything has changed; False if nothing did within the time."""
        waits = [asyncio.ensure_future(reader.changed(timeout_s)) for reader in self._readers]
        try:
            done, _ = await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
            return any(wait.result() for wait in done)
        finally:
            for wait in waits:
                wait.cancel()
            # Only a cancellation of our own is raised here, and it must not get lost.
            await asyncio.gather(*waits, return_exceptions=True)

    @property
    def deployments(self) -> Mapping[str, Deployment]:
        """By the key ``names.deployment_key(name)``."""
        return self._deployments.values

    @property
    def workers(self) -> Mapping[str, WorkerRecord]:
        """Live ones, by id."""
        return self._workers.values

    @property
    def nodes(self) -> Mapping[str, NodeRecord]:
        """Live ones, by id."""
        return self._nodes.values

    @property
    def failures(self) -> Mapping[str, StartFailure]:
        """By the key ``names.failure_key(...)``."""
        return self._failures.values

    def deployment(self, name: str) -> Deployment | None:
        return self._deployments.values.get(names.deployment_key(name))

    def models(self) -> list[str]:
        """The names that clients can ask for, sorted."""
        return sorted({deployment.model for deployment in self.deployments.values()})

    def services(self) -> set[str]:
        """Those of ``models()`` that are no models but search services."""
        return {deployment.model for deployment in self.deployments.values() if deployment.engine == SEARCH_ENGINE}

    def deployments_of(self, model: str) -> Sequence[Deployment]:
        self._index()
        return self._deployed.get(model, ())

    def adapters_of(self, model: str) -> Mapping[str, AdapterRecord]:
        """By name, sorted."""
        self._index()
        return self._adapted.get(model, {})

    def is_served(self, model: str) -> bool:
        """A worker of the model is alive and ready."""
        self._index()
        return model in self._serving

    def _index(self) -> None:
        version = self._deployments.version + self._workers.version + self._adapters.version
        if version == self._version:
            return
        self._version, self._deployed, self._serving, self._adapted = version, {}, set(), {}
        for deployment in self.deployments.values():
            self._deployed.setdefault(deployment.model, []).append(deployment)
        for worker in self.workers.values():
            if worker.state == "ok":
                self._serving.add(worker.model)
        for record in sorted(self._adapters.values.values(), key=lambda record: record.name):
            self._adapted.setdefault(record.model, {})[record.name] = record

    def workers_of(self, model: str, state: str = "ok") -> list[WorkerRecord]:
        """Live workers of a model in a state ("" = any), by replica."""
        found = [w for w in self.workers.values() if w.model == model and (not state or w.state == state)]
        return sorted(found, key=lambda worker: (worker.deployment, worker.replica, worker.id))
