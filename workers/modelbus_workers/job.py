"""What a node tells a worker process to do: one JSON document on its standard input."""

from __future__ import annotations

import msgspec
from modelbus_broker.messages import Deployment
from modelbus_broker.settings import BusSettings


class WorkerJob(msgspec.Struct, frozen=True, kw_only=True):
    """One replica of one deployment. Secrets are resolved: the document never touches a disk or an argument list."""

    worker_id: str
    deployment: Deployment
    bus: BusSettings
    replica: int = 0
    node: str = ""
    gpus: list[int] = []
    params: dict[str, str] = {}  #: the engine's, secrets resolved
    secret_params: list[str] = []  #: names in ``params`` that must never be shown
    log_level: str = "INFO"
    usage_events: bool = True  #: off only to measure what they cost

    def __repr__(self) -> str:
        return f"WorkerJob(worker_id={self.worker_id!r}, deployment={self.deployment.name!r}, replica={self.replica})"


#: After its time for finishing a worker hands over what is left and ends within so many seconds, whatever hangs.
DRAIN_END_S = 12.0

#: Exit codes of a worker process. That its engine hung is a crash, as is anything else.
EXIT_STOPPED, EXIT_START_FAILED, EXIT_HUNG = 0, 3, 4
