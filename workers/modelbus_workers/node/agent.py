"""The node's loops: claim what fits, run it, renew the claims, say how things are.

The loops read the buckets through readers that keep up by themselves, decide with the pure functions of ``claiming``
and ``room``, and act. Each looks again when something has changed, and once a second in any case.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib.metadata
import logging
import os
import socket
import time
from collections.abc import Awaitable
from typing import Any

import msgspec
from modelbus_broker import names
from modelbus_broker.buckets import Bucket, BucketReader
from modelbus_broker.connection import Bus, JetStreamError, Msg
from modelbus_broker.errors import BusUnavailable, Conflict, ModelBusError
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
from modelbus_broker.sealing import public_seal_key
from modelbus_broker.topology import declare_memory

from modelbus_workers.job import WorkerJob

from .claiming import after_refusal, backoff_s, held_off, may_claim, next_roll, wished
from .processes import Keeper, WorkerProcess, describe_end
from .replica import Replica
from .resources import Offer, offer, offer_of
from .room import Free, Share, free, free_of, place, why_no_room
from .secrets import engine_params
from .settings import NodeSettings
from .worker_logs import LOGS, logs_answer

log = logging.getLogger(__name__)

#: Room that does not come within so many seconds after a worker was told to end is no longer waited for.
_ROOM_COMES_S = 30.0
#: A worker that was ok for so long has recovered from its earlier crashes.
_RECOVERED_S = 60.0


class Node:
    """The agent of one host. Made by ``opening.running_node``."""

    def __init__(self, settings: NodeSettings, node_id: str, bus: Bus, seal_key: str, *, may_administer: bool) -> None:
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
        self._may_administer = may_administer
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
        return any(at and time.monotonic() - at < _ROOM_COMES_S for at in stopping)

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
            self._close(replica, grace_s=5.0)

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
                    # Where two may run at once, what it has is finished; another one would wait for it otherwise.
                    self._close(replica, grace_s=5.0 if replica.deployment.exclusive else None)
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
        if self._may_administer:
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
        replica.retiring = {worker for worker in replica.retiring if worker.code is None}
        wish = wished(self.registry.deployments.values()).get(replica.key)
        undeployed = self.registry.deployment(replica.deployment.name) is None
        if replica.closing is not None:
            if undeployed:  # it may be one that was finishing at leisure
                self._stop_workers(replica)
            return
        if wish is None:
            return self._close(replica, retire=not undeployed)
        deployment, _ = wish
        for worker in (replica.current, replica.beside):
            if worker is not None:
                await self._look_at(replica, worker)
        if replica.closing is not None:
            return
        if replica.beside is not None:
            if replica.beside.deployment.revision != deployment.revision:
                self._retire(replica, replica.beside)  # the roll was taken back
                replica.beside = None
            elif replica.beside.ok:
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
            if not replica.retiring:  # what still finishes there may be started again when the roll is taken back
                self._close(replica)
            return
        left = self._left(without=replica)
        why = why_no_room(deployment, self.offer, left)
        share = place(deployment, left)
        if why or share is None:
            if not replica.retiring:  # nothing of ours will make room
                log.info("%s no longer fits here: %s", replica, why)
                self._close(replica)
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
        """Lets a worker finish what it has, at most to the deadlines."""
        replica.retiring.add(worker)
        worker.stopping_at = time.monotonic()  # now: the next replica of this step must know it
        self._keep(worker.retire(self.hurry), f"retire-{worker.id}")

    def _stop_workers(self, replica: Replica) -> None:
        for worker in replica.workers():
            if not worker.pressed:
                self._keep(worker.stop(worker.drain_limit_s, self.hurry), f"stop-{worker.id}")

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
                self._close(replica)

    def _close(
        self, replica: Replica, *, grace_s: float | None = None, retire: bool = False, release_first: bool = False
    ) -> None:
        """Ends a replica's workers, then gives its claim back. Does nothing if that is under way.

        Args:
            grace_s: between SIGTERM and SIGKILL; None: what each worker needs to drain.
            retire: the workers may finish all that they have.
            release_first: the claim is given back at once, so that another node starts a worker meanwhile.
        """
        if replica.closing is None:
            work = self._end(replica, grace_s, retire, release_first)
            replica.closing = self._keep(work, f"close-{replica.key}")

    async def _end(self, replica: Replica, grace_s: float | None, retire: bool, release_first: bool) -> None:
        ends = [
            worker.retire(self.hurry)
            if retire
            else worker.stop(worker.drain_limit_s if grace_s is None else grace_s, self.hurry)
            for worker in replica.workers()
        ]
        ending = asyncio.gather(*ends)
        try:
            if release_first:
                await asyncio.sleep(0)  # first they take nothing new
                await self._release(replica)
            await ending
        finally:
            await self._release(replica)
            self.replicas.pop(replica.key, None)
            log.info("released %s", replica)
            self._wake()

    async def _release(self, replica: Replica) -> None:
        """Gives the claim back, once."""
        async with replica.writing:
            if replica.released:
                return
            replica.released = True
            try:
                await self.claims.bucket.delete(replica.key, replica.seq)
            except (Conflict, BusUnavailable, JetStreamError) as error:
                # It is not renewed any more, so it expires by itself.
                log.info("the claim of %s could not be released: %s", replica, error)

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
        answer = logs_answer(msg, self.settings.logs, self.id, self.registry.deployments_of)
        if msg.reply and answer:
            self._keep(self._send(msg.reply, answer), "logs")

    async def _send(self, subject: str, payload: bytes) -> None:
        with contextlib.suppress(BusUnavailable):
            await self.bus.publish(subject, payload)

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
        """Takes the node's record away, ends all workers and releases all claims.

        In this order: claims go as soon as their workers take nothing new, so that other nodes start workers that can
        take over what is left when the drain is over. An exclusive replica goes when its worker has ended.
        """
        self._leaving = True
        self._wake()
        # Not cancelled: one may be starting a process just now. Claims are renewed until they are released.
        await asyncio.wait([loop for loop in loops if loop.get_name() in ("claim", "step")], timeout=10)
        for loop in loops:
            if loop.get_name() == "heartbeat":
                loop.cancel()
        if self.bus.is_connected:
            with contextlib.suppress(ModelBusError, TimeoutError):
                await Bucket(self.bus, names.BUCKET_NODES).delete(self.id)
        limit_s = max((w.drain_limit_s for r in self.replicas.values() for w in r.workers()), default=0.0)
        for replica in list(self.replicas.values()):
            if replica.closing is None:
                self._close(replica, release_first=not replica.deployment.exclusive)
            else:
                self._stop_workers(replica)  # they may be finishing at leisure
        closing = [replica.closing for replica in self.replicas.values() if replica.closing is not None]
        if closing:
            _, late = await asyncio.wait(closing, timeout=limit_s + 5)
            if late:
                self.hurry.set()
                await asyncio.wait(late, timeout=10)
        for task in (*loops, *ends):
            task.cancel()
        await asyncio.gather(*loops, *ends, return_exceptions=True)
        self.hurry.set()
        if self._tasks:
            await asyncio.wait(set(self._tasks), timeout=10)


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
