"""What a node needs before it works: its lock, its id, its keys and its connection."""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import socket
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

from modelbus_broker import names
from modelbus_broker.connection import Bus, JetStreamError
from modelbus_broker.credentials import Credential, load_credential
from modelbus_broker.errors import ConfigurationError
from modelbus_broker.sealing import make_seal_key
from modelbus_broker.topology import declare_bus, declare_memory

from .agent import Node
from .settings import NodeSettings


@contextlib.asynccontextmanager
async def running_node(settings: NodeSettings) -> AsyncIterator[Node]:
    """A node with its lock, its keys and its connection; call ``run`` on it.

    Raises:
        ConfigurationError: another node runs in this home folder, or a file there is damaged.
        BusUnavailable, AuthenticationFailed: see ``Bus.connect``.
    """
    settings.home.mkdir(parents=True, exist_ok=True, mode=0o700)
    with _locked(settings.home):
        credential = _credential(settings)
        seal_key = credential.seal_key or make_seal_key(settings.home / "node.key")
        node_id = _node_id(settings.home)
        async with await Bus.connect(settings.bus, name=f"node {node_id}") as bus:
            if credential.may_administer:
                await _declare_if_new(bus)
            yield Node(settings, node_id, bus, seal_key, may_administer=credential.may_administer)


def _credential(settings: NodeSettings) -> Credential:
    return load_credential(Path(settings.bus.creds).expanduser()) if settings.bus.creds else Credential()


async def _declare_if_new(bus: Bus) -> None:
    """Declares the bus unless it is: how many copies its streams have is not ours to change."""
    try:
        await bus.js_request(f"STREAM.INFO.{names.STREAM_HI}")
        await declare_memory(bus)
    except JetStreamError:
        await declare_bus(bus)


@contextlib.contextmanager
def _locked(home: Path) -> Iterator[None]:
    path = home / "node.lock"
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.read(descriptor, 32).decode().strip() or "unknown"
            raise ConfigurationError(
                f"a node with pid {holder} runs on this host already (home folder {home}): `modelbus stop` ends it"
            ) from None
        os.truncate(descriptor, 0)
        os.write(descriptor, f"{os.getpid()}\n".encode())
        yield
        os.truncate(descriptor, 0)
    finally:
        os.close(descriptor)


def _node_id(home: Path) -> str:
    """The node's id: the same over restarts, so that it finds its own claims and failures again."""
    path = home / "node.id"
    if not path.exists():
        host = re.sub(r"[^a-z0-9]+", "-", socket.gethostname().lower()).strip("-")[:24] or "node"
        path.write_text(f"{host}-{names.random_token(6)}\n")
    return path.read_text().strip()
