"""Deployments that are rolled, moved and taken down under load: no request fails, none is cut."""

from __future__ import annotations

import asyncio
import signal

import pytest
from modelbus import deploying
from modelbus.spec import DeploySpec
from modelbus_broker.connection import Bus
from modelbus_broker.errors import DeploymentFailed, ModelNotFound, UndeployRefused
from modelbus_broker.registry import Registry
from modelbus_broker.storing import PublisherSettings

from tests.helpers.asking import Load, begun, chat, outcomes, read, settled, whole
from tests.helpers.cluster import Cluster
from tests.helpers.command_line import modelbus
from tests.helpers.hosts import StartNode, alive, live_claims, until

TOKENS = 24
OLD, NEW = whole("the old weights say this", TOKENS), whole("and the new ones that", TOKENS)


def spec(text: str, *, tokens: int = TOKENS, interval_ms: int = 4, **fields: object) -> DeploySpec:
    params = {"text": text, "tokens": str(tokens), "interval_ms": str(interval_ms)}
    more = fields.pop("params", {})
    assert isinstance(more, dict)
    return DeploySpec(model="chat", pretrained_model_type="echo", infer_params=params | more, **fields)  # type: ignore[arg-type]


def old(**fields: object) -> DeploySpec:
    return spec("the old weights say this", **fields)  # type: ignore[arg-type]


def new(**fields: object) -> DeploySpec:
    return spec("and the new ones that", **fields)  # type: ignore[arg-type]


async def test_a_roll_under_load_fails_and_cuts_nothing(
    cluster: Cluster, registry: Registry, start_node: StartNode
) -> None:
    start_node("a", "--cpus", "8")
    publisher = await cluster.publisher()
    await until(lambda: registry.nodes, "the node is known")
    await deploying.deploy(cluster.bus, registry, publisher, old(num_workers=2))
    load = Load(publisher, "chat", {OLD, NEW})
    await load.more(40, OLD)
    await deploying.deploy(cluster.bus, registry, publisher, new(num_workers=2))
    await load.more(40, NEW)
    await load.end()
    assert load.answers.keys() == {OLD, NEW}
    assert {(call.attempt.attempt, call.attempt.crashes) for call in load.calls} == {(1, 0)}
    await settled(cluster.bus, "chat")
    assert (await outcomes(cluster.bus)).keys() == {"done"}


async def test_long_streams_of_the_old_revision_end_on_it_also_when_replicas_go(
    cluster: Cluster, registry: Registry, start_node: StartNode
) -> None:
    node = start_node("a", "--cpus", "8")
    publisher = await cluster.publisher()
    await until(lambda: registry.nodes, "the node is known")
    await deploying.deploy(
        cluster.bus, registry, publisher, old(num_workers=2, tokens=200, interval_ms=50, drain_s=0.1)
    )
    asked = [await begun(publisher, "chat", "go", stream=n % 2 > 0) for n in range(8)]
    await deploying.deploy(cluster.bus, registry, publisher, new(num_workers=1))
    assert await read(await publisher.submit("chat", chat("go"))) == NEW
    assert not any(task.done() for _, task in asked)
    async with asyncio.timeout(60):
        answers = await asyncio.gather(*(task for _, task in asked))
    assert set(answers) == {whole("the old weights say this", 200)}
    assert {call.attempt.attempt for call, _ in asked} == {1}
    await until(lambda: registry.nodes[node.id].replicas == ["chat.0"], "one replica is left")
    await until(lambda: len(registry.workers_of("chat", "")) == 1, "and one worker")


async def test_without_room_for_two_requests_wait_for_the_new_revision(
    cluster: Cluster, registry: Registry, start_node: StartNode
) -> None:
    start_node("a", "--cpus", "1")
    publisher = await cluster.publisher()
    await until(lambda: registry.nodes, "the node is known")
    await deploying.deploy(cluster.bus, registry, publisher, old(cpus_per_worker=1.0))
    load = Load(publisher, "chat", {OLD, NEW})
    await load.more(20, OLD)
    await deploying.deploy(cluster.bus, registry, publisher, new(cpus_per_worker=1.0))
    await load.more(20, NEW)
    await load.end()
    assert {(call.attempt.attempt, call.attempt.crashes) for call in load.calls} == {(1, 0)}


@pytest.mark.parametrize("room", ["8", "1"])
async def test_a_roll_that_fails_says_why_and_the_old_revision_serves_on(
    cluster: Cluster, registry: Registry, start_node: StartNode, room: str
) -> None:
    start_node("a", "--cpus", room)
    publisher = await cluster.publisher()
    await until(lambda: registry.nodes, "the node is known")
    await deploying.deploy(cluster.bus, registry, publisher, old(cpus_per_worker=1.0))
    load = Load(publisher, "chat", {OLD})
    await load.more(20)
    ran = await asyncio.to_thread(
        modelbus, "deploy", "--address", cluster.server.url, "--model", "chat", "--pretrained_model_type", "echo",
        "--cpus_per_worker", "1", "--infer_params", "start_error=the weights are cracked",
    )  # fmt: skip
    assert ran.code != 0
    assert "the weights are cracked" in ran.err
    await load.more(20)
    await load.end()
    assert {(call.attempt.attempt, call.attempt.crashes) for call in load.calls} == {(1, 0)}
    with pytest.raises(DeploymentFailed, match="cracked"):
        await deploying.deploy(
            cluster.bus, registry, publisher, new(cpus_per_worker=1.0, params={"start_error": "cracked"})
        )
    assert await read(await publisher.submit("chat", chat("go"))) == OLD


async def test_a_stopped_node_hands_over_to_the_one_that_takes_its_replicas(
    bus: Bus, cluster: Cluster, registry: Registry, start_node: StartNode
) -> None:
    leaving = start_node("leaving", "--cpus", "2")
    publisher = await cluster.publisher(PublisherSettings(resume_wait_s=60))
    await until(lambda: registry.nodes, "the node is known")
    await deploying.deploy(
        cluster.bus, registry, publisher,
        old(num_workers=2, cpus_per_worker=1.0, tokens=300, interval_ms=30, drain_s=5),
    )  # fmt: skip
    heir = start_node("heir", "--cpus", "2")
    await until(lambda: len(registry.nodes) == 2, "both nodes are known")
    asked = [await begun(publisher, "chat", "go", stream=n % 2 > 0) for n in range(8)]
    family = leaving.family()
    leaving.send(signal.SIGTERM)
    await until(lambda: {w.node for w in registry.workers_of("chat")} == {heir.id}, "the other node serves", 60)
    async with asyncio.timeout(60):
        answers = await asyncio.gather(*(task for _, task in asked))
    assert set(answers) == {whole("the old weights say this", 300)}
    assert {call.attempt.crashes for call, _ in asked} == {0}
    assert {call.attempt.handover for call, _ in asked} == {True}
    assert await leaving.ended(60) == 0
    assert not alive(family)
    assert len(await live_claims(bus)) == 2
    await settled(cluster.bus, "chat")
    ends = await outcomes(cluster.bus)
    assert ends == {"done": 9, "handed_over": 8}  # one request was the deploy's own


async def test_undeploying_with_drain_serves_what_waits_and_takes_nothing_new(
    cluster: Cluster, registry: Registry, start_node: StartNode
) -> None:
    start_node("a")
    publisher = await cluster.publisher()
    await until(lambda: registry.nodes, "the node is known")
    await deploying.deploy(cluster.bus, registry, publisher, old(worker_concurrency=2, interval_ms=20))
    calls = [await publisher.submit("chat", chat("go")) for _ in range(10)]
    answers = [asyncio.create_task(read(call)) for call in calls]
    with pytest.raises(UndeployRefused, match="takes new ones again"):
        await deploying.undeploy(cluster.bus, registry, "chat", drain=True, timeout_s=0.1)
    await until(lambda: not publisher.registry.deployments_of("chat")[0].closing, "it is open again")
    answers.append(asyncio.create_task(read(await publisher.submit("chat", chat("go")))))
    undeploying = asyncio.create_task(deploying.undeploy(cluster.bus, registry, "chat", drain=True))
    await until(lambda: publisher.registry.deployments_of("chat")[0].closing, "it takes nothing new")
    with pytest.raises(ModelNotFound, match="being undeployed"):
        await publisher.submit("chat", chat("go"))
    async with asyncio.timeout(60):
        assert await asyncio.gather(*answers) == [OLD] * 11
        assert (await undeploying).dropped == 0
    with pytest.raises(ModelNotFound):
        await publisher.submit("chat", chat("go"))
