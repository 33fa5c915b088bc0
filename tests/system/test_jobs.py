"""Jobs against real kills: of whoever submitted them, of their workers, of the bus."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections import Counter

import modelbus
import pytest
from modelbus.errors import EngineFailed, PoisonRequest
from modelbus.jobs import JobStatus
from modelbus_broker import dead, names
from modelbus_broker.buckets import Bucket
from modelbus_broker.cancelling import cancel as cancel_request
from modelbus_broker.connection import Bus
from modelbus_broker.jobs import keep_error
from modelbus_broker.messages import UsageEvent, decode_worker

from tests.helpers.asking import settled, usage_events, whole
from tests.helpers.cluster import Cluster, WorkerProcess

TOKENS = 60

SUBMIT = """
import asyncio, sys
import modelbus

async def main():
    async with modelbus.connect(sys.argv[1]) as client:
        for text in sys.argv[2:]:
            print((await client.submit("echo", text)).id, flush=True)
        await asyncio.sleep(600)

asyncio.run(main())
"""

MAP = """
import asyncio, sys
import modelbus

async def main():
    async with modelbus.connect(sys.argv[1]) as client:
        rows = [f"row {n} of many" for n in range(40)]
        say = lambda progress: print(progress.done, flush=True)
        await client.map("echo", rows, name="nightly", concurrency=8, progress=say)

asyncio.run(main())
"""


def run_until(script: str, arguments: list[str], lines: int) -> list[str]:
    """Runs a program until it has printed so many lines, then kills it."""
    process = subprocess.Popen([sys.executable, "-c", script, *arguments], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    with process.stdout:
        said = [process.stdout.readline().strip() for _ in range(lines)]
        os.kill(process.pid, signal.SIGKILL)
        process.wait(30)
    assert all(said), "the program ended before it had said so much"
    return said


async def until(client: modelbus.Client, job_id: str, *states: str) -> JobStatus:
    async with asyncio.timeout(60):
        while (status := await client.job(job_id).status()).state not in states:
            await asyncio.sleep(0.05)
    return status


async def serves(cluster: Cluster, worker: WorkerProcess) -> None:
    """Until this very worker is ok; the record of a dead one stays for some seconds."""
    workers = Bucket(cluster.bus, names.BUCKET_WORKERS)
    async with asyncio.timeout(60):
        while (entry := await workers.get(worker.id)) is None or decode_worker(entry.value).state != "ok":
            await asyncio.sleep(0.05)


async def events_of(bus: Bus, job_id: str) -> list[UsageEvent]:
    return [event for event in await usage_events(bus) if event.id == job_id]


@pytest.mark.timeout(240)
async def test_a_job_outlives_its_submitter_its_worker_and_the_bus(cluster: Cluster) -> None:
    (first,) = await cluster.deploy_echo("echo", interval_ms="50", tokens=str(TOKENS))
    (bomb,) = await cluster.deploy_echo("bomb", crash_on="boom", max_crashes="1")
    (job_id,) = await asyncio.to_thread(run_until, SUBMIT, [cluster.server.url, "hello"], 1)

    async with modelbus.connect(cluster.server.url) as client:
        poison = await client.submit("bomb", "boom")
        await until(client, job_id, "running")
        waiting = asyncio.create_task(client.job(job_id).result())
        os.kill(first.process.pid, signal.SIGKILL)
        assert await bomb.wait(60) != 0
        started = [cluster.start_worker(dead_worker.deployment) for dead_worker in (first, bomb)]
        await asyncio.gather(*(serves(cluster, worker) for worker in started))
        cluster.server.kill()
        await cluster.server.restart()

        async with asyncio.timeout(120):
            answer = await waiting
        assert answer.text == whole("hello", TOKENS)
        assert (answer.id, answer.model, answer.finish_reason) == (job_id, "echo", "stop")
        assert answer.usage.completion_tokens == TOKENS
        with pytest.raises(PoisonRequest, match="its worker was lost 1 times"):
            await poison.result(60)
        assert (await poison.status()).state == "failed"
        letter = await dead.find_letter(cluster.bus, poison.id)
        assert letter.letter.reason == "poison_request"

    # And again, by another program, after all that.
    async with modelbus.connect(cluster.server.url) as other:
        assert (await other.job(job_id)).text == whole("hello", TOKENS)
    await settled(cluster.bus, "echo")
    assert [event.outcome for event in await events_of(cluster.bus, job_id)] == ["done"]


@pytest.mark.timeout(240)
async def test_a_worker_that_is_stopped_gives_its_job_away_and_a_second_answer_is_waste(cluster: Cluster) -> None:
    (first,) = await cluster.deploy_echo("echo", interval_ms="50", tokens="40", drain_s="0.1", slots="2")
    async with modelbus.connect(cluster.server.url) as client:
        drained = await client.submit("echo", "hello")
        await until(client, drained.id, "running")
        second = cluster.start_worker(first.deployment)
        await serves(cluster, second)
        first.send_signal(signal.SIGTERM)
        assert (await drained.result(60)).text == whole("hello", 40)
        starts = await Bucket(cluster.bus, names.BUCKET_RUNS).get(names.message_id(drained.id, 1))
        assert starts is not None and int(starts.value) == 1, "a worker that is stopped is no crash"
        assert await first.wait(60) == 0

        # How a job ended is said once. Here it was said while a worker still ran it, as by one that was faster.
        beaten = await client.submit("echo", "once more")
        await until(client, beaten.id, "running")
        answers = Bucket(cluster.bus, names.BUCKET_ANSWERS)
        await keep_error(answers, beaten.id, EngineFailed("first"), kept_s=60)
        with pytest.raises(EngineFailed, match="first"):
            await beaten.result(60)
        await settled(cluster.bus, "echo")
        async with asyncio.timeout(60):
            while not (events := await events_of(cluster.bus, beaten.id)):
                await asyncio.sleep(0.05)
        assert [event.outcome for event in events] == ["waste"]
        assert (await beaten.status()).message == "first"


@pytest.mark.timeout(240)
async def test_a_map_that_was_killed_goes_on_and_asks_nothing_twice(cluster: Cluster) -> None:
    await cluster.deploy_echo("echo", interval_ms="5", slots="4")
    await asyncio.to_thread(run_until, MAP, [cluster.server.url], 10)
    seen: list[modelbus.Progress] = []
    async with modelbus.connect(cluster.server.url) as client:
        rows = [f"row {n} of many" for n in range(40)]
        async with asyncio.timeout(60):
            found = await client.map("echo", rows, name="nightly", concurrency=8, progress=seen.append)
        assert [row.get().text for row in found] == rows
        assert [row.index for row in found] == list(range(40))
        assert seen[-1] == (40, 0, 40)
        batch = await client.open_batch("nightly")
        assert [row.get().text async for row in batch] == rows
        assert {status.state for status in await batch.status()} == {"done"}
    await settled(cluster.bus, "echo")
    events = await usage_events(cluster.bus)
    assert Counter(event.outcome for event in events) == {"done": 40}


async def test_a_cancelled_job_stays_cancelled(cluster: Cluster) -> None:
    await cluster.deploy_echo("echo", interval_ms="50", tokens="400", slots="1")
    async with modelbus.connect(cluster.server.url) as client:
        running = await client.submit("echo", "hello")
        await until(client, running.id, "running")
        waiting, other = await client.submit("echo", "hello"), await client.submit("echo", "hello")
        assert (await waiting.status()).state == "waiting"
        assert [(await job.cancel()).state for job in (waiting, running)] == ["cancelled"] * 2
        for job in (waiting, running):
            with pytest.raises(modelbus.errors.RequestCancelled):
                await job.result(30)
            assert (await job.cancel()).state == "cancelled"
        # The command for requests of anybody takes a job back too.
        await until(client, other.id, "running")
        await cancel_request(cluster.bus, other.id)
        assert (await until(client, other.id, "cancelled", "done")).state == "cancelled"
    await settled(cluster.bus, "echo")
