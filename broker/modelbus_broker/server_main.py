"""`python -m modelbus_broker.server_main`: the embedded bus in the foreground, as `modelbus start --head` runs it.

A server that dies is started again on the same port. While it runs, ``bus.json`` in the home folder tells the other
commands on this host where it is.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import ipaddress
import logging
import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import msgspec

from .credentials import make_credentials, server_users
from .errors import ConfigurationError, EmbeddedServerFailed, ModelBusError
from .server import EmbeddedServer, ServerSettings, ServerUser
from .settings import BusState, home, read_bus_state

log = logging.getLogger(__name__)

#: Where a bus for other hosts listens, so that the join command stays the same over restarts.
DEFAULT_PORT = 4222
_MOST_FAILED_STARTS = 5


class ServerProcessSettings(msgspec.Struct, frozen=True, kw_only=True):
    """How this host's bus is run."""

    home: Path
    listen: str = ""  #: an address of this host; "": the loopback, without credentials
    port: int = 0  #: 0: a free one; with ``listen`` 4222
    tls_cert: str = ""
    tls_key: str = ""
    tls_ca: str = ""  #: what clients on this host check the server's certificate with

    @property
    def guarded(self) -> bool:
        return bool(self.listen)

    @property
    def store(self) -> Path:
        return self.home / "bus"

    @property
    def credentials(self) -> Path:
        return self.home / "credentials"


def parse(arguments: Sequence[str]) -> ServerProcessSettings:
    """The settings in a command line; exits with status 2 when it is wrong."""
    parser = argparse.ArgumentParser(prog="python -m modelbus_broker.server_main", description=(__doc__ or "").strip())
    parser.add_argument("--listen", default="", help="let other hosts in at this address; makes credentials")
    parser.add_argument("--port", type=int, default=0, help="0: a free one, or 4222 with --listen")
    parser.add_argument("--tls-cert", default="", help="PEM file; turns TLS on")
    parser.add_argument("--tls-key", default="")
    parser.add_argument("--tls-ca", default="", help="what clients check the certificate with")
    parsed = parser.parse_args(arguments)
    if not 0 <= parsed.port <= 65535:
        parser.error(f"argument --port: {parsed.port} is not a port: 1 to 65535, or 0 for a free one")
    if bool(parsed.tls_cert) != bool(parsed.tls_key):
        parser.error("--tls-cert and --tls-key belong together")
    if parsed.listen:
        with contextlib.suppress(ValueError):
            if ipaddress.ip_address(parsed.listen).is_multicast:
                parser.error(f"argument --listen: nobody can listen on {parsed.listen}")
    return ServerProcessSettings(
        home=home(),
        listen=parsed.listen,
        port=parsed.port,
        tls_cert=_absolute(parsed.tls_cert),
        tls_key=_absolute(parsed.tls_key),
        tls_ca=_absolute(parsed.tls_ca),
    )


async def serve(settings: ServerProcessSettings, stop: asyncio.Event) -> None:
    """Runs the server until ``stop`` is set.

    Raises:
        EmbeddedServerFailed: it does not start, or not again after it died.
    """
    users: Sequence[ServerUser] = ()
    creds = ""
    if settings.guarded:
        creds = str(make_credentials(settings.credentials)["admin"])
        users = server_users(settings.credentials)
    server = EmbeddedServer(
        ServerSettings(
            store=settings.store,
            host=settings.listen or "127.0.0.1",
            port=settings.port or (DEFAULT_PORT if settings.guarded else 0),
            users=users,
            tls_cert=settings.tls_cert,
            tls_key=settings.tls_key,
        )
    )
    started_ms = time.time_ns() // 1_000_000
    try:
        await _start(server, stop)
        while not stop.is_set():
            _write_state(
                settings.home,
                BusState(url=server.url, pid=os.getpid(), creds=creds, tls_ca=settings.tls_ca, started_ms=started_ms),
            )
            log.info("the bus is ready at %s", server.url)
            dead = asyncio.ensure_future(server.wait())
            stopping = asyncio.ensure_future(stop.wait())
            await asyncio.wait({dead, stopping}, return_when=asyncio.FIRST_COMPLETED)
            stopping.cancel()
            if not dead.done():
                dead.cancel()
                break
            log.error("nats-server ended with status %s: starting it again", dead.result())
            await _start(server, stop)
    finally:
        _remove_state(settings.home)
        await server.stop()


async def _start(server: EmbeddedServer, stop: asyncio.Event) -> None:
    for attempt in range(1, _MOST_FAILED_STARTS + 1):
        try:
            return await server.start()
        except EmbeddedServerFailed as error:
            if stop.is_set() or attempt == _MOST_FAILED_STARTS or "in use by" in str(error):
                raise
            log.warning("attempt %d: %s", attempt, error)
            await asyncio.sleep(0.2 * attempt)


def _write_state(folder: Path, state: BusState) -> None:
    draft = folder / f".bus.json.{os.getpid()}"
    with os.fdopen(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
        file.write(msgspec.json.format(msgspec.json.encode(state)) + b"\n")
    draft.replace(folder / "bus.json")


def _remove_state(folder: Path) -> None:
    with contextlib.suppress(ConfigurationError):
        state = read_bus_state()
        if state is not None and state.pid == os.getpid():
            (folder / "bus.json").unlink(missing_ok=True)


def _absolute(path: str) -> str:
    return str(Path(path).expanduser().resolve()) if path else ""


async def _main(settings: ServerProcessSettings) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    await serve(settings, stop)


def main(arguments: Sequence[str] | None = None) -> int:
    settings = parse(sys.argv[1:] if arguments is None else arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s", stream=sys.stderr)
    settings.home.mkdir(parents=True, exist_ok=True, mode=0o700)
    try:
        asyncio.run(_main(settings))
    except ModelBusError as error:
        sys.stderr.write(f"Error: {error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
