"""``python -m modelbus_gateway``: what ``modelbus serve`` runs. Exit status: 2 for wrong settings, 3 without a bus."""

from __future__ import annotations

import asyncio
import logging
import sys
from collections.abc import Coroutine
from typing import Any, TypeVar

import msgspec
from modelbus import tracing
from modelbus_broker.errors import AuthenticationFailed, BusUnavailable, ConfigurationError, ModelBusError

from .processes import READY, serve_processes
from .server import serve
from .settings import GatewaySettings, gateway_settings

T = TypeVar("T")


def main() -> int:
    arguments = sys.argv[1:]
    child = arguments == ["--settings-from-stdin"]
    try:
        if child:
            settings = msgspec.json.decode(sys.stdin.buffer.readline(), type=GatewaySettings)
        else:
            settings = gateway_settings(arguments)
        _log_to_stderr(settings.log_level)
        tracing.configure("modelbus-gateway")
        if child:
            _run(serve(settings, _child_is_ready, reuse_port=True))
        elif settings.processes > 1:
            return _run(serve_processes(settings, lambda: _is_ready(settings)))
        else:
            _run(serve(settings, lambda: _is_ready(settings)))
    except ModelBusError as error:
        sys.stderr.write(f"Error: {error.message}\n")
        match error:
            case ConfigurationError():
                return 2
            case BusUnavailable() | AuthenticationFailed():
                return 3
        return 1
    except (KeyboardInterrupt, asyncio.CancelledError):
        return 130  # a second signal: what still ran was cut
    return 0


def _run(main: Coroutine[Any, Any, T]) -> T:
    try:
        from uvloop import new_event_loop
    except ImportError:  # there is none for Windows
        return asyncio.run(main)
    with asyncio.Runner(loop_factory=new_event_loop) as runner:
        return runner.run(main)


def _is_ready(settings: GatewaySettings) -> None:
    sys.stdout.write(f"modelbus gateway on {settings.address} (OpenAI API: {settings.address}/v1)\n")
    sys.stdout.flush()


def _child_is_ready() -> None:
    sys.stdout.buffer.write(READY)
    sys.stdout.flush()


def _log_to_stderr(level: str) -> None:
    logging.basicConfig(
        level="DEBUG" if level == "trace" else level.upper(), format="%(asctime)s %(levelname)s %(name)s: %(message)s"
    )


if __name__ == "__main__":
    sys.exit(main())
