"""The gateway as processes: exit codes, several on one port, and nothing left behind."""

from __future__ import annotations

import asyncio
import signal
from pathlib import Path

import aiohttp
import psutil
import pytest
from modelbus_broker.topology import running

from tests.helpers.cluster import Cluster
from tests.helpers.command_line import free_port
from tests.helpers.gateways import Start

CHAT = "/v1/chat/completions"
HELLO = {"model": "echo", "messages": [{"role": "user", "content": "Hello there"}]}
KEY = "a-key-nobody-may-see"


async def gone(processes: list[psutil.Process]) -> None:
    _, alive = await asyncio.to_thread(psutil.wait_procs, processes, timeout=15)
    assert alive == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("processes", ["1", "2"])
async def test_a_signal_ends_it_and_leaves_nothing(
    cluster: Cluster, start: Start, number: signal.Signals, processes: str
) -> None:
    gateway = start("--address", cluster.server.url, "--processes", processes)
    await gateway.ready()
    children = gateway.children()
    gateway.process.send_signal(number)
    status, words = await gateway.ended()
    assert status == 0, words
    await gone(children)


async def test_running_requests_end_before_it_does(cluster: Cluster, start: Start, http: aiohttp.ClientSession) -> None:
    await cluster.deploy_echo(delay_ms="1500")
    gateway = start("--address", cluster.server.url)
    await gateway.ready()
    asking = asyncio.create_task(http.post(gateway.url + CHAT, json=HELLO).__aenter__())
    async with asyncio.timeout(60):
        while not await running(cluster.bus, "echo"):
            await asyncio.sleep(0.02)
    gateway.process.terminate()
    async with await asking as response:
        assert response.status == 200
    assert (await gateway.ended())[0] == 0


async def test_wrong_settings_end_it_with_2_and_no_bus_with_3(start: Start) -> None:
    status, words = await start("--address", "nats://127.0.0.1:4222", "--port", "80000").ended()
    assert (status, "1 to 65535" in words) == (2, True)
    status, words = await start("--address", f"nats://127.0.0.1:{free_port()}").ended()
    assert (status, words.startswith("Error: ")) == (3, True)
    status, words = await start("--address", f"nats://127.0.0.1:{free_port()}", "--processes", "2").ended()
    assert status == 3


async def test_a_port_that_is_taken_ends_it_with_2(cluster: Cluster, start: Start) -> None:
    first = start("--address", cluster.server.url)
    await first.ready()
    for processes in ("1", "2"):
        second = start("--address", cluster.server.url, "--port", str(first.port), "--processes", processes)
        status, words = await second.ended()
        assert (status, str(first.port) in words) == (2, True)


async def test_a_crashed_process_is_replaced_and_all_count_together(
    cluster: Cluster, start: Start, http: aiohttp.ClientSession
) -> None:
    await cluster.deploy_echo()
    gateway = start("--address", cluster.server.url, "--processes", "2")
    await gateway.ready()
    before = gateway.children()
    assert len(before) == 2

    async def ask(times: int) -> None:
        for _ in range(times):
            async with aiohttp.ClientSession() as session, session.post(gateway.url + CHAT, json=HELLO) as response:
                assert response.status == 200

    await ask(10)
    before[0].kill()
    await gone(before[:1])
    async with asyncio.timeout(30):
        while len({child.pid for child in gateway.children()} - {before[0].pid}) < 2:
            await asyncio.sleep(0.1)
    await ask(10)
    async with http.get(gateway.url + "/metrics") as response:
        text = await response.text()
    assert f'modelbus_gateway_requests_total{{model="echo",route="{CHAT}",status="200"}} 20.0' in text


async def test_processes_do_not_outlive_their_parent(cluster: Cluster, start: Start) -> None:
    gateway = start("--address", cluster.server.url, "--processes", "2")
    await gateway.ready()
    children = gateway.children()
    gateway.process.kill()
    await gone(children)


async def test_the_key_reaches_all_processes_and_no_argument_list(
    cluster: Cluster, start: Start, http: aiohttp.ClientSession, tmp_path: Path
) -> None:
    (tmp_path / "key").write_text(KEY)
    gateway = start("--address", cluster.server.url, "--processes", "2", "--api-key", f"file:{tmp_path / 'key'}")
    await gateway.ready()
    for process in (psutil.Process(gateway.process.pid), *gateway.children()):
        assert KEY not in " ".join(process.cmdline())
    async with http.get(gateway.url + "/v1/models") as response:
        assert response.status == 401
    async with http.get(gateway.url + "/v1/models", headers={"Authorization": f"Bearer {KEY}"}) as response:
        assert response.status == 200
    gateway.process.terminate()
    _, words = await gateway.ended()
    assert KEY not in words
