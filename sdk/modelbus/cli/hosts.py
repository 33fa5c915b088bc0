"""start, stop, status: the bus and the node of this host."""

from __future__ import annotations

import contextlib
import socket
import subprocess
import sys
import time
from pathlib import Path

import click
import msgspec
import psutil
from modelbus_broker.connection import Bus
from modelbus_broker.errors import BusUnavailable, ConfigurationError, EmbeddedServerFailed
from modelbus_broker.registry import Registry
from modelbus_broker.settings import BusState, bus_settings, home, read_bus_state
from modelbus_broker.topology import declare_bus

from .main import EXIT_NO_BUS, SeedCommand, bus_options, json_option
from .output import print_json, print_table, wants_json
from .session import run

BUS_MODULE, NODE_MODULE = "modelbus_broker.server_main", "modelbus_workers.node"
START_TIMEOUT_S = 60.0


class Running(msgspec.Struct, frozen=True):
    """Our processes on this host; 0 = none."""

    bus_pid: int
    node_pid: int


def running() -> Running:
    """Looks by pid and by what the process is, so that a pid that was used again is not ours."""
    state = read_bus_state()
    bus_pid = state.pid if state and state.pid and _is(state.pid, BUS_MODULE) else 0
    node_pid = 0
    with contextlib.suppress(OSError, ValueError):
        pid = int((home() / "node.lock").read_text().strip() or 0)
        node_pid = pid if pid and _is(pid, NODE_MODULE) else 0
    return Running(bus_pid, node_pid)


def _is(pid: int, module: str) -> bool:
    try:
        process = psutil.Process(pid)
        return process.status() != psutil.STATUS_ZOMBIE and module in process.cmdline()
    except psutil.Error:
        return False


@click.command(cls=SeedCommand)
@click.option("--head", is_flag=True, help="Start a bus here too; without it this host joins one.")
@click.option("--listen", default="", metavar="ADDR", help="Let other hosts in at this address; makes credentials.")
@click.option(
    "--port", type=click.IntRange(0, 65535), default=0, help="Of the bus; 0 = a free one, 4222 with --listen."
)
@click.option("--label", multiple=True, metavar="K=V", help="What this host offers, for `deploy --require`.")
@click.option("--cpus", type=float, help="CPUs to offer (default: all).")
@click.option("--gpus", type=int, help="GPUs to offer (default: all).")
@click.option("--memory-mb", type=int, help="Memory to offer, MiB (default: all).")
@click.option("--tls-cert", default="", help="Certificate of the bus, PEM; turns TLS on.")
@click.option("--tls-key", default="", help="Its key, PEM.")
@click.option("--tls-ca", default="", help="What clients check the certificate with, PEM.")
@bus_options
def start(
    head: bool, listen: str, port: int, label: tuple[str, ...], cpus: float | None, gpus: int | None,
    memory_mb: int | None, tls_cert: str, tls_key: str, tls_ca: str, address: str, creds: str,
) -> None:  # fmt: skip
    """Start a bus and a node on this host, or join this host to a bus."""
    if head == bool(address):
        raise click.UsageError(
            "say which: `modelbus start --head` starts a bus on this host, "
            "`modelbus start --address nats://HOST:PORT --creds FILE` joins one"
        )
    if (listen or port) and not head:
        raise click.UsageError("--listen and --port belong to a bus: add --head")
    now = running()
    if now.bus_pid and head:
        raise EmbeddedServerFailed(f"a bus runs on this host already (pid {now.bus_pid}): `modelbus stop` ends it")
    if now.node_pid:
        raise ConfigurationError(f"a node runs on this host already (pid {now.node_pid}): `modelbus stop` ends it")
    offer = [part for text in label for part in ("--label", text)]
    for flag, value in (("--cpus", cpus), ("--gpus", gpus), ("--memory-mb", memory_mb)):
        offer += [flag, str(value)] if value is not None else []
    started: list[subprocess.Popen[bytes]] = []
    try:
        if head:
            bus_flags = [] if not listen else ["--listen", listen]
            bus_flags += ["--port", str(port)] if port else []
            for flag, path in (("--tls-cert", tls_cert), ("--tls-key", tls_key), ("--tls-ca", tls_ca)):
                bus_flags += [flag, path] if path else []
            started.append(_spawn(BUS_MODULE, bus_flags, "bus.log"))
            _wait(started[-1], "bus.log", lambda: running().bus_pid != 0, "the bus")
            run(_declare())
            node_flags = []
        else:
            run(_check(address, creds, tls_ca))
            node_flags = ["--address", address] + (["--creds", creds] if creds else [])
            node_flags += ["--tls-ca", tls_ca] if tls_ca else []
        started.append(_spawn(NODE_MODULE, node_flags + offer, "node.log"))
        node = started[-1]
        _wait(node, "node.log", lambda: run(_has_node(node.pid, address, creds, tls_ca)), "the node")
        if not head:
            _remember(address, creds, tls_ca)
    except BaseException:
        for process in reversed(started):
            _end(process.pid, 60.0)
        raise
    _say_what_runs(head, listen)


def _spawn(module: str, flags: list[str], log_name: str) -> subprocess.Popen[bytes]:
    logs = home() / "logs"
    logs.mkdir(parents=True, exist_ok=True, mode=0o700)
    with (logs / log_name).open("ab") as log:
        return subprocess.Popen(
            [sys.executable, "-m", module, *flags],
            stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
        )  # fmt: skip


def _wait(process: subprocess.Popen[bytes], log_name: str, ready: object, what: str) -> None:
    assert callable(ready)
    end = time.monotonic() + START_TIMEOUT_S
    while not ready():
        if process.poll() is not None or time.monotonic() > end:
            log = home() / "logs" / log_name
            last = [line for line in log.read_text(errors="replace").splitlines() if line.strip()][-5:]
            how = "ended" if process.poll() is not None else f"was not ready after {START_TIMEOUT_S:g} s"
            raise EmbeddedServerFailed(f"{what} {how}; its last words ({log}):\n" + "\n".join(last))
        time.sleep(0.05)


async def _declare() -> None:
    async with await Bus.connect(bus_settings(), name="modelbus start") as bus:
        await declare_bus(bus)


async def _check(address: str, creds: str, tls_ca: str) -> None:
    async with await Bus.connect(bus_settings(address, creds, tls_ca=tls_ca), name="modelbus start"):
        pass


async def _has_node(pid: int, address: str, creds: str, tls_ca: str) -> bool:
    """The node's record is on the bus."""
    host = socket.gethostname()
    async with await Bus.connect(bus_settings(address, creds, tls_ca=tls_ca), name="modelbus start") as bus:
        registry = Registry(bus)
        try:
            await registry.start()
            return any(node.pid == pid and node.host == host for node in registry.nodes.values())
        except BusUnavailable:
            return False
        finally:
            await registry.close()


def _remember(address: str, creds: str, tls_ca: str) -> None:
    """Other commands on this host use the bus that it has joined."""
    settings = bus_settings(address, creds, tls_ca=tls_ca)
    state = BusState(
        url=settings.url,
        creds=str(Path(settings.creds).resolve()) if settings.creds else "",
        tls_ca=str(Path(tls_ca).resolve()) if tls_ca else "",
        started_ms=time.time_ns() // 1_000_000,
    )
    path = home() / "bus.json"
    path.touch(mode=0o600, exist_ok=True)
    path.write_bytes(msgspec.json.format(msgspec.json.encode(state)))


def _say_what_runs(head: bool, listen: str) -> None:
    state = read_bus_state()
    assert state is not None
    now = running()
    click.echo(f"bus   {state.url}" + (f" (pid {now.bus_pid})" if head else ""))
    click.echo(f"node  pid {now.node_pid}; logs in {home() / 'logs'}")
    if listen:
        port = state.url.rsplit(":", 1)[1]
        shown = socket.getfqdn() if listen in ("0.0.0.0", "::") else listen
        folder = home() / "credentials"
        scheme = state.url.split("://")[0]
        click.echo(
            f"\nOther hosts join with the worker credential (copy {folder / 'worker.cred'} there):\n"
            f"  modelbus start --address {scheme}://{shown}:{port} --creds worker.cred\n"
            f"Clients and gateways use {folder / 'client.cred'}."
        )
    click.echo(
        "\nNext: modelbus deploy --pretrained_model_type saas/openai --infer_params saas.api_key=env:OPENAI_API_KEY \\"
    )
    click.echo("        saas.model=gpt-4o-mini --model chat      (modelbus deploy --help says more)")


@click.command(cls=SeedCommand)
@click.option("--timeout-s", type=float, default=120.0, show_default=True,
              help="What has not ended then is killed; workers take their deployment's drain time.")  # fmt: skip
def stop(timeout_s: float) -> None:
    """Stop the node and the bus of this host; workers finish what they can first."""
    now = running()
    if not (now.node_pid or now.bus_pid):
        state = home() / "bus.json"
        state.unlink(missing_ok=True)
        click.echo("nothing runs on this host", err=True)
        raise click.exceptions.Exit(EXIT_NO_BUS)
    # The node first: its workers give back what they hold while the bus is there.
    for pid, what in ((now.node_pid, "node"), (now.bus_pid, "bus")):
        if pid:
            click.echo(f"stopping the {what} (pid {pid})", err=True)
            _end(pid, timeout_s)
    (home() / "bus.json").unlink(missing_ok=True)


def _end(pid: int, timeout_s: float) -> None:
    """SIGTERM, and SIGKILL for one that does not end."""
    try:
        process = psutil.Process(pid)
        process.terminate()
        if not _ended(process, timeout_s):
            process.kill()
            _ended(process, 5.0)
    except psutil.NoSuchProcess:
        return


def _ended(process: psutil.Process, timeout_s: float) -> bool:
    """Waits; a zombie has ended, however long its parent takes to notice."""
    end = time.monotonic() + timeout_s
    while process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
        if time.monotonic() > end:
            return False
        time.sleep(0.02)
    return True


@click.command(cls=SeedCommand)
@bus_options
@json_option
def status(address: str, creds: str, as_json: bool) -> None:
    """Show the bus, the nodes and the workers; exit code 3 when there is no bus."""
    run(_status(address, creds, as_json))


async def _status(address: str, creds: str, as_json: bool) -> None:
    settings = bus_settings(address, creds)
    async with await Bus.connect(settings, name="modelbus status") as bus:
        registry = Registry(bus)
        try:
            await registry.start()
            nodes = sorted(registry.nodes.values(), key=lambda node: node.host)
            workers = sorted(registry.workers.values(), key=lambda w: (w.model, w.deployment, w.replica))
        finally:
            await registry.close()
    if wants_json(as_json):
        print_json({"bus": settings.url, "nodes": nodes, "workers": workers})
        return
    click.echo(f"bus  {settings.url}")
    print_table(
        "nodes",
        ("host", "CPUs free", "memory free", "GPUs", "replicas", "engines"),
        (
            (
                node.host, f"{node.cpus_free:g} of {node.cpus:g}", f"{node.memory_free_mb} of {node.memory_mb} MiB",
                len(node.gpus), len(node.replicas), ", ".join(node.engines),
            )
            for node in nodes
        ),
    )  # fmt: skip
    print_table(
        "workers",
        ("model", "replica", "engine", "state", "busy", "requests", "host", ""),
        (
            (w.model, w.replica, w.engine, w.state, f"{w.busy}/{w.slots}", w.total_requests, w.host, w.words)
            for w in workers
        ),
    )
