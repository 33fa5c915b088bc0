"""The asyncio client: models behind the bus as typed calls.

``async with modelbus.connect() as client`` opens one connection; everything is asked over it. Cancelling the task
that waits for an answer cancels the request on the bus.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Mapping
from types import TracebackType
from typing import Any, Self

from modelbus_broker.adapters import add_adapter, remove_adapter, resolve
from modelbus_broker.asking import CallOptions
from modelbus_broker.cancelling import cancel
from modelbus_broker.connection import Bus
from modelbus_broker.errors import BusUnavailable, ModelNotFound
from modelbus_broker.jobs import KEPT_S, Jobs, JobStatus
from modelbus_broker.messages import (
    AdapterRecord,
    Cancelled,
    Capabilities,
)
from modelbus_broker.names import model_token
from modelbus_broker.publisher import Publisher
from modelbus_broker.registry import Registry
from modelbus_broker.settings import BusSettings, bus_settings
from modelbus_broker.topology import declare_bus, depths

from . import deploying
from .answer_types import (
    ChatAnswer,
    answer_of,
)
from .hooks import JobCall
from .jobs.batch import Batch, Progress, Row, RowOptions, map_rows, open_batch, submit_batch
from .jobs.job import Job
from .jobs.submitting import submit_job
from .model_client import Messages, ModelClient, chat_task
from .spec import DeploySpec
from .stat import ModelInfo, ModelStat, capabilities_of, model_info, stat_of


class Client(ModelClient):
    """An open connection to the bus. Made by :func:`connect`."""

    publisher: Publisher

    def __init__(self, bus: Bus, registry: Registry, publisher: Publisher) -> None:
        self.bus = bus
        self.registry = registry
        self.publisher = publisher
        self.jobs = Jobs(publisher)  #: of anybody on this bus

    @classmethod
    async def open(cls, settings: BusSettings, *, declare: bool = False) -> Client:
        """Connects; with ``declare`` it makes the streams and buckets that a fresh bus lacks.

        Raises:
            BusUnavailable: no bus answers there, or it has never been declared.
            AuthenticationFailed: it refuses the credentials.
        """
        bus = await Bus.connect(settings, name="modelbus-sdk")
        try:
            if declare:
                await declare_bus(bus)
            registry = Registry(bus)
            await registry.start()
            publisher = Publisher(bus, registry, kind="sdk")
            await publisher.start()
        except BaseException:
            await bus.close()
            raise
        return cls(bus, registry, publisher)

    async def close(self) -> None:
        """Cancels what still runs and disconnects."""
        await self.publisher.close()
        await self.registry.close()
        await self.bus.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    def capabilities(self, model: str) -> Capabilities:
        """See :meth:`ModelClient.capabilities`; nothing is known, and all is off, while no worker is ready.

        Raises:
            ModelNotFound: it is not deployed.
        """
        return capabilities_of(self.registry, model)

    def revision(self, model: str) -> str:
        """See :meth:`ModelClient.revision`. Raises ModelNotFound where an adapter is not known."""
        name, record = resolve(self.registry, model)
        revisions = sorted(f"{one.name}@{one.revision}" for one in self.registry.deployments_of(name))
        return " ".join([*revisions, record.fingerprint if record is not None else ""]).strip()

    # Durable work: see ``modelbus.jobs``

    async def submit(
        self,
        model: str,
        messages: Messages,
        *,
        kept_s: int = KEPT_S,
        name: str = "",
        labels: Mapping[str, str] | None = None,
        options: CallOptions | None = None,
        **fields: Any,
    ) -> Job[ChatAnswer]:
        """Asks as :meth:`chat` does, but durably: from the return of this call on the answer needs neither this program
        nor any one worker. ``await job`` here, or ``await client.job(job.id)`` in any other program, gives it.

        Args:
            kept_s: how long the answer is kept from its end on: 60 s to 30 days, 24 h if nothing is said.
            name, labels: free; :meth:`find_jobs` shows them.
            options: its ``budget_ms`` is how long the job may take, at most 24 h, which it is if nothing is said.

        Raises:
            ModelNotFound, QueueFull, BusUnavailable: it is not in the queue.
            InvalidRequest: a field or a time is wrong.
        """
        task = chat_task(messages, fields)
        call = JobCall(
            model=model,
            task=task,
            options=options or CallOptions(),
            kept_s=kept_s,
            name=name,
            labels=dict(labels or {}),
        )
        return self.job((await submit_job(self.jobs, call)).id)

    def job(self, job_id: str) -> Job[ChatAnswer]:
        """The job of this id, whoever submitted it. Whether there is one shows when it is asked for something."""
        return Job(self.jobs, job_id, answer_of)

    async def find_jobs(
        self, *, model: str = "", batch: str | None = None, tenant: str | None = None, limit: int = 100
    ) -> list[JobStatus]:
        """The newest jobs first, of anybody; see ``Jobs.find``."""
        return await self.jobs.find(model=model, batch=batch, tenant=tenant, limit=limit)

    async def batch(
        self,
        model: str,
        rows: Iterable[Messages],
        *,
        name: str = "",
        kept_s: int = KEPT_S,
        options: CallOptions | None = None,
        **fields: Any,
    ) -> Batch[ChatAnswer]:
        """Submits a job for each row, in lane lo, and returns when all are in the queue.

        Args:
            name: under the same name the same rows are taken up and not asked again, also by another program; rows that
                failed, or whose text has changed, are asked anew. ``open_batch(name)`` finds them.

        Raises:
            ModelBusError: as :meth:`submit`; a full queue is waited for.
        """
        tasks = [chat_task(messages, fields) for messages in rows]
        return await submit_batch(self.jobs, tasks, _rows(model, name, kept_s, options), answer_of)

    async def open_batch(self, name: str) -> Batch[ChatAnswer]:
        """The batch of this name, whoever submitted it. Raises NotFound."""
        return await open_batch(self.jobs, name, answer_of)

    async def map(
        self,
        model: str,
        rows: Iterable[Messages],
        *,
        concurrency: int = 64,
        progress: Callable[[Progress], None] | None = None,
        name: str = "",
        kept_s: int = KEPT_S,
        options: CallOptions | None = None,
        **fields: Any,
    ) -> list[Row[ChatAnswer]]:
        """Asks all rows, in lane lo, at most ``concurrency`` of them at a time, and returns what became of each, in order.

        A row that fails has its error in its place. With a ``name`` a program that was killed goes on where it stopped.

        Args:
            progress: called after each row.
            name: see :meth:`batch`. Without one the rows are taken back when this call is cancelled.

        Raises:
            InvalidRequest: a row or a field is wrong.
        """
        tasks = [chat_task(messages, fields) for messages in rows]
        row = _rows(model, name, kept_s, options)
        return await map_rows(self.jobs, tasks, row, answer_of, concurrency=concurrency, progress=progress)

    async def cancel(self, request_id: str) -> Cancelled:
        """Cancels a request of anybody by its id; says what had become of it until then.

        Raises:
            InvalidRequest: the text is no request id.
            BusUnavailable: the bus does not answer.
        """
        return await cancel(self.bus, request_id)

    async def models(self) -> list[ModelInfo]:
        """What is deployed, by name, with how busy it is."""
        await self.registry.refresh()
        try:
            waiting = await depths(self.bus)
        except BusUnavailable:
            waiting = {}
        found = []
        for model in self.registry.models():
            workers = self.registry.workers_of(model)
            busy = sum(worker.busy for worker in workers)
            # The streams hold what runs as well.
            queued = max(waiting.get(model_token(model), 0) - busy, 0)
            found.append(model_info(model, self.registry.deployments_of(model), workers, queued=queued))
        return found

    async def stat(self, model: str) -> ModelStat:
        """How busy the workers of a model are.

        Raises:
            ModelNotFound: it is not deployed.
        """
        await self.registry.refresh()
        return stat_of(self.registry, model)

    async def adapters(self, model: str = "") -> list[AdapterRecord]:
        """The adapters of a model, or of all: each is asked for as ``model:name``.

        Raises:
            ModelNotFound: it is not deployed.
        """
        await self.registry.refresh()
        models = self.registry.models()
        if model and model not in models:
            raise ModelNotFound(f"the model {model!r} is not deployed", param="model")
        return [record for name in models if model in ("", name) for record in self.registry.adapters_of(name).values()]

    async def add_adapter(self, model: str, name: str, path: str, *, replace: bool = False) -> AdapterRecord:
        """See :func:`modelbus_broker.adapters.add_adapter`."""
        return await add_adapter(self.bus, self.registry, model, name, path, replace=replace)

    async def remove_adapter(self, model: str, name: str) -> None:
        """See :func:`modelbus_broker.adapters.remove_adapter`."""
        await remove_adapter(self.bus, self.registry, model, name)

    async def deploy(
        self, spec: DeploySpec, on_progress: deploying.Progress = deploying.no_progress
    ) -> deploying.DeployResult:
        """See :func:`modelbus.deploying.deploy`."""
        return await deploying.deploy(self.bus, self.registry, self.publisher, spec, on_progress)

    async def undeploy(
        self,
        model: str,
        *,
        drain: bool = False,
        drop: bool = False,
        timeout_s: float = 600.0,
        on_progress: deploying.Progress = deploying.no_progress,
    ) -> deploying.UndeployResult:
        """See :func:`modelbus.deploying.undeploy`."""
        return await deploying.undeploy(
            self.bus, self.registry, model, drain=drain, drop=drop, timeout_s=timeout_s, on_progress=on_progress
        )


class Connecting:
    """What :func:`connect` gives: await it for a client, or open it with ``async with``."""

    def __init__(self, settings: BusSettings) -> None:
        self._settings = settings
        self._client: Client | None = None

    def __await__(self) -> Generator[Any, None, Client]:
        return Client.open(self._settings).__await__()

    async def __aenter__(self) -> Client:
        self._client = await Client.open(self._settings)
        return self._client

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._client is not None:
            await self._client.close()


def connect(
    address: str = "", creds: str = "", *, tls_ca: str = "", tls_cert: str = "", tls_key: str = ""
) -> Connecting:
    """A client of the bus: ``client = await connect()``, or ``async with connect() as client``.

    Args:
        address: ``nats://HOST:PORT``; "" or "auto" is MODELBUS_ADDRESS, else the bus of `modelbus start` on this host.
        creds: path of a credential file; "" is MODELBUS_CREDS, else that of this host's bus.

    Raises:
        BusUnavailable: nothing says where the bus is.
    """
    return Connecting(bus_settings(address, creds, tls_ca=tls_ca, tls_cert=tls_cert, tls_key=tls_key))


def _rows(model: str, name: str, kept_s: int, options: CallOptions | None) -> RowOptions:
    return RowOptions(model=model, name=name, kept_s=kept_s, options=options or CallOptions(lane="lo"))
