"""The bus dies and comes back under load: no accepted request is lost, none is answered twice, no live worker is doubted."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path

import pytest
from modelbus_broker import names
from modelbus_broker.buckets import Bucket
from modelbus_broker.connection import Bus
from modelbus_broker.errors import ModelBusError, RequestCancelled
from modelbus_broker.messages import WorkerRecord, decode_usage_events
from modelbus_broker.publisher import Publisher
from modelbus_broker.reading import read_stream
from modelbus_broker.registry import Registry
from modelbus_broker.settings import BusSettings
from modelbus_broker.storing import AGAIN_S, PublisherSettings
from modelbus_broker.topology import ACK_WAIT_S, BUCKETS, STREAMS

from tests.helpers.asking import begun, chat, read, settled
from tests.helpers.audit import audit
from tests.helpers.bus_nodes import BusNodes
from tests.helpers.cluster import Cluster
from tests.helpers.gateway_replicas import GatewayReplica
from tests.helpers.http_asking import Clients
from tests.helpers.link import Link


async def later_attempts(bus: Bus) -> int:
    """Runs that followed one that was believed lost."""
    count = 0
    async for message in read_stream(bus, names.STREAM_USAGE, names.USAGE, batch=256):
        count += sum(names.parse_run(event.run)[0] > 1 for event in decode_usage_events(message.data))
    return count


class Load:
    """Clients of a gateway that ask without a pause until told to stop."""

    def __init__(self, gateway: GatewayReplica, seed: str) -> None:
        self._stopping = False
        self.clients = Clients(
            [gateway.url], seed=seed, count=0, clients=16, words=(10, 40), go_on=lambda: not self._stopping
        )
        self._task = asyncio.create_task(self.clients.run())

    async def more(self, count: int) -> None:
        """Until so many more questions were answered."""
        goal = len(self.clients.answers) + count
        async with asyncio.timeout(90):
            while len(self.clients.answers) < goal and not self.clients.failures:
                await asyncio.sleep(0.05)

    async def end(self) -> Clients:
        self._stopping = True
        async with asyncio.timeout(150):
            await self._task
        return self.clients


@pytest.fixture
async def gateways(tmp_path: Path) -> AsyncIterator[list[GatewayReplica]]:
    """Those that a test puts in here are ended."""
    started: list[GatewayReplica] = []
    yield started
    for gateway in started:
        await gateway.close()


async def served(gateways: list[GatewayReplica], bus_url: str, folder: Path) -> GatewayReplica:
    gateway = GatewayReplica(bus_url, folder / "gateway.log", "--log-level", "warning")
    gateways.append(gateway)
    gateway.start()
    await gateway.ready()
    return gateway


async def right_at_the_end(bus: Bus, clients: Clients) -> None:
    """Every answer was whole and right, and is billed once; nothing is left behind."""
    assert clients.failures == []
    assert {question for question, answer in clients.answers.items() if not answer.text} == set()
    books = await audit(bus, "echo", [answer.id for answer in clients.answers.values()])
    assert (books.failures, books.unbilled, books.replaced) == ([], 0, 0)


@pytest.mark.timeout(300)
@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
async def test_a_restart_of_the_bus_loses_nothing_repeats_nothing_and_doubts_no_worker(
    cluster: Cluster, gateways: list[GatewayReplica], tmp_path: Path, how: signal.Signals
) -> None:
    await cluster.deploy_echo(workers=2, slots="64", interval_ms="20")
    load = Load(await served(gateways, cluster.server.url, tmp_path), f"restart {how}")
    await load.more(20)
    for _ in range(3):
        if how is signal.SIGKILL:
            cluster.server.kill()
        await cluster.server.restart()
        await load.more(60)
    clients = await load.end()
    await right_at_the_end(cluster.bus, clients)
    # No worker was away longer than everybody was: what ran went on where it was. A worker may come back so late on a
    # busy machine that it is asked for and does not answer; then its requests go on elsewhere, and that is all.
    assert await later_attempts(cluster.bus) <= 16
    assert all(worker.process.poll() is None for worker in cluster.workers)


@pytest.mark.timeout(300)
async def test_what_runs_goes_on_when_the_bus_is_away_longer_than_the_ack_wait(
    cluster: Cluster, gateways: list[GatewayReplica], tmp_path: Path
) -> None:
    await cluster.deploy_echo(workers=2, slots="64", interval_ms="300")
    load = Load(await served(gateways, cluster.server.url, tmp_path), "long")
    async with asyncio.timeout(60):
        while not any(record.busy for record in await _records(cluster.bus)):
            await asyncio.sleep(0.1)
    cluster.server.kill()
    await asyncio.sleep(ACK_WAIT_S + 2)
    await cluster.server.start()
    await load.more(16)
    clients = await load.end()
    await right_at_the_end(cluster.bus, clients)
    assert await later_attempts(cluster.bus) <= 16


async def _records(bus: Bus) -> list[WorkerRecord]:
    registry = Registry(bus)
    await registry.start()
    try:
        return list(registry.workers_of("echo"))
    finally:
        await registry.close()


async def test_what_the_bus_kept_in_memory_is_made_again_with_the_workers_on_it(cluster: Cluster) -> None:
    (worker,) = await cluster.deploy_echo()
    publisher = await cluster.publisher()
    for how in ("stop", "kill"):
        await cluster.server.stop() if how == "stop" else cluster.server.kill()
        await cluster.server.start()
        async with asyncio.timeout(60):
            while not await _has_all(cluster.bus):
                await asyncio.sleep(0.05)
        # Not only known from before: written by the worker into the new bucket.
        await asyncio.wait_for(_record_of(cluster.bus, worker.id), 60)
        call = await publisher.submit("echo", chat("one two"))
        assert await read(call) == "one two"
        frames = await cluster.bus.js_request(f"STREAM.INFO.{names.STREAM_OUT}")
        assert frames["state"]["messages"] > 0


async def _has_all(bus: Bus) -> bool:
    for config in STREAMS + BUCKETS:
        try:
            await bus.js_request(f"STREAM.INFO.{config['name']}")
        except ModelBusError:
            return False
    return True


async def _record_of(bus: Bus, worker_id: str) -> None:
    bucket = Bucket(bus, names.BUCKET_WORKERS)
    while True:
        with contextlib.suppress(ModelBusError):
            entry = await bucket.get(worker_id)
            if entry is not None and not entry.deleted:
                return
        await asyncio.sleep(0.05)


async def test_memory_is_made_again_also_when_the_server_answers_late(cluster: Cluster) -> None:
    await cluster.deploy_echo()
    # nats-py drops connections whose server says nothing without closing them, which is a warning in this process.
    await cluster.bus.close()
    cluster.server.kill()
    await cluster.server.start()
    # It lets everybody in and then stands still for longer than anybody waits for an answer.
    os.kill(cluster.server.pid, signal.SIGSTOP)
    try:
        await asyncio.sleep(7)
    finally:
        os.kill(cluster.server.pid, signal.SIGCONT)
    async with await Bus.connect(cluster.settings, name="test") as bus, asyncio.timeout(60):
        while not await _has_all(bus):
            await asyncio.sleep(0.1)


async def test_a_request_that_ended_while_its_publisher_was_cut_off_is_not_run_again(cluster: Cluster) -> None:
    await cluster.deploy_echo(workers=2, slots="1", interval_ms="100")
    other = await cluster.publisher()
    async with Link(cluster.server.port) as link, AsyncExitStack() as stack:
        bus = await stack.enter_async_context(await Bus.connect(BusSettings(url=link.url), name="cut-off"))
        registry = Registry(bus)
        await registry.start()
        stack.push_async_callback(registry.close)
        publisher = Publisher(bus, registry, kind="sdk", settings=PublisherSettings(accept_timeout_s=60))
        await publisher.start()
        stack.push_async_callback(publisher.close)
        link.deafen()
        call = await publisher.publish("echo", chat("once and only once"))
        answer = asyncio.create_task(read(call))
        async with asyncio.timeout(60):
            while not await _events_of(cluster.bus, call.id):
                await asyncio.sleep(0.05)
        await settled(cluster.bus, "echo")
        (run,) = await _events_of(cluster.bus, call.id)
        # The worker that knows the request has no slot free, the other one has.
        busy = [await begun(other, "echo", "word " * 200) for _ in range(2)]
        for long, reading in busy:
            if names.parse_run(long.reception.run)[2] != names.parse_run(run)[2]:
                await long.cancel()
                with pytest.raises(RequestCancelled):
                    await reading
        await link.cut()
        # Now the bus knows neither the message nor its id.
        await cluster.server.restart()
        await asyncio.sleep(AGAIN_S)  # it is time to publish again
        await link.mend()
        async with asyncio.timeout(60):
            assert await answer == "once and only once"
        for long, reading in busy:
            await long.cancel()
            await asyncio.gather(reading, return_exceptions=True)
        await settled(cluster.bus, "echo")
        assert await _events_of(cluster.bus, call.id) == [run]


async def _events_of(bus: Bus, id: str) -> list[str]:
    """The runs of a request that have ended."""
    found: list[str] = []
    async for message in read_stream(bus, names.STREAM_USAGE, names.USAGE):
        found += [event.run for event in decode_usage_events(message.data) if event.id == id]
    return found


@pytest.fixture
async def nodes(tmp_path: Path) -> AsyncIterator[BusNodes]:
    async with BusNodes(tmp_path) as nodes:
        yield nodes


@pytest.fixture
async def replicated(nodes: BusNodes, tmp_path: Path) -> AsyncIterator[Cluster]:
    """Workers on three bus servers."""
    async with await nodes.connect("test") as bus:
        await nodes.declare(bus)
        cluster = Cluster(bus=bus, server=nodes.servers[0], folder=tmp_path, url=nodes.url)
        yield cluster
        await cluster.close()


@pytest.mark.timeout(400)
async def test_the_loss_of_the_leader_of_three_loses_nothing_and_repeats_nothing(
    replicated: Cluster, nodes: BusNodes, gateways: list[GatewayReplica], tmp_path: Path
) -> None:
    await replicated.deploy_echo(workers=2, slots="64", interval_ms="20")
    load = Load(await served(gateways, nodes.url, tmp_path), "leader")
    await load.more(20)
    for _ in range(2):
        leader = await nodes.leader_of(replicated.bus, names.STREAM_HI)
        leader.kill()
        await load.more(60)
        await leader.start()
        await nodes.in_sync()
        await load.more(20)
    clients = await load.end()
    await right_at_the_end(replicated.bus, clients)
    # A worker that was connected to the killed server is away for a moment, and its publisher may doubt it; the
    # bound is what one such worker can have had in hand, each time.
    assert await later_attempts(replicated.bus) <= 32
    assert all(worker.process.poll() is None for worker in replicated.workers)


@pytest.mark.timeout(300)
async def test_three_servers_that_are_all_started_again_go_on(
    replicated: Cluster, nodes: BusNodes, gateways: list[GatewayReplica], tmp_path: Path
) -> None:
    await replicated.deploy_echo(workers=2, slots="64", interval_ms="20")
    load = Load(await served(gateways, nodes.url, tmp_path), "all three")
    await load.more(20)
    for server in nodes.servers:
        server.kill()
    await asyncio.gather(*(server.start() for server in nodes.servers))
    await load.more(60)
    clients = await load.end()
    await right_at_the_end(replicated.bus, clients)
    assert await _has_all(replicated.bus)
