"""Gateway processes for system tests: they keep their port over a restart, and write a log."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
from pathlib import Path

import aiohttp

from .bus_nodes import free_ports


class GatewayReplica:
    """``python -m modelbus_gateway`` on a port of its own, as often as it is started."""

    def __init__(self, bus_url: str, log_file: Path, *arguments: str) -> None:
        (self.port,) = free_ports(1)
        self.url = f"http://127.0.0.1:{self.port}"
        self.log_file = log_file
        self._command = [sys.executable, "-m", "modelbus_gateway", "--port", str(self.port), "--address", bus_url]
        self._command += arguments
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        with self.log_file.open("ab") as log:
            self.process = subprocess.Popen(self._command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)

    async def ready(self, timeout_s: float = 60.0) -> None:
        """Until it takes requests for at least one model."""
        async with asyncio.timeout(timeout_s), aiohttp.ClientSession() as session:
            while True:
                try:
                    async with session.get(f"{self.url}/health/ready") as response:
                        if response.status == 200 and (await response.json())["models"]:
                            return
                except aiohttp.ClientError:
                    pass
                assert self.process is not None and self.process.poll() is None, self.log_file.read_text()
                await asyncio.sleep(0.05)

    def send_signal(self, number: signal.Signals) -> None:
        assert self.process is not None
        self.process.send_signal(number)

    async def ended(self, timeout_s: float = 60.0) -> int:
        assert self.process is not None
        return await asyncio.to_thread(self.process.wait, timeout_s)

    async def close(self) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.kill()
            await self.ended()
