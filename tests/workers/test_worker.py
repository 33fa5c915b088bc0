"""A real worker process behind a real bus."""

from __future__ import annotations

import asyncio
import gc
import signal
import time
import weakref

import msgspec
import pytest
from modelbus_broker import names
from modelbus_broker.asking import CallOptions
from modelbus_broker.buckets import Bucket
from modelbus_broker.connection import Bus
from modelbus_broker.errors import DeadlineExceeded, EngineFailed, ModelBusError, ModelNotFound, ModelUnavailable
from modelbus_broker.messages import Chat, ChatMessage, Delta, Deployment, Done, Embedding, Sampling, Vectors, encode
from modelbus_broker.topology import queued, running

from tests.helpers.cluster import Cluster


def chat(text: str, **sampling: object) -> Chat:
    return Chat(messages=[ChatMessage(role="user", content=text)], sampling=Sampling(**sampling))  # type: ignore[arg-type]


async def settled(bus: Bus, model: str) -> None:
    """Until nothing of the model is left in a queue."""
    async with asyncio.timeout(30):
        while await queued(bus, model) + await running(bus, model):
            await asyncio.sleep(0.05)


async def test_a_chat_request_comes_back_with_text_usage_and_a_finish_reason(cluster: Cluster) -> None:
    await cluster.deploy_echo()
    publisher = await cluster.publisher()
    call = await publisher.submit("echo", chat("one two three"))
    frames = [frame async for batch in call.batches() for frame in batch]
    deltas = [frame for frame in frames if isinstance(frame, Delta)]
    assert "".join(delta.text for delta in deltas) == "one two three"
    assert deltas[-1].finish_reason == "stop"
    assert deltas[-1].position == 3
    assert isinstance(frames[-1], Done)
    assert frames[-1].usage.completion_tokens == 3
    await settled(cluster.bus, "echo")


async def test_an_answered_request_leaves_no_garbage(cluster: Cluster) -> None:
    await cluster.deploy_echo()
    publisher = await cluster.publisher()
    gc.disable()  # nothing but the count of references frees memory now
    try:
        call = await publisher.submit("echo", chat("one two three"))
        assert [frame async for batch in call.batches() for frame in batch]
        await call.stored()
        left = weakref.ref(call)
        del call
        await settled(cluster.bus, "echo")
        assert left() is None
    finally:
        gc.enable()


async def test_embeddings_of_many_texts_come_back_in_order(cluster: Cluster) -> None:
    await cluster.deploy_echo(dimensions="1024")
    publisher = await cluster.publisher()
    texts: list[str | list[int]] = [f"text {n}" for n in range(300)]
    call = await publisher.submit("echo", Embedding(input=texts))
    vectors = [frame async for batch in call.batches() for frame in batch if isinstance(frame, Vectors)]
    assert len(vectors) > 1
    assert [v.start for v in vectors] == sorted(v.start for v in vectors)
    assert sum(len(v.data) for v in vectors) == 300
    assert all(len(data) == 4096 for v in vectors for data in v.data)


async def test_hundreds_of_requests_at_once_are_all_answered_by_few_slots(cluster: Cluster) -> None:
    await cluster.deploy_echo(workers=2, slots="3", delay_ms="1")
    publisher = await cluster.publisher()

    async def ask(n: int) -> str:
        call = await publisher.submit("echo", chat(f"number {n}"))
        return "".join([f.text async for batch in call.batches() for f in batch if isinstance(f, Delta)])

    assert await asyncio.gather(*(ask(n) for n in range(300))) == [f"number {n}" for n in range(300)]
    await settled(cluster.bus, "echo")


async def test_a_body_of_many_megabytes_travels_as_a_claim_check(cluster: Cluster) -> None:
    await cluster.deploy_echo()
    publisher = await cluster.publisher()
    text = "wörd " * 2_000_000
    call = await publisher.submit("echo", chat(text, max_tokens=5))
    assert (
        "".join([f.text async for batch in call.batches() for f in batch if isinstance(f, Delta)]).split()
        == ["wörd"] * 5
    )


async def test_a_slow_reader_gets_all_of_a_long_answer(cluster: Cluster) -> None:
    await cluster.deploy_echo(chunk="1")
    publisher = await cluster.publisher()
    words = [f"{n:05d} " for n in range(30_000)]
    call = await publisher.submit("echo", chat("".join(words)))
    async with asyncio.timeout(60):
        while not call.overflowed:
            await asyncio.sleep(0.01)
    text = "".join([f.text async for batch in call.batches() for f in batch if isinstance(f, Delta)])
    assert text.split() == "".join(words).split()


async def test_a_cancelled_request_leaves_the_worker_and_the_queue(cluster: Cluster) -> None:
    await cluster.deploy_echo(slots="1", interval_ms="50", tokens="1000000")
    publisher = await cluster.publisher()
    running_call = await publisher.submit("echo", chat("go on"))
    async for batch in running_call.batches():
        if any(isinstance(frame, Delta) for frame in batch):
            break
    queued_call = await publisher.submit("echo", chat("wait"))
    await queued_call.cancel()
    await running_call.cancel()
    await settled(cluster.bus, "echo")


async def test_an_engine_error_reaches_the_client_in_its_own_words(cluster: Cluster) -> None:
    await cluster.deploy_echo(fail="always", fail_code="engine_failed")
    publisher = await cluster.publisher()
    call = await publisher.submit("echo", chat("hello"))
    with pytest.raises(EngineFailed, match="echo"):
        async for _ in call.batches():
            pass
    await settled(cluster.bus, "echo")


async def test_unknown_models_and_models_without_workers_are_told_apart(cluster: Cluster) -> None:
    publisher = await cluster.publisher()
    with pytest.raises(ModelNotFound, match="nope"):
        await publisher.submit("nope", chat("hello"))
    await cluster.declare(Deployment(name="idle", model="idle", engine="echo", revision="1"))
    async with asyncio.timeout(10):
        while "idle" not in publisher.registry.models():
            await asyncio.sleep(0.01)
    with pytest.raises(ModelUnavailable):
        await publisher.submit("idle", chat("hello"))


async def test_a_request_waits_as_soon_as_its_deployment_says_so(cluster: Cluster) -> None:
    """While a revision is replaced, what was read of the deployment may be older than what its workers say."""
    deployment = Deployment(name="rolling", model="rolling", engine="echo", revision="1")
    await cluster.declare(deployment)
    publisher = await cluster.publisher()
    async with asyncio.timeout(10):
        while "rolling" not in publisher.registry.models():
            await asyncio.sleep(0.01)
    rolling = msgspec.structs.replace(deployment, wait_until_ms=int(time.time() * 1000) + 60_000)
    await Bucket(cluster.bus, names.BUCKET_DEPLOYMENTS).put(names.deployment_key("rolling"), encode(rolling))

    call = await publisher.submit("rolling", chat("hello"))  # what was stored just now has not been heard of yet

    await call.cancel()
    await settled(cluster.bus, "rolling")


async def test_a_request_that_expires_in_the_queue_ends_visibly(cluster: Cluster) -> None:
    await cluster.declare(Deployment(name="late", model="late", engine="echo", revision="1"))
    publisher = await cluster.publisher()
    async with asyncio.timeout(10):
        while "late" not in publisher.registry.models():
            await asyncio.sleep(0.01)
    call = await publisher.submit("late", chat("hello"), CallOptions(wait=True, budget_ms=300))
    with pytest.raises(DeadlineExceeded):
        async for _ in call.batches():
            pass
    await settled(cluster.bus, "late")


async def test_a_killed_worker_s_request_is_answered_by_another(cluster: Cluster) -> None:
    workers = await cluster.deploy_echo(workers=2, slots="4", interval_ms="100", tokens="30")
    publisher = await cluster.publisher()
    call = await publisher.submit("echo", chat("hello"))
    texts: list[str] = []
    killed = False
    async for batch in call.batches():
        texts += [frame.text for frame in batch if isinstance(frame, Delta)]
        if texts and not killed:
            killed = True
            holder = names.parse_run(call.reception.run)[2]
            next(worker for worker in workers if worker.id == holder).send_signal(signal.SIGKILL)
    assert call.attempt.attempt == 2
    whole = await publisher.submit("echo", chat("hello"))
    assert "".join(texts) == "".join(
        [frame.text async for batch in whole.batches() for frame in batch if isinstance(frame, Delta)]
    )
    await settled(cluster.bus, "echo")


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
async def test_traffic_goes_on_over_a_restart_of_the_server(cluster: Cluster, how: signal.Signals) -> None:
    await cluster.deploy_echo(slots="50", delay_ms="5")
    publisher = await cluster.publisher()
    stop = asyncio.Event()
    answered = 0

    async def client(n: int) -> None:
        nonlocal answered
        round_number = 0
        while not stop.is_set():
            round_number += 1
            text = f"client {n} round {round_number}"
            call = await publisher.submit("echo", chat(text))
            got = "".join([f.text async for batch in call.batches() for f in batch if isinstance(f, Delta)])
            assert got == text
            answered += 1

    async with asyncio.TaskGroup() as group:
        for n in range(16):
            group.create_task(client(n))
        async with asyncio.timeout(60):
            while answered < 50:
                await asyncio.sleep(0.05)
        if how is signal.SIGKILL:
            cluster.server.kill()
        await cluster.server.restart()
        after = answered
        async with asyncio.timeout(60):
            while answered < after + 200:
                await asyncio.sleep(0.05)
        stop.set()
    await settled(cluster.bus, "echo")


async def test_sigterm_lets_running_requests_finish_and_leaves_no_record(cluster: Cluster) -> None:
    (worker,) = await cluster.deploy_echo(interval_ms="20", tokens="50")
    publisher = await cluster.publisher()
    call = await publisher.submit("echo", chat("hello"))
    tokens = 0
    async for batch in call.batches():
        tokens += sum(len(frame.token_ids) for frame in batch if isinstance(frame, Delta))
        if tokens and worker.process.poll() is None:
            worker.send_signal(signal.SIGTERM)
    assert tokens == 50
    assert await worker.wait() == 0
    async with asyncio.timeout(15):
        while publisher.registry.workers_of("echo", ""):
            await asyncio.sleep(0.05)


async def test_an_engine_that_cannot_start_says_why_in_its_record(cluster: Cluster) -> None:
    deployment = Deployment(
        name="broken", model="broken", engine="echo", revision="1", engine_params={"start_error": "the disk is on fire"}
    )
    await cluster.declare(deployment)
    worker = cluster.start_worker(deployment)
    assert await worker.wait() == 3
    publisher = await cluster.publisher()
    records = publisher.registry.workers_of("broken", "failed")
    assert [record.words for record in records] == ["the disk is on fire"]
    assert worker.log().splitlines()[-1] == "the disk is on fire"


async def test_errors_of_the_tree_keep_code_and_status_over_the_bus(cluster: Cluster) -> None:
    await cluster.deploy_echo(fail="always", fail_code="queue_full")
    publisher = await cluster.publisher()
    call = await publisher.submit("echo", chat("hello"))
    with pytest.raises(ModelBusError) as caught:
        async for _ in call.batches():
            pass
    assert (caught.value.code, caught.value.status) == ("queue_full", 429)
