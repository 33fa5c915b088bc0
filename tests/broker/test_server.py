from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
from modelbus_broker.errors import EmbeddedServerFailed
from modelbus_broker.server import ClusterSettings, EmbeddedServer, ServerSettings


async def _says_hello(port: int) -> dict[str, object]:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    line = await reader.readline()
    writer.close()
    await writer.wait_closed()
    assert line.startswith(b"INFO ")
    info: dict[str, object] = json.loads(line[5:])
    return info


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def _wait_gone(pid: int) -> bool:
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        if not _alive(pid):
            return True
        time.sleep(0.02)
    return False


async def test_it_takes_requests_with_jetstream_when_start_returns(tmp_path: Path) -> None:
    async with EmbeddedServer(ServerSettings(store=tmp_path / "store")) as server:
        info = await _says_hello(server.port)
        assert info["jetstream"] is True
        assert info["max_payload"] == 8 * 1024 * 1024
        assert server.url == f"nats://127.0.0.1:{server.port}"
        assert server.running


async def test_stop_leaves_no_process_and_frees_the_store(tmp_path: Path) -> None:
    server = EmbeddedServer(ServerSettings(store=tmp_path))
    await server.start()
    pid = server.pid
    await server.stop()
    assert not _alive(pid)
    assert server.pid == 0
    async with EmbeddedServer(ServerSettings(store=tmp_path)):
        pass


async def test_a_restart_keeps_the_port(tmp_path: Path) -> None:
    async with EmbeddedServer(ServerSettings(store=tmp_path)) as server:
        port, pid = server.port, server.pid
        await server.restart()
        assert (server.port, server.pid == pid) == (port, False)
        server.kill()
        assert not server.running
        assert await server.wait() == -signal.SIGKILL
        await server.start()
        assert server.port == port
        await _says_hello(port)


async def test_a_store_in_use_is_refused_and_the_holder_is_named(tmp_path: Path) -> None:
    async with EmbeddedServer(ServerSettings(store=tmp_path)) as server:
        with pytest.raises(EmbeddedServerFailed, match=f"in use by a bus with pid {server.pid}"):
            await EmbeddedServer(ServerSettings(store=tmp_path)).start()
        await _says_hello(server.port)


async def test_a_port_in_use_fails_with_the_servers_own_words(tmp_path: Path) -> None:
    async with EmbeddedServer(ServerSettings(store=tmp_path / "a")) as server:
        other = EmbeddedServer(ServerSettings(store=tmp_path / "b", port=server.port))
        with pytest.raises(EmbeddedServerFailed, match="address already in use"):
            await other.start()
        assert other.pid == 0


async def test_the_files_of_the_store_are_private(tmp_path: Path) -> None:
    store = tmp_path / "store"
    async with EmbeddedServer(ServerSettings(store=store)):
        assert stat.S_IMODE(store.stat().st_mode) == 0o700
        assert stat.S_IMODE((store / "nats-server.conf").stat().st_mode) == 0o600


_HOLDER = """
import asyncio, sys, time
from pathlib import Path
from modelbus_broker.server import EmbeddedServer, ServerSettings

async def main() -> None:
    server = EmbeddedServer(ServerSettings(store=Path(sys.argv[1])))
    await server.start()
    print(server.pid, flush=True)
    time.sleep(600)

asyncio.run(main())
"""


def test_it_dies_with_a_parent_that_is_killed(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", _HOLDER, str(tmp_path)], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        assert _alive(pid)
        os.kill(parent.pid, signal.SIGKILL)
        assert _wait_gone(pid)

    async def start_again() -> None:
        async with EmbeddedServer(ServerSettings(store=tmp_path)):
            pass

    asyncio.run(start_again())


async def test_three_servers_form_a_cluster(tmp_path: Path, free_ports: list[int]) -> None:
    routes = [f"nats://127.0.0.1:{port}" for port in free_ports[:3]]
    servers = [
        EmbeddedServer(
            ServerSettings(
                store=tmp_path / f"n{index}",
                cluster=ClusterSettings(name=f"n{index}", port=free_ports[index], routes=routes),
            )
        )
        for index in range(3)
    ]
    try:
        await asyncio.gather(*(server.start() for server in servers))
        deadline = time.monotonic() + 20
        members: object = None
        while time.monotonic() < deadline:
            members = (await _says_hello(servers[0].port)).get("connect_urls")
            if isinstance(members, list) and len(members) == 3:
                break
            await asyncio.sleep(0.1)
        assert isinstance(members, list) and len(members) == 3
    finally:
        for server in servers:
            await server.stop()


@pytest.fixture
def free_ports() -> list[int]:
    sockets = [socket.socket() for _ in range(3)]
    try:
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [int(each.getsockname()[1]) for each in sockets]
    finally:
        for each in sockets:
            each.close()
