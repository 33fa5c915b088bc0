"""How a worker stops, above all when its engine does not help."""

from __future__ import annotations

import asyncio
import contextlib
import subprocess
import sys
from collections.abc import AsyncIterator

from modelbus_broker import names
from modelbus_broker.connection import Bus
from modelbus_broker.messages import Chat, Deployment
from modelbus_workers.draining import ABORT_S, left_s
from modelbus_workers.engines.base import EngineConfig, EngineOutput, Output, Run
from modelbus_workers.engines.echo import EchoEngine
from modelbus_workers.job import WorkerJob
from modelbus_workers.worker import Worker

from tests.helpers.asking import begun, outcomes, settled, whole
from tests.helpers.cluster import Cluster


class Deaf(EchoEngine):
    """Says something to every request, and goes on with it, whoever wants it to stop; until ``relief``."""

    def __init__(self, config: EngineConfig) -> None:
        super().__init__(config)
        self.relief = asyncio.Event()

    async def chat(self, task: Chat, run: Run) -> AsyncIterator[EngineOutput]:
        said = 0
        async for output in super().chat(task, run):
            yield output
            said += isinstance(output, Output)
            while said == 3 and run.id != "self-test" and not self.relief.is_set():
                with contextlib.suppress(asyncio.CancelledError):
                    await self.relief.wait()


def test_the_time_for_finishing_is_the_drain_time_or_the_latest_deadline() -> None:
    assert left_s(100.0, 90.0, 25.0, [500.0, 700.0]) == 15.0
    assert left_s(100.0, 0.0, 25.0, [500.0, 700.0]) == 600.0 + ABORT_S
    assert left_s(100.0, 0.0, 25.0, []) == ABORT_S


def test_the_process_ends_even_when_its_event_loop_does_not() -> None:
    code = "import time; from modelbus_workers.draining import exit_after; exit_after(0.1); time.sleep(100)"
    ran = subprocess.run([sys.executable, "-c", code], timeout=60, capture_output=True, text=True)
    assert ran.returncode == 1


async def test_what_an_engine_does_not_let_go_of_is_handed_over_all_the_same(bus: Bus, cluster: Cluster) -> None:
    params = {"interval_ms": "10", "tokens": "40"}
    deployment = Deployment(
        name="echo", model="echo", engine="echo", revision="1", engine_params=params, drain_s=0.1, slots=8
    )
    await cluster.declare(deployment)
    job = WorkerJob(worker_id=names.new_worker_id(), deployment=deployment, bus=cluster.settings, params=params)
    engine = Deaf(EngineConfig(model="echo", params=params))
    deaf = Worker(job, bus, engine)
    running = asyncio.create_task(deaf.run())
    try:
        await cluster.wait_ready("echo", 1)
        publisher = await cluster.publisher()
        asked = [await begun(publisher, "echo", f"say {n}", stream=n % 2 > 0) for n in range(4)]
        cluster.start_worker(deployment)
        await cluster.wait_ready("echo", 2)
        deaf.draining.stop()
        async with asyncio.timeout(60):
            assert await asyncio.gather(*(task for _, task in asked)) == [whole(f"say {n}", 40) for n in range(4)]
            assert await running == 0
    finally:
        # Whatever has failed: the test's own end waits for the engine too.
        engine.relief.set()
    assert {(call.attempt.attempt, call.attempt.crashes) for call, _ in asked} == {(2, 0)}
    await settled(bus, "echo")
    assert await outcomes(bus) == {"done": 4}
