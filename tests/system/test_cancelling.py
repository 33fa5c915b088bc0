"""Requests that nobody wants any more: their engines stop, their slots are free, their messages leave the queues."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import aiohttp
import msgspec
import pytest
from modelbus_broker import names
from modelbus_broker.asking import CallOptions
from modelbus_broker.buckets import Bucket
from modelbus_broker.cancelling import cancel
from modelbus_broker.connection import Bus
from modelbus_broker.credentials import Role, make_credentials, server_users
from modelbus_broker.errors import InvalidRequest, RequestCancelled
from modelbus_broker.messages import Deployment, Probe, decode_alive, encode
from modelbus_broker.publisher import Publisher
from modelbus_broker.reading import read_stream
from modelbus_broker.registry import Registry
from modelbus_broker.server import EmbeddedServer, ServerSettings
from modelbus_broker.settings import BusSettings
from modelbus_broker.topology import declare_bus, declare_model, depths
from modelbus_workers.job import WorkerJob

from tests.helpers.asking import begun, chat, outcomes, read, usage_events
from tests.helpers.cluster import Cluster, WorkerProcess, echo_deployment
from tests.helpers.command_line import SCRIPTS, modelbus
from tests.helpers.gateways import Start
from tests.helpers.hosts import freeze, until

SEED = 4_242
CHAT = "/v1/chat/completions"
ASKED = {"model": "echo", "messages": [{"role": "user", "content": "go on and on"}]}
#: An answer that takes hours.
ENDLESS: dict[str, Any] = {"tokens": "1000000", "interval_ms": "50"}


async def emptied(bus: Bus) -> None:
    """Until no request stream holds anything, seen or unseen by its consumers."""
    async with asyncio.timeout(90):
        while any((await depths(bus)).values()):
            await asyncio.sleep(0.05)


async def idle(publisher: Publisher, model: str = "echo") -> None:
    """Until the records of all workers say that nothing runs."""
    async with asyncio.timeout(90):
        while any(worker.busy for worker in publisher.registry.workers_of(model)):
            await publisher.registry.changed(1.0)


async def let_go(bus: Bus, worker: str, publishers: Sequence[Publisher]) -> None:
    """Until a worker says that it has nothing in its hands for these publishers."""
    async with asyncio.timeout(60):
        for publisher in publishers:
            probe = encode(Probe(publisher=publisher.id))
            while True:
                alive = decode_alive((await bus.request(names.control_subject(worker), probe, timeout_s=20)).data)
                if all(run.state == "ended" for run in alive.runs):
                    break
                await asyncio.sleep(0.05)


async def waiting(bus: Bus) -> list[str]:
    """The ids of the requests in the queues of lane ``hi``, running ones too, oldest first."""
    found = [message async for message in read_stream(bus, names.STREAM_HI, "mb.req.*.hi.*")]
    return [message.message_id.rpartition(".")[0] for message in found]


async def test_a_thousand_cancels_at_random_moments_leave_no_run_behind(cluster: Cluster) -> None:
    print(f"seed {SEED}")
    chance = random.Random(SEED)
    workers = await cluster.deploy_echo(workers=3, slots="4", delay_ms="10", interval_ms="10", tokens="8")
    publishers = [await cluster.publisher() for _ in range(2)]
    ends: Counter[str] = Counter()
    gate = asyncio.Semaphore(40)

    async def ask_and_cancel(how: str, stream: bool, publisher: Publisher, after_s: float) -> None:
        async def ask() -> str:
            async with await publisher.publish("echo", chat("go on"), CallOptions(stream=stream)) as call:
                calls.append(call.id)
                return await read(call)

        async with gate:
            calls: list[str] = []
            asking = asyncio.create_task(ask())
            if after_s:
                await asyncio.sleep(after_s)
            if how == "task":
                asking.cancel()
            elif calls:
                ends[(await cancel(cluster.bus, calls[0])).was] += 1
            try:
                await asking
            except asyncio.CancelledError:
                ends["task"] += 1
            except RequestCancelled:
                ends["told"] += 1
            else:
                ends["answered"] += 1

    async with asyncio.timeout(110):
        await asyncio.gather(
            *(
                ask_and_cancel(
                    chance.choice(["task", "task", "id"]),
                    chance.random() < 0.5,
                    chance.choice(publishers),
                    chance.choice([0.0, chance.uniform(0, 0.02), chance.uniform(0, 0.4)]),
                )
                for _ in range(1000)
            )
        )
        print(dict(ends))
        assert all(ends[how] for how in ("task", "told", "answered", "queued", "running"))  # at different moments
        await emptied(cluster.bus)
        await idle(publishers[0])
        for worker in workers:
            await let_go(cluster.bus, worker.id, publishers)
            assert worker.process.poll() is None
        for publisher in publishers:
            assert publisher.in_flight() == 0
            assert await read(await publisher.publish("echo", chat("and now?")))
    assert set(await outcomes(cluster.bus)) == {"done", "cancelled"}


async def test_a_request_cancelled_before_the_queue_has_answered_leaves_the_queue(cluster: Cluster) -> None:
    await cluster.declare(Deployment(name="echo", model="echo", engine="echo", revision="1"))
    publisher = await cluster.publisher()
    async with asyncio.timeout(30):
        while "echo" not in publisher.registry.models():
            await publisher.registry.changed(1.0)
    freeze(cluster.server.pid)
    try:
        calls = [await publisher.publish("echo", chat("go"), CallOptions(wait=True)) for _ in range(3)]
        taking_back = asyncio.gather(*(call.cancel() for call in calls))
        await asyncio.sleep(0.1)
        assert not taking_back.done()
    finally:
        os.kill(cluster.server.pid, signal.SIGCONT)
    await taking_back
    assert [call.publication.stored for call in calls if call.publication] == [True] * 3
    await emptied(cluster.bus)


async def test_closing_a_publisher_right_after_a_cancel_takes_the_request_back_first(cluster: Cluster) -> None:
    await cluster.declare(Deployment(name="echo", model="echo", engine="echo", revision="1"))
    publisher = await cluster.publisher()
    async with asyncio.timeout(30):
        while "echo" not in publisher.registry.models():
            await publisher.registry.changed(1.0)
    asking = asyncio.create_task(publisher.submit("echo", chat("go"), CallOptions(wait=True)))
    while not publisher.in_flight():
        await asyncio.sleep(0)
    asking.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await asking
    await publisher.close()
    assert await waiting(cluster.bus) == []


async def test_an_id_cancels_what_runs_and_what_waits_of_another_process(cluster: Cluster) -> None:
    (worker,) = await cluster.deploy_echo(slots="1", **ENDLESS)
    publisher = await cluster.publisher()
    running, answer = await begun(publisher, "echo", "go on")
    queued = await publisher.submit("echo", chat("wait"))

    first = await cancel(cluster.bus, queued.id)
    assert (first.was, first.stopped, first.worker) == ("queued", True, "")
    assert await waiting(cluster.bus) == [running.id]
    second = await cancel(cluster.bus, running.id)
    assert (second.was, second.stopped, second.worker) == ("running", True, worker.id)

    for reading in (answer, asyncio.create_task(read(queued))):
        with pytest.raises(RequestCancelled):
            await reading
    assert (await cancel(cluster.bus, running.id)).was == "unknown"
    with pytest.raises(InvalidRequest, match="PUBLISHER-TIME-RANDOM"):
        await cancel(cluster.bus, "nonsense")
    await emptied(cluster.bus)
    await idle(publisher)


async def test_requests_of_a_gateway_that_was_killed_can_be_cancelled_by_their_ids(
    cluster: Cluster, start: Start
) -> None:
    (worker,) = await cluster.deploy_echo(slots="1", orphan_grace_s="3600", **ENDLESS)
    gateway = start("--address", cluster.server.url)
    await gateway.ready()
    async with aiohttp.ClientSession() as http:
        async with http.post(gateway.url + CHAT, json=ASKED | {"stream": True}) as stream:
            await stream.content.readline()
            running = stream.headers["x-request-id"]
            second = asyncio.create_task(http.post(gateway.url + CHAT, json=ASKED | {"stream": True}).__aenter__())
            async with asyncio.timeout(30):
                while len(await waiting(cluster.bus)) < 2:
                    await asyncio.sleep(0.05)
            (queued,) = set(await waiting(cluster.bus)) - {running}
            gateway.process.kill()
            await gateway.ended()
        second.cancel()
        await asyncio.gather(second, return_exceptions=True)

    done = await asyncio.to_thread(
        modelbus, "cancel", queued, running, "s1-19000000000-gone", "--address", cluster.server.url
    )

    assert done.code == 4, done.err
    assert [(row["id"], row["was"], row["stopped"]) for row in done.json()] == [
        (queued, "queued", True), (running, "running", True), ("s1-19000000000-gone", "unknown", False),
    ]  # fmt: skip
    assert done.json()[1]["worker"] == worker.id
    await emptied(cluster.bus)
    publisher = await cluster.publisher()
    await idle(publisher)


async def test_a_worker_remembers_a_cancelled_id_that_is_still_on_its_way(cluster: Cluster) -> None:
    await cluster.deploy_echo()
    publisher = await cluster.publisher()
    lost = f"g{'0' * 12}-{names.started_ms_of(names.new_request_id('s1')):011x}-late"
    assert (await cancel(cluster.bus, lost)).was == "unknown"
    # It comes after all, of a publisher that is gone.
    call = await publisher.publish("echo", chat("go"))
    await read(call)
    late = encode(msgspec.structs.replace(call.request, id=lost))
    await cluster.bus.js_publish(names.request_subject("echo", "hi"), late, msg_id=f"{lost}.1")
    await emptied(cluster.bus)
    async with asyncio.timeout(30):
        while not (found := [event for event in await usage_events(cluster.bus) if event.id == lost]):
            await asyncio.sleep(0.05)
    assert [(event.outcome, event.code, event.run_ms) for event in found] == [("cancelled", "request_cancelled", 0.0)]


@pytest.mark.parametrize("stream", [False, True])
async def test_the_time_to_abort_is_measured_when_a_client_hangs_up(
    cluster: Cluster, start: Start, stream: bool
) -> None:
    await cluster.deploy_echo(slots="1", **ENDLESS)
    gateway = start("--address", cluster.server.url)
    await gateway.ready()
    publisher = await cluster.publisher()
    async with aiohttp.ClientSession() as http:
        asking = asyncio.create_task(http.post(gateway.url + CHAT, json=ASKED | {"stream": stream}).__aenter__())
        async with asyncio.timeout(30):
            while not any(worker.busy for worker in publisher.registry.workers_of("echo")):
                await publisher.registry.changed(1.0)
        if stream:
            (await asking).close()
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)
        await emptied(cluster.bus)
        async with asyncio.timeout(30):
            while 'modelbus_gateway_abort_seconds_count{model="echo"} 1.0' not in await _metrics(http, gateway.url):
                await asyncio.sleep(0.1)
        body = ASKED | {"max_tokens": 1}
        async with http.post(gateway.url + CHAT, json=body) as response:  # the slot is free
            assert response.status == 200
        assert 'modelbus_gateway_abort_seconds_count{model="echo"} 1.0' in await _metrics(http, gateway.url)
    await idle(publisher)


async def test_workers_notice_that_a_gateway_died_and_give_streams_more_time(cluster: Cluster, start: Start) -> None:
    await cluster.deploy_echo(orphan_grace_s="8", **ENDLESS)
    gateway, other = start("--address", cluster.server.url), start("--address", cluster.server.url)
    await gateway.ready()
    await other.ready()
    async with aiohttp.ClientSession() as http:
        # In the order in which they are not expected to end.
        stream = await http.post(gateway.url + CHAT, json=ASKED | {"stream": True}).__aenter__()
        await stream.content.readline()
        plain = asyncio.create_task(http.post(gateway.url + CHAT, json=ASKED).__aenter__())
        living = await http.post(other.url + CHAT, json=ASKED | {"stream": True}).__aenter__()
        await living.content.readline()
        async with asyncio.timeout(30):
            while len(await waiting(cluster.bus)) < 3:
                await asyncio.sleep(0.05)
        gateway.process.kill()
        await asyncio.gather(plain, return_exceptions=True)
        async with asyncio.timeout(60):
            while len(events := await usage_events(cluster.bus)) < 2:
                await asyncio.sleep(0.2)
        # Not cancelled: a gateway that was only cut off would have another worker go on.
        assert [(event.outcome, event.code) for event in events[:2]] == [("handed_over", "worker_lost")] * 2
        assert events[1].id == stream.headers["x-request-id"]
        async with asyncio.timeout(60):  # delivered once more, and ended: nobody is there
            while await waiting(cluster.bus) != [living.headers["x-request-id"]]:  # nobody else is harmed
                await asyncio.sleep(0.2)
        assert {event.outcome for event in (await usage_events(cluster.bus))[2:]} <= {"waste"}
        assert await living.content.readline()
        living.close()
        stream.close()
    await emptied(cluster.bus)


@pytest.mark.parametrize("what", ["llm.chat_oai('go on')", "list(llm.stream_chat_oai('go on'))"])
async def test_ctrl_c_in_a_blocking_program_takes_its_request_back(cluster: Cluster, what: str) -> None:
    await cluster.deploy_echo(orphan_grace_s="3600", **ENDLESS)
    program = f"import modelbus; modelbus.connect_cluster({cluster.server.url!r}); llm = modelbus.LLM('echo'); {what}"
    asking = subprocess.Popen([sys.executable, "-c", program], stderr=subprocess.PIPE, text=True)
    try:
        publisher = await cluster.publisher()
        async with asyncio.timeout(60):
            while not any(worker.busy for worker in publisher.registry.workers_of("echo")):
                await publisher.registry.changed(1.0)
        asking.send_signal(signal.SIGINT)
        _, said = await asyncio.to_thread(asking.communicate, timeout=60)
    finally:
        asking.kill()
    assert "KeyboardInterrupt" in said
    await emptied(cluster.bus)
    await idle(publisher)


async def test_a_cancelled_request_that_lost_its_worker_is_not_published_again(cluster: Cluster) -> None:
    first, second = await cluster.deploy_echo(workers=2, slots="1", **ENDLESS)
    publisher = await cluster.publisher()
    call, answer = await begun(publisher, "echo", "go on")
    holder = names.parse_run(call.reception.run)[2]
    (lost,) = [worker for worker in (first, second) if worker.id == holder]
    lost.send_signal(signal.SIGKILL)
    await until(lambda: call.attempt.attempt == 2, "the next attempt is on its way")
    await call.cancel()
    with pytest.raises(RequestCancelled):
        await answer
    await emptied(cluster.bus)
    living = second if lost is first else first
    await let_go(cluster.bus, living.id, [publisher])


async def _metrics(http: aiohttp.ClientSession, url: str) -> str:
    async with http.get(f"{url}/metrics") as response:
        return await response.text()


async def test_the_client_credential_is_enough_to_cancel_what_other_clients_asked(tmp_path: Path) -> None:
    credentials = make_credentials(tmp_path / "credentials")
    deployment = echo_deployment("echo", slots="1", orphan_grace_s="3600", **ENDLESS)
    settings = ServerSettings(store=tmp_path / "nats", users=server_users(tmp_path / "credentials"))
    async with EmbeddedServer(settings) as server, AsyncExitStack() as stack:

        def way_in(role: Role) -> BusSettings:
            return BusSettings(url=server.url, creds=str(credentials[role]))

        async def join(role: Role) -> Bus:
            return await stack.enter_async_context(await Bus.connect(way_in(role), name=role))

        admin, client = await join("admin"), await join("client")
        await declare_bus(admin)
        await declare_model(admin, "echo")
        await Bucket(admin, names.BUCKET_DEPLOYMENTS).put(names.deployment_key("echo"), encode(deployment))
        job = WorkerJob(
            worker_id=names.new_worker_id(), deployment=deployment, params=deployment.engine_params, bus=way_in("worker")
        )  # fmt: skip
        worker = WorkerProcess(job, tmp_path / "worker.log")
        stack.callback(_end, worker.process)
        registry = Registry(admin)
        await registry.start()
        stack.push_async_callback(registry.close)
        async with asyncio.timeout(60):
            while not registry.is_served("echo"):
                await registry.changed(1.0)
        query = [str(SCRIPTS / "modelbus"), "query", "--model", "echo", "--query", "go on", "--address", server.url]
        query += ["--creds", str(credentials["client"])]

        for killed in (False, True):
            asking = []
            for count in (1, 2):  # one runs, one waits
                asking.append(subprocess.Popen(query, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True))
                stack.callback(_end, asking[-1])
                async with asyncio.timeout(60):
                    while len(await waiting(admin)) < count or not any(w.busy for w in registry.workers_of("echo")):
                        await asyncio.sleep(0.05)
            if killed:
                for process in asking:
                    process.kill()
                    process.wait()
            running, queued = await waiting(admin)
            ends = [await cancel(client, request_id) for request_id in (queued, running)]
            assert [(end.was, end.stopped) for end in ends] == [("queued", True), ("running", True)]
            for process in asking:
                _, said = await asyncio.to_thread(process.communicate, timeout=60)
                assert killed or ("cancelled by its id" in said and process.returncode == 1)
            await emptied(admin)
        assert "ermissions" not in worker.log()


def _end(process: subprocess.Popen[Any]) -> None:
    process.kill()
    process.wait()
