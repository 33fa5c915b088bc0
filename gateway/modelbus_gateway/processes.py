"""Several gateway processes on one port: the kernel deals connections out to them (SO_REUSEPORT).

The parent serves nothing. It starts the processes, hands each its settings on standard input (a key in an argument
could be read by every user of the host), starts again what crashes, and passes SIGTERM and SIGINT on. A process whose
parent is gone is ended by the kernel.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import shutil
import signal
import socket
import sys
import tempfile
from collections.abc import Callable

import msgspec
from modelbus_broker.parent import die_with_parent

from .metrics import MULTIPROCESS_FOLDER
from .server import cannot_listen
from .settings import GatewaySettings

log = logging.getLogger(__name__)

FIRST_BACKOFF_S, LAST_BACKOFF_S = 0.5, 30.0
READY = b"ready\n"


async def serve_processes(settings: GatewaySettings, ready: Callable[[], None]) -> int:
    """Serves with ``settings.processes`` processes until SIGTERM or SIGINT. Returns the exit status.

    Raises:
        ConfigurationError: the address cannot be listened on.
    """
    held = _hold_port(settings)
    folder = tempfile.mkdtemp(prefix="modelbus-gateway-")
    try:
        return await _Supervisor(settings, folder).run(ready)
    finally:
        held.close()
        shutil.rmtree(folder, ignore_errors=True)


def _hold_port(settings: GatewaySettings) -> socket.socket:
    """Takes the port without listening, so that it fails here and at once when it cannot be had."""
    try:
        family, _, _, _, address = socket.getaddrinfo(settings.host, settings.port, type=socket.SOCK_STREAM)[0]
        held = socket.socket(family, socket.SOCK_STREAM)
        try:
            held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            held.bind(address)
        except OSError:
            held.close()
            raise
    except OSError as error:
        raise cannot_listen(settings, error) from error
    return held


class _Supervisor:
    def __init__(self, settings: GatewaySettings, folder: str) -> None:
        self._settings = settings
        self._job = msgspec.json.encode(settings) + b"\n"
        self._environment = {**os.environ, MULTIPROCESS_FOLDER: folder}
        self._folder = folder
        self._stopping = asyncio.Event()
        self._running: set[asyncio.subprocess.Process] = set()
        self._waiting_for_ready = settings.processes
        self._status = 0

    async def run(self, ready: Callable[[], None]) -> int:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._signal, number)

        def one_ready() -> None:
            self._waiting_for_ready -= 1
            if self._waiting_for_ready == 0:
                ready()

        await asyncio.gather(*(self._keep(one_ready) for _ in range(self._settings.processes)))
        return self._status

    def _signal(self, number: signal.Signals) -> None:
        self._stopping.set()
        for process in self._running:
            with contextlib.suppress(ProcessLookupError):  # it has just ended by itself
                process.send_signal(number)

    async def _keep(self, one_ready: Callable[[], None]) -> None:
        """Runs one of the processes and starts it again when it ends by itself."""
        backoff_s, was_ready = FIRST_BACKOFF_S, False
        while not self._stopping.is_set():
            status, got_ready = await self._run_once(None if was_ready else one_ready)
            was_ready = was_ready or got_ready
            if self._stopping.is_set():
                return
            if not was_ready:
                # It never worked: the reason, which it has printed, will not go away by itself.
                self._status = status or 1
                self._signal(signal.SIGTERM)
                return
            backoff_s = FIRST_BACKOFF_S if got_ready else min(backoff_s * 2, LAST_BACKOFF_S)
            log.error("a gateway process ended with status %s; a new one starts in %.1f s", status, backoff_s)
            try:
                await asyncio.wait_for(self._stopping.wait(), backoff_s)
            except TimeoutError:
                continue

    async def _run_once(self, one_ready: Callable[[], None] | None) -> tuple[int, bool]:
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "modelbus_gateway", "--settings-from-stdin",
            stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, env=self._environment,
            # A terminal's Ctrl-C reaches the parent only, which passes it on: a second one must not come too early.
            start_new_session=True, preexec_fn=die_with_parent(signal.SIGTERM),
        )  # fmt: skip
        assert process.stdin is not None and process.stdout is not None
        self._running.add(process)
        try:
            if self._stopping.is_set():  # it came while the process was made
                with contextlib.suppress(ProcessLookupError):
                    process.terminate()
            process.stdin.write(self._job)
            process.stdin.close()
            got_ready = await process.stdout.readline() == READY
            if got_ready and one_ready is not None:
                one_ready()
            await process.stdout.read()
            return await process.wait(), got_ready
        finally:
            self._running.discard(process)
            self._forget(process.pid)

    def _forget(self, pid: int) -> None:
        """Takes the gauges of a process that ended out of /metrics; its counters stay counted."""
        for name in os.listdir(self._folder):
            if name.startswith("gauge_live") and name.endswith(f"_{pid}.db"):
                os.unlink(os.path.join(self._folder, name))
