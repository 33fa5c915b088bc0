"""Gateways as processes."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import psutil

from tests.helpers.command_line import free_port


class GatewayProcess:
    """One ``python -m modelbus_gateway``."""

    def __init__(self, *arguments: str, environment: dict[str, str] | None = None) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.process = subprocess.Popen(
            [sys.executable, "-m", "modelbus_gateway", "--port", str(self.port), *arguments],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, **(environment or {})},
        )  # fmt: skip

    async def ready(self) -> None:
        assert self.process.stdout is not None
        line = await asyncio.wait_for(asyncio.to_thread(self.process.stdout.readline), 30)
        assert self.url in line

    async def ended(self) -> tuple[int, str]:
        """Exit status and what it wrote on standard error."""
        _, words = await asyncio.to_thread(self.process.communicate, timeout=30)
        return self.process.returncode, words

    def children(self) -> list[psutil.Process]:
        return list(psutil.Process(self.process.pid).children(recursive=True))


#: Starts a gateway with arguments of the command line.
Start = Callable[..., GatewayProcess]


@contextmanager
def started_gateways() -> Iterator[Start]:
    """A way to start gateways that end with the context."""
    started: list[GatewayProcess] = []

    def start_one(*arguments: str, environment: dict[str, str] | None = None) -> GatewayProcess:
        started.append(GatewayProcess(*arguments, environment=environment))
        return started[-1]

    yield start_one
    for gateway in started:
        if gateway.process.poll() is None:
            gateway.process.kill()
        gateway.process.communicate()
