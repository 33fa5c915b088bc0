"""The replicas that a node holds, and what room they leave."""

from __future__ import annotations

import time

import msgspec
from modelbus_broker import names
from modelbus_broker.messages import Deployment, StartFailure
from modelbus_broker.registry import Registry

from .replica import Replica
from .resources import Offer, offer_of
from .room import Free, Share, free, free_of, why_no_room

#: Room that does not come within so many seconds after a worker was told to end is no longer waited for.
_ROOM_COMES_S = 30.0


class Holdings:
    """What one node has claimed of what it offers."""

    def __init__(self, node: str, offer: Offer, registry: Registry) -> None:
        self.node = node
        self.offer = offer
        self.registry = registry
        self.replicas: dict[str, Replica] = {}  #: by claim key
        #: Failures that we wrote, by key: the reader may not have them yet.
        self._failures: dict[str, StartFailure] = {}

    def exclude(self, failure_key: str, failure: StartFailure) -> None:
        """A revision could not be started here: it is not tried again, or only from ``again_ms`` on."""
        self._failures[failure_key] = failure

    def failure(self, deployment: Deployment) -> StartFailure | None:
        """The last one here of this revision."""
        key = names.failure_key(deployment.name, deployment.revision, self.node)
        return self._failures.get(key) or self.registry.failures.get(key)

    def is_excluded(self, deployment: Deployment) -> bool:
        failure = self.failure(deployment)
        return failure is not None and not 0 < failure.again_ms <= time.time_ns() // 1_000_000

    def forgive(self, deployment: Deployment) -> str:
        """It runs after all. Returns the key of the failure that is over, "" if there was none."""
        if self.failure(deployment) is None:
            return ""
        key = names.failure_key(deployment.name, deployment.revision, self.node)
        self._failures.pop(key, None)
        return key

    def left(self, *, without: Replica | None = None) -> Free:
        """What is free of the offer; ``without``: as if that replica's reservation were not there."""
        taken: list[Share] = []
        for replica in self.replicas.values():
            if replica is without:
                taken += [worker.share for worker in replica.workers()]
            else:
                taken += replica.shares()
        return free(self.offer, taken)

    def why_no_room_after(self, deployment: Deployment, replica: Replica) -> str:
        """Why a new revision of a replica would not fit here even when its old worker has ended."""
        others = [share for other in self.replicas.values() if other is not replica for share in other.shares()]
        return why_no_room(deployment, self.offer, free(self.offer, others))

    def room_is_coming(self) -> bool:
        """Whether a worker is about to end: then a roll rather waits than stops a worker for want of room."""
        stopping = (worker.stopping_at for replica in self.replicas.values() for worker in replica.workers())
        return any(at and time.monotonic() - at < _ROOM_COMES_S for at in stopping)

    def fits_elsewhere(self, deployment: Deployment) -> bool:
        """Whether another live node seems to have room; whether the model is there, only that node can say."""
        wish = msgspec.structs.replace(deployment, model_path="")
        return any(
            not why_no_room(wish, offer_of(node), free_of(node))
            for node in self.registry.nodes.values()
            if node.id != self.node
        )
