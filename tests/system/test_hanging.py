"""Engines that hang while their processes live: the worker says why and ends, its node starts another, requests go on."""

from __future__ import annotations

import asyncio

import msgspec
import pytest
from modelbus_broker.connection import Bus
from modelbus_broker.errors import PoisonRequest, UpstreamFailed
from modelbus_broker.messages import Deployment
from modelbus_broker.publisher import Publisher
from modelbus_broker.registry import Registry
from modelbus_broker.topology import declare_model

from tests.helpers.asking import begun, chat, read, settled, whole
from tests.helpers.cluster import Cluster, echo_deployment
from tests.helpers.faulty_upstream import faulty_upstream
from tests.helpers.hosts import StartNode, placed, until, wish

TOKENS = 40
WORDS = "boom goes the engine"
HUNG = 4


@pytest.mark.parametrize("how", ["hang_on", "block_on"])
async def test_a_worker_whose_engine_hangs_ends_itself_and_its_streams_go_on_elsewhere(
    cluster: Cluster, how: str
) -> None:
    paced = {"tokens": str(TOKENS), "interval_ms": "20", "fail_after": "5", "engine_stall_s": "3"}
    sick = msgspec.structs.replace(echo_deployment(**{how: "boom"}, **paced), name="sick")  # type: ignore[arg-type]
    await cluster.declare(sick)
    hung = cluster.start_worker(sick)
    await cluster.wait_ready("echo", 1)
    publisher = await cluster.publisher()
    asked = [await begun(publisher, "echo", f"{WORDS} {n}") for n in range(1 if how == "block_on" else 4)]
    healthy = msgspec.structs.replace(echo_deployment(**paced), name="healthy")  # type: ignore[arg-type]
    await cluster.declare(healthy)
    cluster.start_worker(healthy)

    assert await hung.wait(60) == HUNG
    async with asyncio.timeout(60):
        answers = await asyncio.gather(*(task for _, task in asked))

    assert answers == [whole(f"{WORDS} {n}", TOKENS) for n in range(len(asked))]
    assert {(call.attempt.attempt, call.attempt.crashes) for call, _ in asked} == {(2, 1)}
    why = "the engine has made no step" if how == "hang_on" else "the event loop has stood still"
    assert why in hung.log().splitlines()[-1]
    await settled(cluster.bus, "echo")


async def test_its_node_starts_another_and_a_request_that_hangs_every_engine_is_given_up(
    bus: Bus, registry: Registry, start_node: StartNode
) -> None:
    await declare_model(bus, "sick")
    params = {"hang_on": "boom", "fail_after": "2", "interval_ms": "10"}
    await wish(bus, "sick", engine_params=params, engine_stall_s=2.0, max_crashes=2)
    start_node("a")
    await until(lambda: placed(registry, "sick"), "the worker is ok", 60)
    (first,) = registry.workers_of("sick")
    publisher = Publisher(bus, registry, kind="sdk")
    await publisher.start()

    with pytest.raises(PoisonRequest, match="lost 2 times"):
        async with asyncio.timeout(100):
            await read(await publisher.publish("sick", chat("boom")))

    await until(lambda: registry.workers_of("sick"), "another worker is ok", 60)
    assert registry.workers_of("sick")[0].id != first.id
    assert await read(await publisher.publish("sick", chat("hello"))) == "hello"
    assert not registry.failures  # a crash, and no failed start
    await publisher.close()


async def test_while_it_ends_its_record_says_why(cluster: Cluster) -> None:
    (worker,) = await cluster.deploy_echo(hang_on="boom", fail_after="1", interval_ms="10", engine_stall_s="2")
    publisher = await cluster.publisher()
    call = await publisher.submit("echo", chat("boom boom"))

    def words() -> str:
        record = publisher.registry.workers.get(worker.id)
        return record.words if record else ""

    await until(lambda: "no step" in words(), "the record says why", 60)
    assert publisher.registry.workers[worker.id].state == "draining"  # nobody counts on it any more
    assert await worker.wait(60) == HUNG
    await call.cancel()


async def test_a_slow_engine_is_not_a_hung_one(cluster: Cluster) -> None:
    (worker,) = await cluster.deploy_echo(delay_ms="7000", engine_stall_s="2")
    publisher = await cluster.publisher()
    assert await read(await publisher.publish("echo", chat("take your time"))) == "take your time"
    assert worker.process.poll() is None


async def test_a_silent_provider_is_limited_by_its_own_times_and_its_worker_lives(cluster: Cluster) -> None:
    async with faulty_upstream() as upstream:
        params = {"base_url": upstream.url, "model": "m", "first_byte_timeout_s": "6", "api_key": "none"}
        deployment = Deployment(
            name="saas", model="saas", engine="openai", revision="1", engine_params=params, engine_stall_s=2.0
        )
        await cluster.declare(deployment)
        worker = cluster.start_worker(deployment)
        await cluster.wait_ready("saas", 1)
        await upstream.breaks("slow first byte")
        publisher = await cluster.publisher()
        with pytest.raises(UpstreamFailed, match="sent nothing for 6 s"):
            await read(await publisher.publish("saas", chat("hello")))
        assert worker.process.poll() is None
