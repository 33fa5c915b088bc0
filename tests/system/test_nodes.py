"""Real nodes with real workers on a real bus."""

from __future__ import annotations

import asyncio
import json
import signal
from pathlib import Path

import psutil
import pytest
from modelbus_broker import names
from modelbus_broker.connection import Bus
from modelbus_broker.registry import Registry
from modelbus_broker.server import EmbeddedServer

from tests.helpers.hosts import NodeProcess, StartNode, alive, live_claims, placed, until, unwish, wish


async def _known(registry: Registry, *nodes: NodeProcess) -> None:
    await until(lambda: len(registry.nodes) == len(nodes), "all nodes are in the registry")


async def test_replicas_are_placed_by_room(bus: Bus, registry: Registry, start_node: StartNode) -> None:
    small = start_node("small", "--cpus", "1", "--memory-mb", "500")
    large = start_node("large", "--cpus", "4", "--memory-mb", "4000", "--label", "disk=ssd", "--gpus", "2")
    await _known(registry, small, large)
    await wish(bus, "wide", cpus=1.0, memory_mb=400, replicas=5)
    await until(lambda: len(placed(registry, "wide")) == 5, "all five replicas are ok")
    nodes = list(placed(registry, "wide").values())
    assert (nodes.count(small.id), nodes.count(large.id)) == (1, 4)
    assert registry.nodes[large.id].cpus_free == 0
    await unwish(bus, "wide")
    await until(lambda: not registry.workers_of("wide"), "their workers have ended")

    await wish(bus, "picky", cpus=0.1, require={"disk": "ssd"}, gpus=1.0, replicas=2)
    await until(lambda: len(placed(registry, "picky")) == 2, "both replicas are ok")
    assert set(placed(registry, "picky").values()) == {large.id}
    assert sorted(w.gpus for w in registry.workers_of("picky")) == [[0], [1]]


async def test_what_has_room_nowhere_says_why_on_each_node(bus: Bus, registry: Registry, start_node: StartNode) -> None:
    node = start_node("a", "--cpus", "1")
    await _known(registry, node)
    await wish(bus, "huge", cpus=64.0)
    await until(lambda: registry.nodes[node.id].refused, "the node refuses")
    assert registry.nodes[node.id].refused == {"huge.r1": "it needs 64 CPUs, 1 of 1 are free"}


async def test_equal_nodes_share_the_replicas(bus: Bus, registry: Registry, start_node: StartNode) -> None:
    nodes = [start_node(name, "--cpus", "8") for name in ("a", "b")]
    await _known(registry, *nodes)
    await wish(bus, "chat", replicas=4)
    await until(lambda: len(placed(registry, "chat")) == 4, "all replicas are ok")
    assert set(placed(registry, "chat").values()) == {node.id for node in nodes}


async def test_a_killed_node_loses_its_replicas_and_leaves_no_process(
    bus: Bus, registry: Registry, start_node: StartNode
) -> None:
    doomed = start_node("doomed", "--cpus", "1")
    await _known(registry, doomed)
    await wish(bus, "chat", cpus=1.0)
    await until(lambda: placed(registry, "chat") == {0: doomed.id}, "the replica is ok")
    family = doomed.family()
    heir = start_node("heir", "--cpus", "1")
    await _known(registry, doomed, heir)
    doomed.send(signal.SIGKILL)
    await until(lambda: not alive(family), "nothing of the node is left", 10)
    await until(lambda: heir.id in {w.node for w in registry.workers_of("chat")}, "the replica has moved")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_a_stopped_node_leaves_nothing(
    bus: Bus, registry: Registry, start_node: StartNode, number: signal.Signals
) -> None:
    node = start_node("a")
    await _known(registry, node)
    await wish(bus, "chat", replicas=2)
    await until(lambda: len(placed(registry, "chat")) == 2, "the replicas are ok")
    family = node.family()
    assert len(family) >= 4  # the node, its keeper, two workers
    node.send(number)
    assert await node.ended() == 0
    assert not alive(family)
    assert await live_claims(bus) == set()
    await until(lambda: not registry.nodes, "its record is gone", 5)


async def test_undeploying_ends_the_workers_and_releases_the_claims(
    bus: Bus, registry: Registry, start_node: StartNode
) -> None:
    node = start_node("a")
    await _known(registry, node)
    await wish(bus, "chat", replicas=3)
    await until(lambda: len(placed(registry, "chat")) == 3, "the replicas are ok")
    await wish(bus, "chat", replicas=1)
    await until(lambda: set(placed(registry, "chat")) == {0}, "only the first replica is left")
    await unwish(bus, "chat")
    await until(lambda: not registry.workers_of("chat"), "no worker is left")
    await until(lambda: registry.nodes[node.id].replicas == [], "the node holds nothing")
    assert await live_claims(bus) == set()


async def test_a_crashed_worker_is_started_again(bus: Bus, registry: Registry, start_node: StartNode) -> None:
    await _known(registry, start_node("a"))
    await wish(bus, "chat")
    await until(lambda: placed(registry, "chat"), "the replica is ok")
    first = registry.workers_of("chat")[0]
    psutil.Process(first.pid).kill()
    await until(lambda: any(w.id != first.id for w in registry.workers_of("chat")), "another worker is ok")
    assert not registry.failures


async def test_a_failed_start_writes_why_and_excludes_the_node(
    bus: Bus, registry: Registry, start_node: StartNode
) -> None:
    node = start_node("a")
    await _known(registry, node)
    await wish(bus, "chat", engine_params={"start_error": "the weights are cracked"})
    await until(lambda: registry.failures, "the failure is told")
    failure = registry.failures[names.failure_key("chat", "r1", node.id)]
    assert "the weights are cracked" in failure.words
    await until(lambda: registry.nodes[node.id].replicas == [], "the claim was given back")
    await asyncio.sleep(1.5)
    assert await live_claims(bus) == set()  # and was not taken again

    await wish(bus, "chat", revision="r2")
    await until(lambda: placed(registry, "chat", "r2"), "another revision is tried")


async def test_a_secret_that_is_not_there_is_a_failed_start_that_names_the_parameter(
    bus: Bus, registry: Registry, start_node: StartNode
) -> None:
    node = start_node("a")
    await _known(registry, node)
    await wish(bus, "chat", engine_params={"api_key": "env:MODELBUS_TEST_ABSENT"})
    await until(lambda: registry.failures, "the failure is told")
    words = next(iter(registry.failures.values())).words
    assert words == "parameter api_key: the environment variable MODELBUS_TEST_ABSENT is not set on this host"
    assert alive(node.family())


async def test_a_new_revision_rolls_out_replica_by_replica(bus: Bus, registry: Registry, start_node: StartNode) -> None:
    await _known(registry, start_node("a", "--cpus", "3"))
    await wish(bus, "chat", cpus=1.0, replicas=2)
    await until(lambda: len(placed(registry, "chat")) == 2, "the first revision is ok")
    fewest = 2

    def rolled() -> bool:
        nonlocal fewest
        fewest = min(fewest, len({w.replica for w in registry.workers_of("chat")}))
        return len(placed(registry, "chat", "r2")) == 2 and not placed(registry, "chat", "r1")

    await wish(bus, "chat", cpus=1.0, replicas=2, revision="r2")
    await until(rolled, "only the second revision runs")
    assert fewest == 2  # room for a third worker: no replica was ever without one


async def test_a_roll_that_fails_leaves_the_old_revision_running(
    bus: Bus, registry: Registry, start_node: StartNode
) -> None:
    node = start_node("a")
    await _known(registry, node)
    await wish(bus, "chat")
    await until(lambda: placed(registry, "chat"), "the first revision is ok")
    before = registry.workers_of("chat")[0].id
    await wish(bus, "chat", revision="r2", engine_params={"start_error": "no"})
    await until(lambda: registry.failures, "the failure is told")
    await wish(bus, "chat", revision="r3", model_path="/no/such/model")
    await until(lambda: "chat.r3" in registry.nodes[node.id].refused, "the third is refused")
    assert [w.id for w in registry.workers_of("chat")] == [before]


async def test_workers_live_through_a_restart_of_the_bus(
    bus: Bus, server: EmbeddedServer, registry: Registry, start_node: StartNode
) -> None:
    node = start_node("a")
    await _known(registry, node)
    await wish(bus, "chat", replicas=2)
    await until(lambda: len(placed(registry, "chat")) == 2, "the replicas are ok")
    before = {worker.id for worker in registry.workers_of("chat")}
    server.kill()
    await asyncio.sleep(4)  # longer than a claim lives
    await server.start()
    await until(lambda: bus.is_connected, "we are connected again")
    await until(lambda: node.id in registry.nodes, "the node is back")

    def claimed() -> bool:
        return {worker.id for worker in registry.workers_of("chat")} == before

    await until(claimed, "the same workers are ok")
    deadline = asyncio.get_running_loop().time() + 10
    while await live_claims(bus) != {names.claim_key("chat", 0), names.claim_key("chat", 1)}:
        assert asyncio.get_running_loop().time() < deadline
        await asyncio.sleep(0.1)


async def test_one_home_folder_holds_one_node(bus: Bus, registry: Registry, start_node: StartNode) -> None:
    first = start_node("a")
    await _known(registry, first)
    second = start_node("a")
    assert await second.ended() == 1
    assert f"a node with pid {first.process.pid} runs on this host already" in first.log.read_text()
    assert alive(first.family())


async def test_a_node_without_a_bus_says_so(tmp_path: Path) -> None:
    node = NodeProcess(tmp_path / "a", "--address", "nats://127.0.0.1:1")
    assert await node.ended() == 1
    assert "Error: no bus answers at nats://127.0.0.1:1" in node.log.read_text()


async def test_nodes_tell_the_last_lines_of_their_workers(bus: Bus, registry: Registry, start_node: StartNode) -> None:
    node = start_node("a")
    await _known(registry, node)
    await wish(bus, "chat")
    await until(lambda: placed(registry, "chat"), "the replica is ok")
    answer = json.loads((await bus.request("mb.logs", json.dumps({"model": "chat", "lines": 5}).encode())).data)
    assert answer["node"] == node.id
    assert [(worker["deployment"], worker["replica"]) for worker in answer["workers"]] == [("chat", 0)]
    assert 0 < len(answer["workers"][0]["lines"]) <= 5
