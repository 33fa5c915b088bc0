"""A bus that listens beyond its host: who comes from another host gets in with credentials only."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import stat
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import msgspec
import psutil
import pytest
from modelbus_broker.connection import Bus
from modelbus_broker.credentials import make_credentials
from modelbus_broker.errors import AuthenticationFailed
from modelbus_broker.messages import Chat, ChatMessage, Delta
from modelbus_broker.publisher import Publisher
from modelbus_broker.registry import Registry
from modelbus_broker.sealing import seal
from modelbus_broker.settings import BusSettings, BusState
from modelbus_broker.topology import declare_bus, declare_model

from tests.helpers.hosts import NodeProcess, alive, placed, until, wish
from tests.helpers.namespaces import Namespace


class BusProcess:
    """`python -m modelbus_broker.server_main`, as `modelbus start --head` runs it."""

    def __init__(self, home: Path, *arguments: str) -> None:
        self.home = home
        home.mkdir(parents=True, exist_ok=True)
        self.log = home / "bus.log"
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "modelbus_broker.server_main", *arguments],
                env={**os.environ, "MODELBUS_HOME": str(home)},
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip

    def state(self) -> BusState | None:
        try:
            return msgspec.json.decode((self.home / "bus.json").read_bytes(), type=BusState)
        except FileNotFoundError:
            return None

    async def ready(self) -> BusState:
        def known() -> bool:
            state = self.state()  # may be there from a bus that was killed
            return (state is not None and state.pid == self.process.pid) or self.process.poll() is not None

        await until(known, "the bus is ready")
        state = self.state()
        assert state is not None, self.log.read_text()
        return state

    def server(self) -> psutil.Process:
        (found,) = psutil.Process(self.process.pid).children()
        return found

    async def stop(self, number: signal.Signals = signal.SIGTERM) -> int:
        if self.process.poll() is None:
            self.process.send_signal(number)
        await until(lambda: self.process.poll() is not None, "the bus has ended")
        return int(self.process.returncode)


@pytest.fixture
def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_the_bus_process_leaves_nothing_when_it_is_stopped(tmp_path: Path, number: signal.Signals) -> None:
    bus = BusProcess(tmp_path / "head")
    state = await bus.ready()
    server = bus.server()
    assert (state.pid, state.creds) == (bus.process.pid, "")
    assert state.url.startswith("nats://127.0.0.1:")
    assert stat.S_IMODE((bus.home / "bus.json").stat().st_mode) == 0o600
    assert await bus.stop(number) == 0
    assert bus.state() is None
    assert not alive([server])


async def test_a_bus_that_dies_is_started_again_on_its_port(tmp_path: Path) -> None:
    bus = BusProcess(tmp_path / "head")
    try:
        state = await bus.ready()
        async with await Bus.connect(BusSettings(url=state.url), name="test") as connection:
            first = bus.server()
            first.kill()
            await until(lambda: not connection.is_connected, "the bus has gone")
            await until(lambda: connection.is_connected, "we are connected again")
            assert bus.server().pid != first.pid
    finally:
        await bus.stop()


async def test_a_killed_bus_process_takes_its_server_along(tmp_path: Path) -> None:
    bus = BusProcess(tmp_path / "head")
    await bus.ready()
    server = bus.server()
    await bus.stop(signal.SIGKILL)
    await until(lambda: not alive([server]), "the server has ended", 10)
    again = BusProcess(tmp_path / "head")
    await again.ready()
    assert await again.stop() == 0


async def test_one_home_folder_holds_one_bus(tmp_path: Path) -> None:
    bus = BusProcess(tmp_path / "head")
    try:
        await bus.ready()
        second = BusProcess(tmp_path / "head")
        await until(lambda: second.process.poll() is not None, "the second has given up")
        assert second.process.returncode == 1
        assert f"in use by a bus with pid {bus.server().pid}" in second.log.read_text()
        assert bus.state() is not None
    finally:
        await bus.stop()


def test_a_port_that_cannot_be_is_refused(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "modelbus_broker.server_main", "--port", "80000"], capture_output=True, text=True
    )
    assert done.returncode == 2
    assert "80000 is not a port: 1 to 65535" in done.stderr


async def test_who_listens_asks_for_credentials_even_on_this_host(tmp_path: Path, free_port: int) -> None:
    bus = BusProcess(tmp_path / "head", "--listen", "0.0.0.0", "--port", str(free_port))
    try:
        state = await bus.ready()
        assert state.creds == str(tmp_path / "head" / "credentials" / "admin.cred")
        with pytest.raises(AuthenticationFailed):
            await Bus.connect(BusSettings(url=state.url), name="test")
        async with await Bus.connect(BusSettings(url=state.url, creds=state.creds), name="test") as connection:
            await declare_bus(connection)
    finally:
        await bus.stop()


@pytest.fixture
async def head(tmp_path: Path, namespace: Namespace, free_port: int) -> AsyncIterator[BusProcess]:
    bus = BusProcess(tmp_path / "head", "--listen", namespace.host, "--port", str(free_port))
    state = await bus.ready()
    async with await Bus.connect(BusSettings(url=state.url, creds=state.creds), name="admin") as admin:
        await declare_bus(admin)
    yield bus
    await bus.stop()


@pytest.mark.parametrize("creds", ["", "of another cluster"])
async def test_another_host_is_refused_without_the_right_credentials(
    tmp_path: Path, head: BusProcess, namespace: Namespace, creds: str
) -> None:
    state = await head.ready()
    arguments = ["--address", state.url]
    if creds:
        arguments += ["--creds", str(make_credentials(tmp_path / "other" / "credentials")["worker"])]
    node = NodeProcess(tmp_path / "guest", *arguments, prefix=namespace.prefix)
    assert await node.ended() == 1
    assert "refuses these credentials" in node.log.read_text()


async def test_another_host_joins_and_serves_with_the_worker_credential(
    tmp_path: Path, head: BusProcess, namespace: Namespace
) -> None:
    state = await head.ready()
    folder = head.home / "credentials"
    # All that is carried to the other host.
    carried = tmp_path / "guest.cred"
    shutil.copy(folder / "worker.cred", carried)
    node = NodeProcess(tmp_path / "guest", "--address", state.url, "--creds", str(carried), prefix=namespace.prefix)
    try:
        async with (
            await Bus.connect(BusSettings(url=state.url, creds=state.creds), name="admin") as admin,
            await Bus.connect(BusSettings(url=state.url, creds=str(folder / "client.cred")), name="client") as client,
        ):
            registry = Registry(client)
            await registry.start()
            await until(lambda: node.log.exists() and registry.nodes, "the node has joined")
            record = registry.nodes[node.id]
            await declare_model(admin, "chat")
            await wish(admin, "chat", sealed={"text": seal(record.seal_key, "from afar")})
            await until(lambda: placed(registry, "chat") or registry.failures, "the replica is ok")
            assert dict(registry.failures) == {}

            publisher = Publisher(client, registry, kind="sdk")
            await publisher.start()
            task = Chat(messages=[ChatMessage(role="user", content="Hello")])
            said = ""
            async with await publisher.submit("chat", task) as call:
                async for batch in call.batches():
                    said += "".join(frame.text for frame in batch if isinstance(frame, Delta))
            assert said == "from afar"
            await publisher.close()

            logs = json.loads((await client.request("mb.logs", b'{"model": "chat"}')).data)
            assert logs["node"] == node.id
            await registry.close()
        assert "from afar" not in node.log.read_text()  # it was sealed
        family = node.family()
        node.send(signal.SIGTERM)
        assert await node.ended() == 0
        assert not alive(family)
        assert "ermissions" not in node.log.read_text()
        assert "ermissions" not in "".join(path.read_text() for path in (node.home / "logs").iterdir())
    finally:
        await node.close()
