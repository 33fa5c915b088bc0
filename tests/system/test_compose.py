"""The files in compose/ without containers: their shape, and the same servers and credentials as plain processes."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from modelbus.cli.storage import storage
from modelbus.spec import parse_params
from modelbus_broker.connection import Bus
from modelbus_broker.errors import BusUnavailable
from modelbus_broker.server import nats_server_binary
from modelbus_broker.settings import BusSettings
from ruamel.yaml import YAML

ROOT = Path(__file__).resolve().parents[2]
COMPOSE = ROOT / "compose"
SEARCH = COMPOSE / "elasticsearch.yml"
FILES = [COMPOSE / "docker-compose.yml", COMPOSE / "cluster.yml", SEARCH]


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_the_files_have_the_shape_of_the_compose_specification(file: Path) -> None:
    tool = Path(sys.executable).with_name("check-jsonschema")
    done = subprocess.run([tool, "--builtin-schema", "vendor.compose-spec", file], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_only_the_gateway_has_a_port_and_only_on_the_loopback() -> None:
    ports: dict[str, list[str]] = {}
    for file in FILES:
        for name, service in YAML(typ="safe").load(file.read_text())["services"].items():
            ports |= {name: service["ports"]} if "ports" in service else {}
            assert service.get("network_mode") != "host"
    assert list(ports) == ["gateway"]
    assert all(port.startswith("127.0.0.1:") for port in ports["gateway"])


def test_every_file_that_the_services_mount_exists_or_is_made_by_prepare(tmp_path: Path) -> None:
    prepare(tmp_path)
    for file in FILES:
        document = YAML(typ="safe").load(file.read_text())
        for entry in [*document.get("configs", {}).values(), *document.get("secrets", {}).values()]:
            name = entry["file"].removeprefix("./")
            place = tmp_path / name.removeprefix("secrets/") if name.startswith("secrets/") else COMPOSE / name
            assert place.is_file(), name


def test_elasticsearch_has_the_free_licence_keeps_its_data_and_its_search_service_can_be_started() -> None:
    services = YAML(typ="safe").load(SEARCH.read_text())["services"]
    server, (command, *arguments) = services["elasticsearch"], services["storage"]["command"][1:]
    assert server["environment"]["xpack.license.self_generated.type"] == "basic"
    assert server["environment"]["xpack.security.enabled"] == "true" and "healthcheck" in server
    assert server["volumes"] == ["elasticsearch:/usr/share/elasticsearch/data"] and server["networks"] == ["search"]
    assert services["worker"]["networks"] == ["search"]
    start = storage.commands[command]
    given = start.make_context(command, list(arguments)).params
    assert given["url"] == "http://elasticsearch:9200"
    assert parse_params(given["infer_params"]) == {"user": "elastic", "password": "env:ELASTIC_PASSWORD"}


def test_prepare_keeps_what_is_there(tmp_path: Path) -> None:
    prepare(tmp_path)
    before = {path.name: path.read_text() for path in tmp_path.iterdir() if path.is_file()}
    prepare(tmp_path)
    assert {path.name: path.read_text() for path in tmp_path.iterdir() if path.is_file()} == before


class Processes:
    """What a test starts; all of it ends with the test."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.started: list[subprocess.Popen[bytes]] = []

    def start(self, *command: str | Path, **environment: str) -> subprocess.Popen[bytes]:
        with (self.folder / f"process-{len(self.started)}.log").open("wb") as log:
            process = subprocess.Popen(command, env={**os.environ, **environment}, stdout=log, stderr=log)
        self.started.append(process)
        return process

    def logs(self) -> str:
        return "\n".join(path.read_text(errors="replace")[-2000:] for path in sorted(self.folder.glob("process-*.log")))

    def close(self) -> None:
        for process in reversed(self.started):
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
                try:
                    process.wait(20)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait(10)


@pytest.fixture
def processes(tmp_path: Path) -> Iterator[Processes]:
    processes = Processes(tmp_path)
    yield processes
    processes.close()


async def test_the_cluster_serves_with_these_files_and_survives_the_loss_of_one_server(
    tmp_path: Path, processes: Processes
) -> None:
    secrets = tmp_path / "secrets"
    prepare(secrets)
    clients, routes = [free_port() for _ in range(3)], [free_port() for _ in range(3)]
    servers = []
    for number in range(3):
        folder = local_copy(tmp_path / f"nats-{number}", secrets, clients[number], routes, number)
        servers.append(
            processes.start(nats_server_binary(), "--config", folder / "cluster.conf", NATS_NAME=f"nats-{number}")
        )
    address = ",".join(f"nats://127.0.0.1:{port}" for port in clients)

    def environment(role: str) -> dict[str, str]:
        return {"MODELBUS_ADDRESS": address, "MODELBUS_CREDS": str(secrets / f"{role}.cred")}

    def declare() -> bool:
        command = [sys.executable, str(COMPOSE / "declare.py")]
        env = {**os.environ, **environment("admin"), "MODELBUS_REPLICAS": "3"}
        return subprocess.run(command, env=env, capture_output=True).returncode == 0

    def healthy() -> bool:
        env = {**os.environ, **environment("worker")}
        return subprocess.run([sys.executable, COMPOSE / "health.py"], env=env, capture_output=True).returncode == 0

    await until(declare, processes)  # the servers need a moment to choose a leader
    processes.start(sys.executable, "-m", "modelbus_workers.node", **environment("worker"))
    await until(healthy, processes)
    port = free_port()
    processes.start(sys.executable, "-m", "modelbus_gateway", "--port", str(port), **environment("client"))
    await until(lambda: answers(f"http://127.0.0.1:{port}/health/ready"), processes)

    servers[0].kill()

    await until(healthy, processes)
    await until(lambda: answers(f"http://127.0.0.1:{port}/health/ready"), processes)
    settings = BusSettings(url=address, creds=str(secrets / "admin.cred"))
    async with await Bus.connect(settings, name="test") as bus, asyncio.timeout(60):
        info = None
        while info is None:  # the other two choose a leader first
            with contextlib.suppress(BusUnavailable):
                info = await bus.js_request("STREAM.INFO.MB_HI")
    assert info["config"]["num_replicas"] == 3


def prepare(folder: Path) -> None:
    subprocess.run([sys.executable, COMPOSE / "prepare.py", folder], check=True, capture_output=True)


def local_copy(folder: Path, secrets: Path, client_port: int, routes: list[int], number: int) -> Path:
    """One server's files, with this host's ports and folders in place of its container's."""
    folder.mkdir()
    for path in [*COMPOSE.glob("*.conf"), *secrets.glob("*.conf")]:
        shutil.copy(path, folder)
    changes = {
        "nats.conf": [("0.0.0.0:4222", f"127.0.0.1:{client_port}"), ("127.0.0.1:8222", "127.0.0.1:-1"), ("/data", str(folder / "store"))],
        "cluster.conf": [("0.0.0.0:6222", f"127.0.0.1:{routes[number]}")],
    }  # fmt: skip
    for name, replacements in changes.items():
        text = (folder / name).read_text()
        for old, new in replacements:
            assert old in text
            text = text.replace(old, new)
        (folder / name).write_text(text)
    ports = iter(routes)
    text = re.sub(r"@nats(-\d)?:6222", lambda _: f"@127.0.0.1:{next(ports)}", (folder / "routes.conf").read_text())
    (folder / "routes.conf").write_text(text)
    return folder


async def until(condition: Callable[[], bool], processes: Processes) -> None:
    async with asyncio.timeout(60):
        while not await asyncio.to_thread(condition):
            failed = [process.args for process in processes.started if process.poll() not in (None, -signal.SIGKILL)]
            assert not failed, f"{failed}\n{processes.logs()}"
            await asyncio.sleep(0.1)


def answers(url: str) -> bool:
    try:
        urllib.request.urlopen(url, timeout=2).close()
    except (urllib.error.URLError, ConnectionError, TimeoutError):
        return False
    return True


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])
