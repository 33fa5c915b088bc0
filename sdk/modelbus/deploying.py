"""Bringing a model up and taking it down.

A deploy is a wish written to a bucket; nodes fulfil it. Here it is written, watched until every worker's self-test
is good and one real request came back through the queue, and taken back when that does not happen: a first
deploy that fails leaves nothing behind, a failed redeploy restores the revision before it.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING

import msgspec
from modelbus_broker.adapters import forget_adapters
from modelbus_broker.asking import CallOptions, smallest_task
from modelbus_broker.buckets import Bucket
from modelbus_broker.dead import bury_waiting
from modelbus_broker.errors import (
    ConfigurationError,
    Conflict,
    DeploymentFailed,
    ModelBusError,
    ModelNotFound,
    NoRoom,
    UndeployRefused,
)
from modelbus_broker.messages import (
    Deployment,
    NodeRecord,
    WorkerRecord,
    decode_claim,
    decode_deployment,
    encode,
)
from modelbus_broker.names import (
    BUCKET_CLAIMS,
    BUCKET_DEPLOYMENTS,
    BUCKET_FAILURES,
    BUCKET_WORKERS,
    deployment_key,
    random_token,
)
from modelbus_broker.sealing import seal
from modelbus_broker.topology import declare_bus, declare_model, queued, remove_model, running

from .answers import collect
from .readiness import ready_workers, situation
from .spec import DeploySpec, EngineChoice, engine_choice

if TYPE_CHECKING:
    from modelbus_broker.connection import Bus
    from modelbus_broker.publisher import Publisher
    from modelbus_broker.registry import Registry

#: Takes one line for people each time something changes.
Progress = Callable[[str], None]

#: While the workers of the revision before a failed one start again requests wait, at most so many seconds.
_RESTORED_S = 300.0
#: How long the workers of a taken back or undeployed deployment get to end beyond their drain time, seconds: more than
#: a node's own limit.
_GONE_S = 25.0


class DeployResult(msgspec.Struct, frozen=True, kw_only=True):
    """A deployment that can answer."""

    model: str
    deployment: str
    revision: str
    engine: str
    workers: int
    nodes: list[str]
    replaced: bool = False  #: there was an older revision
    took_s: float = 0.0


class UndeployResult(msgspec.Struct, frozen=True, kw_only=True):
    model: str
    deployments: list[str]
    dropped: int = 0  #: requests that waited and went to the dead letters


def no_progress(line: str) -> None:
    """Listens to nothing."""


async def deploy(
    bus: Bus, registry: Registry, publisher: Publisher, spec: DeploySpec, on_progress: Progress = no_progress
) -> DeployResult:
    """Brings a model up, or moves it to a new revision, and returns when it can answer.

    Raises:
        ConfigurationError: the spec cannot be meant as it stands; nothing was done.
        NoRoom: no node has what it asks for; the message says what is short on each.
        DeploymentFailed: it did not come up, with the engine's or provider's own words; everything is as before.
        Conflict: someone else deployed the same name meanwhile.
    """
    started = time.monotonic()
    choice = engine_choice(spec)
    await declare_bus(bus)
    if not registry.nodes:
        raise NoRoom("no node is running on this bus: start one with `modelbus start`")
    wish = _wish(spec, choice, registry.nodes.values())
    await declare_model(bus, spec.model, shares=spec.shares)
    try:
        async with _written(bus, registry, wish, spec.timeout_s) as previous:
            async with asyncio.timeout(spec.timeout_s):
                workers = await ready_workers(registry, wish, replaces=previous is not None, on_progress=on_progress)
                # Where an answer can go on after its worker is lost; workers and clients may not make consumers.
                compats = sorted({worker.compat for worker in workers if worker.compat})
                await declare_model(bus, spec.model, shares=spec.shares, compats=compats)
                on_progress("sending one request through the queue")
                await _try_request(publisher, wish, workers)
    except TimeoutError as error:
        raise DeploymentFailed(
            f"{wish.name} was not ready after {spec.timeout_s:g} s: {situation(wish, registry)}"
        ) from error
    await _forget_failures(bus, wish.name)
    return DeployResult(
        model=wish.model,
        deployment=wish.name,
        revision=wish.revision,
        engine=wish.engine,
        workers=len(workers),
        nodes=sorted({worker.node for worker in workers}),
        replaced=previous is not None,
        took_s=round(time.monotonic() - started, 3),
    )


async def undeploy(
    bus: Bus,
    registry: Registry,
    model: str,
    *,
    drain: bool = False,
    drop: bool = False,
    timeout_s: float = 600.0,
    on_progress: Progress = no_progress,
) -> UndeployResult:
    """Takes a model down: its workers finish what they run, its queue and its records go.

    With ``drain`` new requests are refused while those that wait and run are served, for at most ``timeout_s``; with
    ``drop`` what waits goes to the dead letters.

    Raises:
        ModelNotFound: it is not deployed.
        UndeployRefused: requests wait, and neither ``drain`` nor ``drop`` says what to do with them; or the time was
            up, and the model is served as before.
        Conflict: someone else deploys it just now.
    """
    deployments = registry.deployments_of(model)
    if not deployments:
        raise ModelNotFound(f"model {model!r} is not deployed; `modelbus models` lists those that are")
    waiting = await queued(bus, model)
    if waiting and not (drain or drop):
        raise UndeployRefused(
            f"{waiting} request(s) wait for {model!r}: --drain serves them first, --drop moves them to the dead letters"
        )
    if drain:
        async with _closed(bus, deployments):
            await _drained(bus, registry, model, timeout_s, on_progress)
    bucket = Bucket(bus, BUCKET_DEPLOYMENTS)
    for deployment in deployments:
        await bucket.delete(deployment_key(deployment.name))
    on_progress("stopping the workers")
    for deployment in deployments:
        await _gone(bus, registry, deployment)
    dropped = await bury_waiting(bus, model)
    await remove_model(bus, model)
    await forget_adapters(bus, model)
    for deployment in deployments:
        await _forget_failures(bus, deployment.name)
    return UndeployResult(model=model, deployments=sorted(item.name for item in deployments), dropped=dropped)


def _wish(spec: DeploySpec, choice: EngineChoice, nodes: Iterable[NodeRecord]) -> Deployment:
    return Deployment(
        name=spec.deployment,
        model=spec.model,
        engine=choice.engine,
        revision=random_token(10),
        engine_params=choice.params,
        sealed=_sealed(choice.secrets, nodes),
        model_path=spec.model_path,
        pretrained_model_type=spec.pretrained_model_type,
        replicas=spec.num_workers,
        slots=spec.worker_concurrency,
        cpus=spec.cpus_per_worker,
        memory_mb=spec.memory_mb,
        gpus=spec.gpus_per_worker,
        require=choice.require,
        shares=spec.shares,
        queue_limit=spec.queue_limit,
        budget_ms=round(spec.budget_s * 1000),
        priority=spec.priority,
        drain_s=spec.drain_s,
        engine_stall_s=spec.engine_stall_s,
        orphan_grace_s=spec.orphan_grace_s,
        exclusive=spec.exclusive,
        created_ms=time.time_ns() // 1_000_000,
    )


def _sealed(secrets: Mapping[str, str], nodes: Iterable[NodeRecord]) -> dict[str, str]:
    if not secrets:
        return {}
    keys = {node.seal_key for node in nodes if node.seal_key}
    if len(keys) != 1:
        raise ConfigurationError(
            f"{', '.join(sorted(secrets))} cannot be sealed: "
            + ("no node offers a key for that" if not keys else "the nodes do not share one cluster key")
            + "; write env:NAME or file:PATH to have it read on the node"
        )
    (key,) = keys
    return {name: seal(key, value) for name, value in secrets.items()}


@asynccontextmanager
async def _written(
    bus: Bus, registry: Registry, wish: Deployment, timeout_s: float
) -> AsyncIterator[Deployment | None]:
    """Writes the wish and gives the one it replaces; leaving by an error, cancellation too, takes it back.

    While one revision replaces another there may be moments without a ready worker: then requests wait.
    """
    bucket, key = Bucket(bus, BUCKET_DEPLOYMENTS), deployment_key(wish.name)
    entry = await bucket.get(key)
    previous = decode_deployment(entry.value) if entry and not entry.deleted else None
    if previous is not None and previous.model != wish.model:
        raise Conflict(f"deployment {wish.name!r} serves model {previous.model!r}: choose another --name")
    try:
        if previous is not None and entry is not None:
            seq = await bucket.update(key, encode(_patient(wish, timeout_s)), entry.seq)
        else:
            seq = await bucket.create(key, encode(wish))
    except Conflict as error:
        raise Conflict(f"someone else deploys {wish.name!r} just now: try again when that is done") from error
    try:
        yield previous
    except BaseException:
        # Shielded, so that a second Ctrl-C does not leave half of it.
        await asyncio.shield(asyncio.create_task(_take_back(bus, registry, wish, previous, seq), name="take-back"))
        raise


def _patient(wish: Deployment, seconds: float) -> Deployment:
    return msgspec.structs.replace(wish, wait_until_ms=int((time.time() + seconds) * 1000), closing=False)


async def _take_back(bus: Bus, registry: Registry, wish: Deployment, previous: Deployment | None, seq: int) -> None:
    bucket, key = Bucket(bus, BUCKET_DEPLOYMENTS), deployment_key(wish.name)
    try:
        if previous is not None:
            await bucket.update(key, encode(_patient(previous, _RESTORED_S)), seq)
        else:
            await bucket.delete(key, seq)
    except Conflict:
        # Another deploy or undeploy of this name came after ours: what lies there now is theirs.
        return
    if previous is None:
        await _gone(bus, registry, wish)
        if not [item for item in registry.deployments_of(wish.model) if item.name != wish.name]:
            await remove_model(bus, wish.model)
    await _forget_failures(bus, wish.name)


async def _try_request(publisher: Publisher, wish: Deployment, workers: list[WorkerRecord]) -> None:
    """One real request through the queue to the new revision: what the self-test cannot see is the bus between."""
    task = smallest_task(workers[0].capabilities.tasks)
    if task is None:
        return
    try:
        call = await publisher.submit(wish.model, task, CallOptions(revision=wish.revision, wait=True, stream=False))
        await collect(call)
    except ModelBusError as error:
        raise DeploymentFailed(
            f"the workers are ready, but a test request failed: {error.message}", upstream=error.upstream
        ) from error


@asynccontextmanager
async def _closed(bus: Bus, deployments: Iterable[Deployment]) -> AsyncIterator[None]:
    """The deployments take no new requests; leaving by an error, cancellation too, opens them again."""
    bucket, closed = Bucket(bus, BUCKET_DEPLOYMENTS), dict[str, tuple[Deployment, int]]()

    async def reopen() -> None:
        for key, (deployment, seq) in closed.items():
            with suppress(Conflict):  # what lies there now is someone else's
                await bucket.update(key, encode(deployment), seq)

    try:
        for deployment in deployments:
            key = deployment_key(deployment.name)
            entry = await bucket.get(key)
            if entry is None or entry.deleted or decode_deployment(entry.value).revision != deployment.revision:
                raise Conflict(f"someone else deploys {deployment.name!r} just now: try again when that is done")
            seq = await bucket.update(key, encode(msgspec.structs.replace(deployment, closing=True)), entry.seq)
            closed[key] = (msgspec.structs.replace(deployment, closing=False), seq)
        yield
    except BaseException:
        await asyncio.shield(asyncio.create_task(reopen(), name="reopen"))
        raise


async def _drained(bus: Bus, registry: Registry, model: str, timeout_s: float, on_progress: Progress) -> None:
    try:
        async with asyncio.timeout(timeout_s):
            while waiting := await queued(bus, model) + await running(bus, model):
                on_progress(f"{waiting} request(s) to go")
                await asyncio.sleep(0.2)
    except TimeoutError as error:
        raise UndeployRefused(
            f"requests still wait for {model!r} after {timeout_s:g} s of draining, and it takes new ones again; "
            "--drop does not wait"
        ) from error


async def _gone(bus: Bus, registry: Registry, deployment: Deployment) -> None:
    """Waits until no worker of the deployment is alive; its node ends it in bounded time."""
    await _ended(bus, registry, deployment.name, deployment.drain_s + _GONE_S)
    # What they said last would be shown until it expires.
    for worker in list(registry.workers.values()):
        if worker.deployment == deployment.name:
            await Bucket(bus, BUCKET_WORKERS).delete(worker.id)


async def _ended(bus: Bus, registry: Registry, deployment: str, timeout_s: float) -> None:
    end = time.monotonic() + timeout_s
    while time.monotonic() < end:
        alive = [
            w for w in registry.workers.values() if w.deployment == deployment and w.state not in ("gone", "failed")
        ]
        # A worker that has just been started has a claim and no record yet.
        if not alive and not await _claimed(bus, registry, deployment):
            return
        await registry.changed(0.5)


async def _claimed(bus: Bus, registry: Registry, deployment: str) -> bool:
    """Whether a node that lives still has a replica; the claims of a dead one expire by themselves."""
    prefix = deployment_key(deployment) + "."
    for key, entry in (await Bucket(bus, BUCKET_CLAIMS).all()).items():
        if key.startswith(prefix) and not entry.deleted and decode_claim(entry.value).node in registry.nodes:
            return True
    return False


async def _forget_failures(bus: Bus, deployment: str) -> None:
    bucket, prefix = Bucket(bus, BUCKET_FAILURES), deployment_key(deployment) + "."
    for key, entry in (await bucket.all()).items():
        if key.startswith(prefix) and not entry.deleted:
            await bucket.delete(key)
