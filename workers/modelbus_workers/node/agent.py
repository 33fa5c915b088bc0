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

from modelbus_broker import names
from modelbus_broker.buckets import Bucket, BucketReader
from modelbus_broker.connection import Bus, JetStreamError, Msg
from modelbus_broker.errors import BusUnavailable, Conflict, ModelBusError
from modelbus_broker.messages import (
    Claim,
    Deployment,
    NodeRecord,
    decode_claim,
    encode,
)
from modelbus_broker.registry import Registry
from modelbus_broker.sealing import public_seal_key
from modelbus_broker.topology import restore_memory

from .claiming import after_refusal, held_off, may_claim, wished
from .holdings import Holdings
from .processes import Keeper
from .replica import Replica
from .resources import offer
from .room import Share, place, why_no_room
from .running import Runner
from .settings import NodeSettings
from .worker_logs import LOGS, logs_answer

log = logging.getLogger(__name__)


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
        offered = offer(cpus=settings.cpus, memory_mb=settings.memory_mb, gpus=settings.gpus, labels=settings.labels)
        self.holdings = Holdings(node_id, offered, self.registry)
        #: Set to end workers without waiting for them.
        self.hurry = asyncio.Event()
        self._seal_key = seal_key
        self._may_administer = may_administer
        self._keeper = Keeper()
        self._refused: dict[str, str] = {}
        self._step_wake, self._claim_wake, self._renew_wake = asyncio.Event(), asyncio.Event(), asyncio.Event()
        self._reconnected_at = float("-inf")
        self._published: NodeRecord | None = None
        self._started_ms = time.time_ns() // 1_000_000
        self._tasks: set[asyncio.Task[None]] = set()
        self._leaving = False
        self._runner = Runner(
            settings, bus, self.registry, self.holdings, keeper=self._keeper, seal_key=seal_key, hurry=self.hurry,
            wake=self._wake, renew=self._renew_wake.set, keep=self._keep,
        )  # fmt: skip

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
            if self.holdings.is_excluded(deployment):
                continue
            held = self.holdings.replicas.get(key)
            if held is not None and held.deployment.revision != deployment.revision:
                if why := self.holdings.why_no_room_after(deployment, held):
                    refused[f"{deployment.name}.{deployment.revision}"] = why
            if not self._is_free(key):
                continue
            why = why_no_room(deployment, self.holdings.offer, self.holdings.left())
            if why:
                refused[f"{deployment.name}.{deployment.revision}"] = why
                continue
            if held_off(time.monotonic() - self._reconnected_at, self.settings.hold_off_s):
                continue
            # Nodes that hold less come first, so replicas spread.
            await asyncio.sleep(self.settings.spread_s * len(self.holdings.replicas))
            share = place(deployment, self.holdings.left())
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
        self.holdings.replicas[key] = replica
        self._wake()

    def _is_free(self, key: str) -> bool:
        claim = self.claims.values.get(key)
        return not self._leaving and key not in self.holdings.replicas and (claim is None or claim.node == self.id)

    # Keeping claims.

    async def _renew_loop(self) -> None:
        while True:
            await _wait(self._renew_wake, self.settings.renew_s)
            await asyncio.gather(*(self._renew(replica) for replica in list(self.holdings.replicas.values())))

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
            self._runner.close(replica, grace_s=5.0)

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
                    self._runner.close(replica, grace_s=5.0 if replica.deployment.exclusive else None)
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
        self._renew_wake.set()
        self._wake()
        if self._may_administer:
            await restore_memory(self.bus)
        self._published = None
        self._wake()

    # Running replicas.

    async def _step_loop(self) -> None:
        while not self._leaving:
            await _wait(self._step_wake, 0.5)
            for replica in list(self.holdings.replicas.values()):
                if self._leaving:
                    return
                try:
                    await self._runner.step(replica)
                except (BusUnavailable, JetStreamError) as error:
                    log.info("%s: %s", replica, error)
            await self._publish_record(only_changes=True)

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
        left = self.holdings.left()
        return NodeRecord(
            id=self.id,
            host=socket.gethostname(),
            pid=os.getpid(),
            cpus=self.holdings.offer.cpus,
            cpus_free=round(left.cpus, 6),
            memory_mb=self.holdings.offer.memory_mb,
            memory_free_mb=left.memory_mb,
            gpus=list(self.holdings.offer.gpus),
            gpus_free=[round(left.gpus[gpu.index], 6) for gpu in self.holdings.offer.gpus],
            labels=self.holdings.offer.labels,
            engines=sorted(self.holdings.offer.engines),
            missing=self.holdings.offer.missing,
            replicas=sorted(str(replica) for replica in self.holdings.replicas.values()),
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
        limit_s = max((w.drain_limit_s for r in self.holdings.replicas.values() for w in r.workers()), default=0.0)
        for replica in list(self.holdings.replicas.values()):
            if replica.closing is None:
                self._runner.close(replica, release_first=not replica.deployment.exclusive)
            else:
                self._runner.stop_workers(replica)  # they may be finishing at leisure
        closing = [replica.closing for replica in self.holdings.replicas.values() if replica.closing is not None]
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
