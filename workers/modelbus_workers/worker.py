"""A worker process: one engine behind the queue of one model.

Started by a node as ``python -m modelbus_workers.worker`` with a ``WorkerJob`` on standard input. It starts its
engine, tests it with one token, and only then pulls. After SIGTERM it takes nothing new, finishes what it can within
``drain_s`` and hands over the rest; after SIGUSR1 it finishes all that it has.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Coroutine
from datetime import datetime
from typing import Literal

import msgspec
from modelbus import tracing
from modelbus_broker import garbage, names
from modelbus_broker.buckets import Bucket
from modelbus_broker.connection import Bus
from modelbus_broker.errors import BusUnavailable, ModelBusError
from modelbus_broker.messages import (
    Capabilities,
    WorkerRecord,
    encode,
)
from modelbus_broker.pulling import Puller
from modelbus_broker.scheduling import prefer_throughput
from modelbus_broker.topology import consumers_of, restore_memory

from .admission import clock_offset_ms
from .control import Control
from .draining import Draining, exit_after
from .engines.base import Engine, EngineConfig, engine_class
from .finding import Finding
from .intake import Intake
from .job import EXIT_START_FAILED, EXIT_STOPPED, WorkerJob
from .ledger import Ledger
from .liveness import Liveness
from .outbox import Outbox
from .pulse import Pulse
from .stall import StallWatch, sample_of

log = logging.getLogger(__name__)

WorkerState = Literal["starting", "ok", "failed", "draining"]

HEARTBEAT_S = 3.0
IN_PROGRESS_S = 3.0


class Worker:
    """One engine, its slots and what is in them.

    ``exit_after`` is told how many seconds the worker may still take when it ends; a process ends itself then, and also
    when its engine hangs.
    """

    def __init__(
        self, job: WorkerJob, bus: Bus, engine: Engine, exit_after: Callable[[float], object] | None = None
    ) -> None:
        self.job = job
        self.id = job.worker_id
        self.deployment = job.deployment
        self.bus = bus
        self.engine = engine
        self.outbox = Outbox(bus, self.id)
        self.ledger = Ledger(bus, events=job.usage_events)
        self.intake = Intake(self.id, self.deployment, bus, engine, self.outbox, self.ledger)
        self.liveness = Liveness(bus, self.id, self, orphan_grace_s=self.deployment.orphan_grace_s)
        self.finding = Finding(self.id, self.intake)
        self._control = Control(self)
        self.ledger.ask, self.ledger.heard = self.liveness.ask, self.liveness.heard
        self.executions = self.intake.executions
        self.pulse = Pulse(self._stood_still)
        self.intake.pulse, self.intake.starting.reach = self.pulse.beat, self.liveness.reaches
        #: A worker inside another program must not end that.
        self._watched = exit_after is not None
        self.draining = Draining(
            self.intake, self.liveness, self.deployment.drain_s, exit_after or (lambda seconds: None)
        )
        self._puller: Puller | None = None
        self._state: WorkerState = "starting"
        self._words = ""
        self._retryable = False
        self._tasks: set[asyncio.Task[None]] = set()
        self._started_ms = time.time_ns() // 1_000_000
        self._last_beat = 0.0

    # Life

    async def run(self) -> int:
        """Starts, serves until told to stop, drains. Returns the exit code."""
        background = [asyncio.create_task(self._heartbeats(), name="heartbeats")]
        try:
            if not await self._start_engine():
                return EXIT_START_FAILED
            background += await self._start_serving()
            await self.draining.begun.wait()
            await self._drain()
            return EXIT_STOPPED
        finally:
            for task in background:
                task.cancel()
            await asyncio.gather(*background, return_exceptions=True)
            await self.engine.close()
            with contextlib.suppress(ModelBusError):
                if self._state != "failed":
                    await Bucket(self.bus, names.BUCKET_WORKERS).delete(self.id)

    async def _start_engine(self) -> bool:
        await self.set_state("starting", "loading the model")
        starting = asyncio.create_task(self._load(), name="engine-start")
        stopped = asyncio.create_task(self.draining.begun.wait())
        await asyncio.wait([starting, stopped], return_when=asyncio.FIRST_COMPLETED)
        stopped.cancel()
        if not starting.done():
            starting.cancel()
            await asyncio.gather(starting, return_exceptions=True)
            return False
        error = starting.exception()
        if error is None:
            return True
        words = error.message if isinstance(error, ModelBusError) else f"{type(error).__name__}: {error}"
        log.error("the engine cannot start", exc_info=error)
        self._retryable = isinstance(error, ModelBusError) and error.retryable
        with contextlib.suppress(ModelBusError):
            await self.set_state("failed", words)
            await self.bus.flush()
        # The node reads the last line when the record did not arrive.
        sys.stderr.write(words.replace("\n", " ") + "\n")
        return False

    async def _load(self) -> None:
        await self.engine.start()
        await self.set_state("starting", "testing the engine with one token")
        await self.engine.self_test()

    async def _start_serving(self) -> list[asyncio.Task[None]]:
        intake = self.intake
        intake.slots = self.deployment.slots or self.engine.slots
        intake.compat = self.engine.compat()
        await self._first_server_clock()
        self.ledger.start()
        for who in (self.id, names.ALL_WORKERS):
            await self.bus.subscribe(names.control_subject(who), self._control.hear)
        await self.bus.subscribe(names.FIND, self._control.asked)
        self.bus.on_reconnect(self._on_reconnect)
        compats = [intake.compat] if intake.compat else []
        self._puller = Puller(
            self.bus,
            consumers_of(self.deployment.model, self.deployment.shares, compats),
            free=intake.free,
            take=intake.take,
            priority=self.deployment.priority,
        )
        intake.wake, intake.endings.pause = self._puller.wake, self._puller.pause
        garbage.settle()
        prefer_throughput()
        await self.set_state("ok")
        await self._puller.start()
        watch = StallWatch(
            self.deployment.engine_stall_s if self._watched else 0.0,
            counts_steps=self.engine.counts_steps,
            sample=lambda turn: sample_of(turn, self.engine, self.executions.values()),
            say=lambda why: self._spawn(self.set_state("draining", why)),
        )
        return [
            asyncio.create_task(watch.run(), name="stall watch"),
            asyncio.create_task(self._keep_in_progress(), name="in-progress"),
            asyncio.create_task(self.liveness.run(), name="liveness"),
            asyncio.create_task(self._keep_clock(), name="clock"),
        ]

    async def _drain(self) -> None:
        """Takes nothing new, finishes what it can, hands over the rest."""
        self.intake.closed = True
        await self.set_state("draining")
        assert self._puller is not None
        await self._puller.stop()
        await self.draining.run()
        await self.ledger.close()
        self.outbox.flush()
        with contextlib.suppress(ModelBusError):
            await self.bus.flush()

    # The record

    async def set_state(self, state: WorkerState, words: str = "") -> None:
        """Says how the worker is, now and in the heartbeats that follow."""
        self._state, self._words = state, words
        await self._beat()

    def record(self) -> WorkerRecord:
        """What the registry shows of this worker."""
        serving = self._state in ("ok", "draining")
        return WorkerRecord(
            id=self.id,
            model=self.deployment.model,
            deployment=self.deployment.name,
            revision=self.deployment.revision,
            replica=self.job.replica,
            node=self.job.node,
            engine=self.deployment.engine,
            state=self._state,
            slots=self.intake.slots,
            busy=len(self.executions),
            compat=self.intake.compat,
            capabilities=self.engine.capabilities() if serving else Capabilities(),
            words=self._words,
            retryable=self._retryable,
            total_requests=self.intake.total,
            failed_requests=self.intake.failed,
            last_work_ms=self.intake.last_work_ms,
            started_ms=self._started_ms,
            pid=os.getpid(),
            host=socket.gethostname(),
            gpus=self.job.gpus,
            steps=self.engine.steps,
        )

    async def _beat(self) -> None:
        self._last_beat = time.monotonic()
        # Over the connection that pulls, and without waiting: a worker that cannot pull is not alive.
        with contextlib.suppress(BusUnavailable):
            await self.bus.publish(names.bucket_subject(names.BUCKET_WORKERS, self.id), encode(self.record()))

    async def _heartbeats(self) -> None:
        told = (-1, -1)
        while True:
            await asyncio.sleep(0.5)
            self.pulse.beat()
            due = time.monotonic() - self._last_beat >= HEARTBEAT_S
            # Who asks right after an answer shall find it counted, also when it came and went between two looks.
            shown = (len(self.executions), self.intake.total)
            if self.bus.is_connected and (due or told != shown):
                told = shown
                await self._beat()

    async def _on_reconnect(self) -> None:
        # First of all: nobody else shall get what runs here.
        await self._send_in_progress()
        self.liveness.reconnected()
        # A bus that was killed may not know what it delivered, and delivers it again as if for the first time.
        self.intake.doubt()
        await self._beat()
        await restore_memory(self.bus)
        await self._beat()

    def _stood_still(self, seconds: float) -> None:
        log.warning("stood still for %.1f s: asking the publishers about all that is here", seconds)
        self.liveness.reconnected()
        self.intake.doubt()
        self._spawn(self._send_in_progress())

    async def _first_server_clock(self) -> None:
        """Returns when the server's clock is known: deadlines count by it. While a leader is chosen nobody answers."""
        while not self.draining.begun.is_set():
            try:
                await self._read_server_clock()
                return
            except ModelBusError as error:
                log.warning("the bus does not say what time it is: %s", error.message)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(0.5):
                    await self.draining.begun.wait()

    async def _read_server_clock(self) -> None:
        asked_ms = time.time_ns() / 1e6
        info = await self.bus.js_request(f"STREAM.INFO.{names.STREAM_HI}")
        server_ms = msgspec.convert(info["ts"], type=datetime).timestamp() * 1000
        self.intake.clock_offset_ms = clock_offset_ms(asked_ms, time.time_ns() / 1e6, server_ms)

    async def _keep_clock(self) -> None:
        while True:
            await asyncio.sleep(60)
            with contextlib.suppress(ModelBusError):
                await self._read_server_clock()
            self.outbox.sweep()

    # Timers

    async def _keep_in_progress(self) -> None:
        while True:
            await asyncio.sleep(IN_PROGRESS_S)
            await self._send_in_progress()

    async def _send_in_progress(self) -> None:
        if not self.bus.is_connected:
            return
        held = [e.pulled.ack_subject for e in self.executions.values() if e.counts]
        for ack_subject in [*held, *self.ledger.waiting]:
            with contextlib.suppress(BusUnavailable):
                await self.bus.publish(ack_subject, b"+WPI")

    def _spawn(self, coroutine: Coroutine[None, None, None]) -> None:
        task = asyncio.create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


async def serve(job: WorkerJob) -> int:
    """Runs a worker until a signal stops it, its parent dies or the bus closes. Returns the exit code."""
    config = EngineConfig(
        model=job.deployment.model,
        params=job.params,
        secret_params=frozenset(job.secret_params),
        model_path=job.deployment.model_path,
        pretrained_model_type=job.deployment.pretrained_model_type,
        slots=job.deployment.slots,
        gpus=tuple(job.gpus),
        cpus=job.deployment.cpus,
        bus=job.bus,
    )
    bus = await Bus.connect(job.bus, name=f"worker {job.deployment.name}.{job.replica}")
    async with bus:
        try:
            engine = engine_class(job.deployment.engine)(config)
        except ModelBusError as error:
            sys.stderr.write(error.message + "\n")
            return EXIT_START_FAILED
        worker = Worker(job, bus, engine, exit_after)
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, worker.draining.stop)
        loop.add_signal_handler(signal.SIGUSR1, worker.draining.retire)
        watchers = [
            asyncio.create_task(_exit_with_bus(bus), name="watch-bus"),
            asyncio.create_task(_stop_with_parent(worker.draining.stop), name="watch-parent"),
        ]
        try:
            return await worker.run()
        finally:
            for watcher in watchers:
                watcher.cancel()
            await asyncio.gather(*watchers, return_exceptions=True)


async def _exit_with_bus(bus: Bus) -> None:
    """A connection that nats-py has closed for good never comes back: the node starts a new worker."""
    await bus.closed.wait()
    log.error("the bus connection is closed for good")
    os._exit(1)


async def _stop_with_parent(stop: Callable[[], object]) -> None:
    parent = os.getppid()
    while os.getppid() == parent:  # noqa: ASYNC110  # the kernel tells nobody
        await asyncio.sleep(1.0)
    log.error("the node is gone")
    stop()


def main() -> int:
    """Reads the job from standard input and runs it."""
    try:
        job = msgspec.json.decode(sys.stdin.buffer.read(), type=WorkerJob)
    except msgspec.MsgspecError as error:
        sys.stderr.write(
            f"no worker job on standard input ({error}): nodes start workers, people use `modelbus deploy`\n"
        )
        return 2
    tracing.configure("modelbus-worker")
    logging.basicConfig(level=job.log_level, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    try:
        import uvloop
    except ImportError:
        return asyncio.run(serve(job))
    return uvloop.run(serve(job))  # type: ignore[no-any-return]


if __name__ == "__main__":
    sys.exit(main())
