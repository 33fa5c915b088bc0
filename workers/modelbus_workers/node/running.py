"""Runs the replicas of a node: starts, rolls and ends their workers, one step at a time."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable

from modelbus_broker import names
from modelbus_broker.buckets import Bucket
from modelbus_broker.connection import Bus, JetStreamError
from modelbus_broker.errors import BusUnavailable, Conflict, ModelBusError
from modelbus_broker.messages import Deployment, StartFailure, WorkerRecord, decode_worker, encode
from modelbus_broker.registry import Registry

from modelbus_workers.job import WorkerJob

from .claiming import backoff_s, next_roll, wished
from .holdings import Holdings
from .processes import Keeper, WorkerProcess, describe_end
from .replica import Replica
from .room import Share, place, why_no_room
from .secrets import engine_params
from .settings import NodeSettings

log = logging.getLogger(__name__)

#: A worker that was ok for so long has recovered from its earlier crashes.
_RECOVERED_S = 60.0


class Runner:
    """Brings what runs on a node nearer to what is wished for.

    Args:
        keeper: ends what a killed node leaves behind.
        seal_key: opens sealed parameters.
        hurry: set to end workers without waiting for them.
        wake: called when something has changed that others look at.
        renew: called when a claim has something new to say.
        keep: runs something beside the node's loops; the node ends only after it.
    """

    def __init__(
        self,
        settings: NodeSettings,
        bus: Bus,
        registry: Registry,
        holdings: Holdings,
        *,
        keeper: Keeper,
        seal_key: str,
        hurry: asyncio.Event,
        wake: Callable[[], None],
        renew: Callable[[], None],
        keep: Callable[[Awaitable[None], str], asyncio.Task[None]],
    ) -> None:
        self._settings = settings
        self._bus = bus
        self._registry = registry
        self._holdings = holdings
        self._node = holdings.node
        self._keeper = keeper
        self._seal_key = seal_key
        self._hurry = hurry
        self._wake = wake
        self._renew = renew
        self._keep = keep
        self._claims = Bucket(bus, names.BUCKET_CLAIMS)

    async def step(self, replica: Replica) -> None:
        """Brings one replica one step nearer to what is wished for."""
        replica.retiring = {worker for worker in replica.retiring if worker.code is None}
        wish = wished(self._registry.deployments.values()).get(replica.key)
        undeployed = self._registry.deployment(replica.deployment.name) is None
        if replica.closing is not None:
            if undeployed:  # it may be one that was finishing at leisure
                self.stop_workers(replica)
            return
        if wish is None:
            return self.close(replica, retire=not undeployed)
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
        record = self._registry.workers.get(worker.id)
        if record is not None and record.state in ("ok", "draining") and not worker.ok:
            worker.ok = True
            replica.proven.add(worker.deployment.revision)
            log.info("%s is ok (worker %s)", replica, worker.id)
            self._renew()  # the claim names the worker
            if over := self._holdings.forgive(worker.deployment):
                self._keep(self._forget(over), f"forget-{over}")
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
            pause = backoff_s(replica.crashes, self._settings.backoff_first_s, self._settings.backoff_most_s)
            replica.proven.add(worker.deployment.revision)
            replica.not_before = time.monotonic() + pause
            log.warning(
                "%s: worker %s: %s; starting another in %.1f s: %s",
                replica, worker.id, describe_end(worker.code), pause, worker.last_words(1),
            )  # fmt: skip
            return
        failed = last if last is not None and last.state == "failed" and last.words else None
        words = (failed.words if failed else worker.last_words()) or describe_end(worker.code)
        await self._failed_start(replica, worker.deployment, words, again=failed is not None and failed.retryable)

    async def _last_record(self, worker: str) -> WorkerRecord | None:
        entry = await Bucket(self._bus, names.BUCKET_WORKERS).get(worker)
        return None if entry is None or entry.deleted else decode_worker(entry.value)

    async def _start_current(self, replica: Replica, deployment: Deployment) -> None:
        same = deployment.revision == replica.deployment.revision
        if same and time.monotonic() < replica.not_before:
            return
        if deployment.exclusive and replica.retiring:
            return
        if self._holdings.is_excluded(deployment):
            if not replica.retiring:  # what still finishes there may be started again when the roll is taken back
                self.close(replica)
            return
        left = self._holdings.left(without=replica)
        why = why_no_room(deployment, self._holdings.offer, left)
        share = place(deployment, left)
        if why or share is None:
            if not replica.retiring:  # nothing of ours will make room
                log.info("%s no longer fits here: %s", replica, why)
                self.close(replica)
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
        left = self._holdings.left()
        room_beside = not why_no_room(deployment, self._holdings.offer, left)
        if not room_beside and self._holdings.room_is_coming():
            return
        step = next_roll(
            deployment,
            replica.number,
            running.deployment.revision,
            list(self._registry.workers.values()),
            excluded=self._holdings.is_excluded(deployment),
            room_beside=room_beside,
            room_after=not self._holdings.why_no_room_after(deployment, replica)
            or self._holdings.fits_elsewhere(deployment),
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
        self._keep(worker.retire(self._hurry), f"retire-{worker.id}")

    def stop_workers(self, replica: Replica) -> None:
        for worker in replica.workers():
            if not worker.pressed:
                self._keep(worker.stop(worker.drain_limit_s, self._hurry), f"stop-{worker.id}")

    async def _start(self, replica: Replica, deployment: Deployment, share: Share) -> WorkerProcess | None:
        """Starts a worker; a fault before the process runs is a failed start too."""
        try:
            params, secret_params = engine_params(deployment, self._seal_key)
            job = WorkerJob(
                worker_id=names.new_worker_id(),
                deployment=deployment,
                bus=self._settings.bus,
                replica=replica.number,
                node=self._node,
                gpus=list(share.gpus),
                params=params,
                secret_params=secret_params,
                log_level=self._settings.log_level,
            )
            worker = await WorkerProcess.start(job, share, self._settings.logs, self._keeper, self._wake)
        except (ModelBusError, OSError) as error:
            await self._failed_start(replica, deployment, str(error))
            return None
        log.info("%s: started worker %s (pid %d)", replica, worker.id, worker.pid)
        return worker

    async def _failed_start(self, replica: Replica, deployment: Deployment, words: str, *, again: bool = False) -> None:
        """Says why, which excludes this node for the revision; gives the claim back unless an older one still runs.

        With ``again`` the node is excluded for a while only: what the engine needs may come back.
        """
        log.warning("%s could not start revision %s: %s", replica, deployment.revision, words)
        key = names.failure_key(deployment.name, deployment.revision, self._node)
        now_ms = time.time_ns() // 1_000_000
        failure = StartFailure(
            deployment=deployment.name,
            revision=deployment.revision,
            node=self._node,
            words=words,
            replica=replica.number,
            at_ms=now_ms,
            again_ms=now_ms + round(self._settings.again_s * 1000) if again else 0,
        )
        self._holdings.exclude(key, failure)
        try:
            await Bucket(self._bus, names.BUCKET_FAILURES).put(key, encode(failure))
        finally:
            if not any(worker.deployment.revision != deployment.revision for worker in replica.workers()):
                self.close(replica)

    async def _forget(self, failure_key: str) -> None:
        with contextlib.suppress(BusUnavailable, JetStreamError):  # then it is shown a while longer
            await Bucket(self._bus, names.BUCKET_FAILURES).delete(failure_key)

    def close(
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
            worker.retire(self._hurry)
            if retire
            else worker.stop(worker.drain_limit_s if grace_s is None else grace_s, self._hurry)
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
            self._holdings.replicas.pop(replica.key, None)
            log.info("released %s", replica)
            self._wake()

    async def _release(self, replica: Replica) -> None:
        """Gives the claim back, once."""
        async with replica.writing:
            if replica.released:
                return
            replica.released = True
            try:
                await self._claims.delete(replica.key, replica.seq)
            except (Conflict, BusUnavailable, JetStreamError) as error:
                # It is not renewed any more, so it expires by itself.
                log.info("the claim of %s could not be released: %s", replica, error)
