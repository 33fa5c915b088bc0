"""Workers that are stopped under load: nothing is lost, nothing is cut, nothing counts as a crash."""

from __future__ import annotations

import asyncio
import signal

import pytest
from modelbus_broker import names
from modelbus_broker.errors import WorkerLost
from modelbus_broker.messages import (
    Delta,
    Deployment,
    Done,
    Usage,
)
from modelbus_broker.storing import PublisherSettings

from tests.helpers.asking import Load, begun, chat, outcomes, settled, whole
from tests.helpers.cluster import Cluster

WORDS = "the quick brown fox jumps over the lazy dog"


async def test_what_outlives_the_drain_goes_on_elsewhere_without_a_crash(cluster: Cluster) -> None:
    tokens = 60
    first, second = await cluster.deploy_echo(
        workers=2, slots="32", interval_ms="50", tokens=str(tokens), drain_s="0.5"
    )
    publisher = await cluster.publisher()
    texts = [f"{WORDS} {n}" for n in range(24)]
    asked = [await begun(publisher, "echo", text, stream=n % 3 > 0) for n, text in enumerate(texts)]
    held = [call for call, _ in asked if call.reception.run.endswith(first.id)]
    assert 0 < len(held) < 24
    first.send_signal(signal.SIGTERM)
    async with asyncio.timeout(60):
        answers = await asyncio.gather(*(task for _, task in asked))
    assert answers == [whole(text, tokens) for text in texts]
    assert await first.wait(60) == 0
    for call, _ in asked:
        assert call.attempt.crashes == 0
        assert (call.attempt.attempt, call.attempt.handover) == ((2, True) if call in held else (1, False))
    await settled(cluster.bus, "echo")
    assert second.process.poll() is None
    assert await outcomes(cluster.bus) == {"done": 24, "handed_over": len(held)}


async def test_what_ends_within_the_drain_is_not_handed_over(cluster: Cluster) -> None:
    first, _ = await cluster.deploy_echo(workers=2, slots="32", interval_ms="20", tokens="40")
    publisher = await cluster.publisher()
    texts = [f"{WORDS} {n}" for n in range(16)]
    asked = [await begun(publisher, "echo", text) for text in texts]
    first.send_signal(signal.SIGTERM)
    async with asyncio.timeout(60):
        assert await asyncio.gather(*(task for _, task in asked)) == [whole(text, 40) for text in texts]
    assert await first.wait(60) == 0
    assert {call.attempt.attempt for call, _ in asked} == {1}


async def test_no_request_fails_while_workers_are_stopped_one_after_the_other_under_load(cluster: Cluster) -> None:
    workers = await cluster.deploy_echo(workers=2, slots="8", interval_ms="40", tokens="20", drain_s="0.05")
    deployment = Deployment(
        name="echo", model="echo", engine="echo", revision="1", replicas=2, slots=8, drain_s=0.05,
        engine_params={"interval_ms": "40", "tokens": "20"},
    )  # fmt: skip
    publisher = await cluster.publisher()
    load = Load(publisher, "echo", {whole("go", 20)}, clients=12)
    for replica, worker in enumerate(workers):
        new = cluster.start_worker(deployment, replica=replica)
        while new.id not in publisher.registry.workers or publisher.registry.workers[new.id].state != "ok":
            await publisher.registry.changed(1.0)
        worker.send_signal(signal.SIGTERM)
        assert await worker.wait(60) == 0
        await load.more(50)
    await load.end()
    await settled(cluster.bus, "echo")
    ends = await outcomes(cluster.bus)
    assert ends.pop("handed_over", 0) > 0
    assert ends == {"done": load.answers.total()}


async def test_alone_it_waits_for_the_worker_that_is_started_anew(cluster: Cluster) -> None:
    (first,) = await cluster.deploy_echo(interval_ms="50", tokens="60", drain_s="0.2")
    deployment = Deployment(
        name="echo", model="echo", engine="echo", revision="1", engine_params={"interval_ms": "50", "tokens": "60"}
    )
    publisher = await cluster.publisher(PublisherSettings(resume_wait_s=60))
    call, task = await begun(publisher, "echo", WORDS)
    first.send_signal(signal.SIGTERM)
    assert await first.wait(60) == 0
    assert not task.done()
    cluster.start_worker(deployment)
    async with asyncio.timeout(60):
        assert await task == whole(WORDS, 60)
    assert (call.attempt.attempt, call.attempt.crashes) == (2, 0)
    await settled(cluster.bus, "echo")


async def test_when_nobody_comes_a_stream_ends_with_an_error_and_a_plain_request_waits(cluster: Cluster) -> None:
    (first,) = await cluster.deploy_echo(interval_ms="50", tokens="60", drain_s="0.2")
    publisher = await cluster.publisher(PublisherSettings(resume_wait_s=1))
    _, streamed = await begun(publisher, "echo", WORDS)
    plain, answer = await begun(publisher, "echo", WORDS, stream=False)
    first.send_signal(signal.SIGTERM)
    assert await first.wait(60) == 0
    async with asyncio.timeout(60):
        with pytest.raises(WorkerLost, match="stopped"):
            await streamed
    assert not answer.done()
    # Not the same weights: what was not shown begins again.
    cluster.start_worker(
        Deployment(name="echo", model="echo", engine="echo", revision="2", engine_params={"tokens": "7"})
    )
    async with asyncio.timeout(60):
        assert await answer == whole(WORDS, 7)
    assert plain.attempt.crashes == 0
    await settled(cluster.bus, "echo")


async def test_retiring_finishes_everything_however_long_it_takes(cluster: Cluster) -> None:
    first, _ = await cluster.deploy_echo(workers=2, interval_ms="50", tokens="60", drain_s="0.1")
    publisher = await cluster.publisher()
    asked = [await begun(publisher, "echo", f"{WORDS} {n}") for n in range(8)]
    first.send_signal(signal.SIGUSR1)
    async with asyncio.timeout(60):
        assert await asyncio.gather(*(task for _, task in asked)) == [whole(f"{WORDS} {n}", 60) for n in range(8)]
    assert await first.wait(60) == 0
    assert {call.attempt.attempt for call, _ in asked} == {1}


async def test_a_handed_over_answer_is_billed_once_and_whole(cluster: Cluster) -> None:
    first, second = await cluster.deploy_echo(workers=2, interval_ms="50", tokens="40", drain_s="0.2")
    publisher = await cluster.publisher()
    call = await publisher.submit("echo", chat(WORDS))
    usage = Usage()
    sent = False
    async for batch in call.batches():
        for frame in batch:
            if isinstance(frame, Delta) and not sent:
                sent = True
                (first if call.reception.run.endswith(first.id) else second).send_signal(signal.SIGTERM)
            elif isinstance(frame, Done):
                usage = frame.usage
    assert call.attempt.attempt == 2
    assert usage.completion_tokens == 40


async def test_half_an_answer_goes_on_also_where_nobody_had_made_its_consumer(cluster: Cluster) -> None:
    first, second = await cluster.deploy_echo(workers=2, interval_ms="50", tokens="60", drain_s="0.2")
    publisher = await cluster.publisher()
    call, task = await begun(publisher, "echo", WORDS)
    assert call.accepted is not None
    consumer = names.consumer_name("echo", "re", call.accepted.compat)
    await cluster.bus.js_request(f"CONSUMER.DELETE.{names.STREAM_RE}.{consumer}")
    (first if call.reception.run.endswith(first.id) else second).send_signal(signal.SIGTERM)
    async with asyncio.timeout(60):
        assert await task == whole(WORDS, 60)
    assert call.attempt.attempt == 2
