"""The node's loops: claim what fits, run it, renew the claims, say how things are.

The loops read the buckets through readers that keep up by themselves, decide with the pure functions of ``claiming``
and ``room``, and act. Each looks again when something has changed, and once a second in any case.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import importlib.metadata
import json
import logging
import os
import re
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Iterator
from pathlib import Path
from typing import Any

import msgspec
from modelbus_broker import names
from modelbus_broker.buckets import Bucket, BucketReader
from modelbus_broker.connection import Bus, JetStreamError, Msg
from modelbus_broker.credentials import Credential, load_credential
from modelbus_broker.errors import BusUnavailable, ConfigurationError, Conflict, ModelBusError
from modelbus_broker.messages import (
    Claim,
    Deployment,
    NodeRecord,
    StartFailure,
    WorkerRecord,
    decode_claim,
    decode_worker,
    encode,
)
from modelbus_broker.registry import Registry
from modelbus_broker.sealing import make_seal_key, public_seal_key
from modelbus_broker.topology import declare_bus, declare_memory

from modelbus_workers.job import WorkerJob

from .claiming import after_refusal, backoff_s, held_off, may_claim, next_roll, wished
from .processes import Keeper, WorkerProcess, describe_end, log_path, tail
from .replica import Replica
from .resources import Offer, offer, offer_of
from .room import Free, Share, free, free_of, place, why_no_room
from .secrets import engine_params
from .settings import NodeSettings

log = logging.getLogger(__name__)

LOGS = "mb.logs"
#: A worker that takes nothing new finishes what it holds and ends by itself; background requests may take a day.
_RETIRE_S = 24 * 3600.0
#: A worker that was ok for so long has recovered from its earlier crashes.
_RECOVERED_S = 60.0


class Node:
    """The agent of one host. Made by :func:`running_node`."""

    def __init__(self, settings: NodeSettings, node_id: str, bus: Bus, seal_key: str) -> None:
        self.id = node_id
        self.settings = settings
        self.bus = bus
        self.registry = Registry(bus)
        self.claims: BucketReader[Claim] = BucketReader(
            bus, names.BUCKET_CLAIMS, decode_claim, ttl_s=float(settings.claim_ttl_s)
        )
        self.replicas: dict[str, Replica] = {}
        self.offer: Offer = offer(
            cpus=settings.cpus, memory_mb=settings.memory_mb, gpus=settings.gpus, labels=settings.labels
        )
        #: Set to end workers without waiting for them.
        self.hurry = asyncio.Event()
        self._seal_key = seal_key
        self._keeper = Keeper()
        self._refused: dict[str, str] = {}
        self._excluded: set[str] = set()  #: failure keys that we wrote: the reader may not have them yet
        self._step_wake, self._claim_wake, self._renew_wake = asyncio.Event(), asyncio.Event(), asyncio.Event()
        self._reconnected_at = float("-inf")
        self._published: NodeRecord | None = None
        self._started_ms = time.time_ns() // 1_000_000
        self._tasks: set[asyncio.Task[None]] = set()
        self._leaving = False

    async def run(self, stop: asyncio.Event) -> None:
        """Works until ``stop`` is set; then ends all workers and releases all claims.

        Raises:
            BusUnavailable: the buckets cannot be read at the start, or the connection was closed for good.
        """
        self._keeper.start()
        try:
            await self.registry.start()
            await self.claims.start()
            self.bus.on_reconnect(self._on_reconnect)
            await self.bus.subscribe(LOGS, self._on_logs)
            loops = {
                asyncio.create_task(loop, name=name)
                for name, loop in (
                    ("registry", self._follow(self.registry)),
                    ("claims", self._follow(self.claims)),
                    ("claim", self._claim_loop()),
                    ("step", self._step_loop()),
                    ("renew", self._renew_loop()),
                    ("heartbeat", self._heartbeat_loop()),
                )
            }
            ends: set[asyncio.Task[Any]] = {
                asyncio.create_task(stop.wait()),
                asyncio.create_task(self.bus.closed.wait()),
            }
            try:
                done, _ = await asyncio.wait({*loops, *ends}, return_when=asyncio.FIRST_COMPLETED)
                for task in done & loops:
                    task.result()  # a loop only ends by a fault of ours
            finally:
                await self._leave(loops, ends)
            if not stop.is_set():
                raise BusUnavailable("the bus has closed the connection for good")
        finally:
            self._keeper.close()
            await self.claims.close()
            await self.registry.close()

    # Claiming.

    async def _claim_loop(self) -> None:
        while not self._leaving:
            await _wait(self._claim_wake, 1.0)
            try:
                await self._claim_what_fits()
            except (BusUnavailable, JetStreamError) as error:
                log.info("nothing can be claimed now: %s", error)

    async def _claim_what_fits(self) -> None:
        refused: dict[str, str] = {}
        for key, (deployment, number) in sorted(wished(self.registry.deployments.values()).items()):
            if self._is_excluded(deployment):
                continue
            held = self.replicas.get(key)
            if held is not None and held.deployment.revision != deployment.revision:
                if why := self._why_no_room_after(deployment, held):
                    refused[f"{deployment.name}.{deployment.revision}"] = why
            if not self._is_free(key):
                continue
            why = why_no_room(deployment, self.offer, self._left())
            if why:
                refused[f"{deployment.name}.{deployment.revision}"] = why
                continue
            if held_off(time.monotonic() - self._reconnected_at, self.settings.hold_off_s):
                continue
            # Nodes that hold less come first, so replicas spread.
            await asyncio.sleep(self.settings.spread_s * len(self.replicas))
            share = place(deployment, self._left())
            if share is not None and self._is_free(key):
                await self._claim(key, deployment, number, share)
        self._refused = refused

    async def _claim(self, key: str, deployment: Deployment, number: int, share: Share) -> None:
        bucket = self.claims.bucket
        entry = await bucket.get(key)
        if not may_claim(entry, self.id):
            return
        replica = Replica(key, deployment, number, entry.seq if entry else 0, share)
        try:
            replica.seq = await bucket.update(
                key, encode(replica.claim(self.id)), replica.seq, ttl_s=self.settings.claim_ttl_s
            )
        except Conflict:
            return  # another node was faster
        log.info("claimed %s (revision %s)", replica, deployment.revision)
        self.replicas[key] = replica
        self._wake()

    def _is_free(self, key: str) -> bool:
        claim = self.claims.values.get(key)
        return not self._leaving and key not in self.replicas and (claim is None or claim.node == self.id)

    def _is_excluded(self, deployment: Deployment) -> bool:
        key = names.failure_key(deployment.name, deployment.revision, self.id)
        return key in self.registry.failures or key in self._excluded

    def _left(self, *, without: Replica | None = None) -> Free:
        """What is free of the offer; ``without``: as if that replica's reservation were not there."""
        taken: list[Share] = []
        for replica in self.replicas.values():
            if replica is without:
                taken += [worker.share for worker in replica.workers()]
            else:
                taken += replica.shares()
        return free(self.offer, taken)

    def _why_no_room_after(self, deployment: Deployment, replica: Replica) -> str:
        """Why a new revision of a replica would not fit here even when its old worker has ended."""
        others = [share for other in self.replicas.values() if other is not replica for share in other.shares()]
        return why_no_room(deployment, self.offer, free(self.offer, others))

    def _room_is_coming(self) -> bool:
        """Whether a worker is about to end: then a roll rather waits than stops a worker for want of room."""
        stopping = (worker.stopping_at for replica in self.replicas.values() for worker in replica.workers())
        return any(at and time.monotonic() - at < self.settings.stop_grace_s for at in stopping)

    def _fits_elsewhere(self, deployment: Deployment) -> bool:
        """Whether another live node seems to have room; whether the model is there, only that node can say."""
        wish = msgspec.structs.replace(deployment, model_path="")
        return any(
            not why_no_room(wish, offer_of(node), free_of(node))
            for node in self.registry.nodes.values()
            if node.id != self.id
        )

    # Keeping claims.

    async def _renew_loop(self) -> None:
        while True:
            await _wait(self._renew_wake, self.settings.renew_s)
            await asyncio.gather(*(self._renew(replica) for replica in list(self.replicas.values())))

    async def _renew(self, replica: Replica) -> None:
        async with replica.writing:
            if replica.released:
                return
            try:
                await self._write_claim(replica)
            except (BusUnavailable, JetStreamError) as error:
                # Nothing is stopped: the worker may be fine, and nobody can claim while the bus is away.
                log.info("the claim of %s could not be renewed: %s", replica, error)
        silent_s = time.monotonic() - replica.renewed_at
        if replica.deployment.exclusive and silent_s > self.settings.exclusive_stop_s:
            log.warning("%s is exclusive and its claim was not renewed for %.0f s: stopping it", replica, silent_s)
            self._close(replica, 5.0)

    async def _write_claim(self, replica: Replica) -> None:
        bucket = self.claims.bucket
        value = encode(replica.claim(self.id))
        try:
            replica.seq = await bucket.update(replica.key, value, replica.seq, ttl_s=self.settings.claim_ttl_s)
        except Conflict:
            entry = await bucket.get(replica.key)
            match after_refusal(entry, self.id):
                case "stop":
                    log.warning("another node has claimed %s: stopping it here", replica)
                    replica.released = True  # it is not ours to release
                    self._close(replica, 5.0)
                    return
                case "go on" | "claim":
                    # A second refusal means that someone else writes now: the next renewal finds out who.
                    with contextlib.suppress(Conflict):
                        replica.seq = await bucket.update(
                            replica.key, value, entry.seq if entry else 0, ttl_s=self.settings.claim_ttl_s
                        )
        replica.renewed_at = time.monotonic()

    async def _on_reconnect(self) -> None:
        self._reconnected_at = time.monotonic()
        if _may_administer(self.settings):
            with contextlib.suppress(JetStreamError, BusUnavailable):
                await declare_memory(self.bus)
        self._published = None
        self._renew_wake.set()
        self._wake()

    # Running replicas.

    async def _step_loop(self) -> None:
        while not self._leaving:
            await _wait(self._step_wake, 0.5)
            for replica in list(self.replicas.values()):
                if self._leaving:
                    return
                try:
                    await self._step(replica)
                except (BusUnavailable, JetStreamError) as error:
                    log.info("%s: %s", replica, error)
            await self._publish_record(only_changes=True)

    async def _step(self, replica: Replica) -> None:
        """Brings one replica one step nearer to what is wished for."""
        if replica.closing is not None:
            return
        replica.retiring = {worker for worker in replica.retiring if worker.code is None}
        wish = wished(self.registry.deployments.values()).get(replica.key)
        if wish is None:
            return self._close(replica, self.settings.stop_grace_s)
        deployment, _ = wish
        for worker in (replica.current, replica.beside):
            if worker is not None:
                await self._look_at(replica, worker)
        if replica.closing is not None:
            return
        if replica.beside is not None:
            if replica.beside.ok:
                self._swap(replica)
        elif replica.current is None:
            await self._start_current(replica, deployment)
        else:
            await self._roll(replica, deployment)

    async def _look_at(self, replica: Replica, worker: WorkerProcess) -> None:
        """Notes that a worker has become ok, or what its end means."""
        record = self.registry.workers.get(worker.id)
        if record is not None and record.state in ("ok", "draining") and not worker.ok:
            worker.ok = True
            replica.proven.add(worker.deployment.revision)
            log.info("%s is ok (worker %s)", replica, worker.id)
            self._renew_wake.set()  # the claim names the worker
        if worker.code is None:
            return
        # Read before anything is changed: when the bus is away, the next step tries again.
        last = await self._last_record(worker.id)
        # It may have been ok for less time than the record needs to reach us.
        proven = worker.deployment.revision in replica.proven or (last is not None and last.state in ("ok", "draining"))
        if replica.beside is worker:
            replica.beside = None
        else:
            replica.current = None
        if proven:
            if worker.alive_s > _RECOVERED_S:
                replica.crashes = 0
            replica.crashes += 1
            pause = backoff_s(replica.crashes, self.settings.backoff_first_s, self.settings.backoff_most_s)
            replica.proven.add(worker.deployment.revision)
            replica.not_before = time.monotonic() + pause
            log.warning(
                "%s: worker %s: %s; starting another in %.1f s: %s",
                replica, worker.id, describe_end(worker.code), pause, worker.last_words(1),
            )  # fmt: skip
            return
        words = last.words if last is not None and last.state == "failed" and last.words else worker.last_words()
        await self._failed_start(replica, worker.deployment, words or describe_end(worker.code))

    async def _last_record(self, worker: str) -> WorkerRecord | None:
        entry = await Bucket(self.bus, names.BUCKET_WORKERS).get(worker)
        return None if entry is None or entry.deleted else decode_worker(entry.value)

    async def _start_current(self, replica: Replica, deployment: Deployment) -> None:
        same = deployment.revision == replica.deployment.revision
        if same and time.monotonic() < replica.not_before:
            return
        if deployment.exclusive and replica.retiring:
            return
        if self._is_excluded(deployment):
            return self._close(replica, self.settings.stop_grace_s)
        left = self._left(without=replica)
        why = why_no_room(deployment, self.offer, left)
        share = place(deployment, left)
        if why or share is None:
            if not replica.retiring:  # nothing of ours will make room
                log.info("%s no longer fits here: %s", replica, why)
                self._close(replica, self.settings.stop_grace_s)
            return
        if not same:
            replica.crashes = 0
        replica.deployment, replica.share = deployment, share
        replica.current = await self._start(replica, deployment, share)

    async def _roll(self, replica: Replica, deployment: Deployment) -> None:
        running = replica.current
        assert running is not None
        if running.deployment.revision == deployment.revision or time.monotonic() < replica.not_before:
            return
        left = self._left()
        room_beside = not why_no_room(deployment, self.offer, left)
        if not room_beside and self._room_is_coming():
            return
        step = next_roll(
            deployment,
            replica.number,
            running.deployment.revision,
            list(self.registry.workers.values()),
            excluded=self._is_excluded(deployment),
            room_beside=room_beside,
            room_after=not self._why_no_room_after(deployment, replica) or self._fits_elsewhere(deployment),
        )
        if step == "beside" and (share := place(deployment, left)) is not None:
            log.info("%s: starting revision %s beside the old one", replica, deployment.revision)
            replica.beside = await self._start(replica, deployment, share)
        elif step == "stop first":
            log.info("%s: no room for two, stopping the old revision first", replica)
            self._retire(replica, running)
            replica.current = None

    def _swap(self, replica: Replica) -> None:
        """The new worker is ok: it takes the place of the old one."""
        new, old = replica.beside, replica.current
        assert new is not None
        replica.current, replica.beside = new, None
        replica.deployment, replica.share = new.deployment, new.share
        replica.crashes = 0
        if old is not None:
            self._retire(replica, old)

    def _retire(self, replica: Replica, worker: WorkerProcess) -> None:
        replica.retiring.add(worker)
        worker.stopping_at = time.monotonic()  # now: the next replica of this step must know it
        self._keep(worker.stop(_RETIRE_S, self.hurry), f"retire-{worker.id}")

    async def _start(self, replica: Replica, deployment: Deployment, share: Share) -> WorkerProcess | None:
        """Starts a worker; a fault before the process runs is a failed start too."""
        try:
            params, secret_params = engine_params(deployment, self._seal_key)
            job = WorkerJob(
                worker_id=names.new_worker_id(),
                deployment=deployment,
                bus=self.settings.bus,
                replica=replica.number,
                node=self.id,
                gpus=list(share.gpus),
                params=params,
                secret_params=secret_params,
                log_level=self.settings.log_level,
            )
            worker = await WorkerProcess.start(job, share, self.settings.logs, self._keeper, self._wake)
        except (ModelBusError, OSError) as error:
            await self._failed_start(replica, deployment, str(error))
            return None
        log.info("%s: started worker %s (pid %d)", replica, worker.id, worker.pid)
        return worker

    async def _failed_start(self, replica: Replica, deployment: Deployment, words: str) -> None:
        """Says why, which excludes this node for the revision; gives the claim back unless an older one still runs."""
        log.warning("%s could not start revision %s: %s", replica, deployment.revision, words)
        key = names.failure_key(deployment.name, deployment.revision, self.id)
        self._excluded.add(key)
        failure = StartFailure(
            deployment=deployment.name,
            revision=deployment.revision,
            node=self.id,
            words=words,
            replica=replica.number,
            at_ms=time.time_ns() // 1_000_000,
        )
        try:
            await Bucket(self.bus, names.BUCKET_FAILURES).put(key, encode(failure))
        finally:
            if not any(worker.deployment.revision != deployment.revision for worker in replica.workers()):
                self._close(replica, self.settings.stop_grace_s)

    def _close(self, replica: Replica, grace_s: float) -> None:
        """Ends a replica's workers, then gives its claim back. Does nothing if that is under way."""
        if replica.closing is None:
            replica.closing = self._keep(self._end(replica, grace_s), f"close-{replica.key}")

    async def _end(self, replica: Replica, grace_s: float) -> None:
        try:
            await asyncio.gather(*(worker.stop(grace_s, self.hurry) for worker in replica.workers()))
            async with replica.writing:
                if not replica.released:
                    replica.released = True
                    await self.claims.bucket.delete(replica.key, replica.seq)
        except (Conflict, BusUnavailable, JetStreamError) as error:
            # It is not renewed any more, so it expires by itself.
            log.info("the claim of %s could not be released: %s", replica, error)
        finally:
            self.replicas.pop(replica.key, None)
            log.info("released %s", replica)
            self._wake()

    # Saying how things are.

    async def _heartbeat_loop(self) -> None:
        while True:
            await self._publish_record()
            await asyncio.sleep(self.settings.heartbeat_s)

    async def _publish_record(self, *, only_changes: bool = False) -> None:
        record = self._record()
        if not self.bus.is_connected or (only_changes and record == self._published):
            return
        self._published = record
        with contextlib.suppress(BusUnavailable):
            await self.bus.publish(names.bucket_subject(names.BUCKET_NODES, self.id), encode(record))

    def _record(self) -> NodeRecord:
        left = self._left()
        return NodeRecord(
            id=self.id,
            host=socket.gethostname(),
            pid=os.getpid(),
            cpus=self.offer.cpus,
            cpus_free=round(left.cpus, 6),
            memory_mb=self.offer.memory_mb,
            memory_free_mb=left.memory_mb,
            gpus=list(self.offer.gpus),
            gpus_free=[round(left.gpus[gpu.index], 6) for gpu in self.offer.gpus],
            labels=self.offer.labels,
            engines=sorted(self.offer.engines),
            missing=self.offer.missing,
            replicas=sorted(str(replica) for replica in self.replicas.values()),
            refused=self._refused,
            seal_key=public_seal_key(self._seal_key),
            version=_version(),
            started_ms=self._started_ms,
        )

    def _on_logs(self, msg: Msg) -> None:
        if msg.reply:
            self._keep(self._answer_logs(msg), "logs")

    async def _answer_logs(self, msg: Msg) -> None:
        """``{"model", "lines"}`` -> ``{"node", "host", "workers": [{"deployment", "replica", "lines"}]}``."""
        try:
            asked = json.loads(msg.data)
            model, lines = str(asked["model"]), min(10_000, max(1, int(asked.get("lines", 100))))
        except (ValueError, KeyError, TypeError):
            return
        found = []
        for deployment in sorted({model, *(each.name for each in self.registry.deployments_of(model))}):
            for number in _logged_replicas(self.settings.logs, deployment):
                text = tail(log_path(self.settings.logs, deployment, number), lines)
                found.append({"deployment": deployment, "replica": number, "lines": text})
        if found:
            answer = {"node": self.id, "host": socket.gethostname(), "workers": found}
            with contextlib.suppress(BusUnavailable):
                await self.bus.publish(msg.reply, json.dumps(answer).encode())

    # Plumbing.

    async def _follow(self, source: Registry | BucketReader[Claim]) -> None:
        while True:
            if await source.changed(60.0):
                self._wake()

    def _wake(self) -> None:
        self._step_wake.set()
        self._claim_wake.set()

    def _keep(self, work: Awaitable[None], name: str) -> asyncio.Task[None]:
        """Runs something beside the loops; the node ends only after it."""
        task = asyncio.create_task(_awaited(work), name=name)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _leave(self, loops: set[asyncio.Task[None]], ends: set[asyncio.Task[Any]]) -> None:
        """Ends all workers, releases all claims and takes the node's record away."""
        self._leaving = True
        self._wake()
        # Not cancelled: one may be starting a process just now. Claims are renewed until their workers have ended.
        await asyncio.wait([loop for loop in loops if loop.get_name() in ("claim", "step")], timeout=10)
        for replica in list(self.replicas.values()):
            self._close(replica, self.settings.exit_grace_s)
        closing = [replica.closing for replica in self.replicas.values() if replica.closing is not None]
        if closing:
            # A replica that was being undeployed has the longer grace of that: not when the node itself ends.
            _, late = await asyncio.wait(closing, timeout=self.settings.exit_grace_s + 5)
            if late:
                self.hurry.set()
                await asyncio.wait(late, timeout=10)
        for task in (*loops, *ends):
            task.cancel()
        await asyncio.gather(*loops, *ends, return_exceptions=True)
        self.hurry.set()
        if self._tasks:
            await asyncio.wait(set(self._tasks), timeout=10)
        if self.bus.is_connected:
            with contextlib.suppress(ModelBusError, TimeoutError):
                await Bucket(self.bus, names.BUCKET_NODES).delete(self.id)


@contextlib.asynccontextmanager
async def running_node(settings: NodeSettings) -> AsyncIterator[Node]:
    """A node with its lock, its keys and its connection; call ``run`` on it.

    Raises:
        ConfigurationError: another node runs in this home folder, or a file there is damaged.
        BusUnavailable, AuthenticationFailed: see ``Bus.connect``.
    """
    settings.home.mkdir(parents=True, exist_ok=True, mode=0o700)
    with _locked(settings.home):
        credential = _credential(settings)
        seal_key = credential.seal_key or make_seal_key(settings.home / "node.key")
        node_id = _node_id(settings.home)
        async with await Bus.connect(settings.bus, name=f"node {node_id}") as bus:
            if _may_administer(settings):
                await _declare_if_new(bus)
            yield Node(settings, node_id, bus, seal_key)


async def _declare_if_new(bus: Bus) -> None:
    """Declares the bus unless it is: how many copies its streams have is not ours to change."""
    try:
        await bus.js_request(f"STREAM.INFO.{names.STREAM_HI}")
        await declare_memory(bus)
    except JetStreamError:
        await declare_bus(bus)


def _credential(settings: NodeSettings) -> Credential:
    return load_credential(Path(settings.bus.creds).expanduser()) if settings.bus.creds else Credential()


def _may_administer(settings: NodeSettings) -> bool:
    return _credential(settings).may_administer


@contextlib.contextmanager
def _locked(home: Path) -> Iterator[None]:
    path = home / "node.lock"
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.read(descriptor, 32).decode().strip() or "unknown"
            raise ConfigurationError(
                f"a node with pid {holder} runs on this host already (home folder {home}): `modelbus stop` ends it"
            ) from None
        os.truncate(descriptor, 0)
        os.write(descriptor, f"{os.getpid()}\n".encode())
        yield
        os.truncate(descriptor, 0)
    finally:
        os.close(descriptor)


def _node_id(home: Path) -> str:
    """The node's id: the same over restarts, so that it finds its own claims and failures again."""
    path = home / "node.id"
    if not path.exists():
        host = re.sub(r"[^a-z0-9]+", "-", socket.gethostname().lower()).strip("-")[:24] or "node"
        path.write_text(f"{host}-{names.random_token(6)}\n")
    return path.read_text().strip()


def _logged_replicas(logs: Path, deployment: str) -> list[int]:
    token = names.model_token(deployment)
    numbers = (path.name.removeprefix(f"{token}.").removesuffix(".log") for path in logs.glob(f"{token}.*.log"))
    return sorted(int(number) for number in numbers if number.isdigit())


def _version() -> str:
    try:
        return importlib.metadata.version("modelbus")
    except importlib.metadata.PackageNotFoundError:
        return ""


async def _wait(event: asyncio.Event, timeout_s: float) -> None:
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(timeout_s):
            await event.wait()
    event.clear()


async def _awaited(work: Awaitable[None]) -> None:
    await work
