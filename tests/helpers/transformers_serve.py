"""``transformers serve``: a real OpenAI-compatible server that this project did not write."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec


class Served(msgspec.Struct, frozen=True, kw_only=True):
    base_url: str
    model: str  #: the name that the server knows it by


@contextmanager
def transformers_serve(folder: Path, scratch: Path, *, timeout_s: float = 100.0) -> Iterator[Served]:
    """Serves the model in ``folder`` on the loopback until the context ends. Needs fastapi and uvicorn."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(scratch / "hf"), "OMP_NUM_THREADS": "1"}
    command = [str(Path(sys.executable).parent / "transformers"), "serve", "--host", "127.0.0.1", "--port", str(port)]
    command += ["--device", "cpu", "--dtype", "float32", "--log-level", "error", str(folder)]
    log = scratch / "transformers-serve.log"
    with log.open("wb") as output:
        server = subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT)
    try:
        _until_healthy(f"http://127.0.0.1:{port}/health", server, log, timeout_s)
        yield Served(base_url=f"http://127.0.0.1:{port}/v1", model=str(folder))
    finally:
        server.terminate()
        try:
            server.wait(10)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()


def _until_healthy(url: str, server: subprocess.Popen[bytes], log: Path, timeout_s: float) -> None:
    end = time.monotonic() + timeout_s
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    while time.monotonic() < end:
        assert server.poll() is None, f"transformers serve ended:\n{log.read_text()[-2000:]}"
        try:
            with opener.open(url, timeout=2):
                return
        except OSError:
            time.sleep(0.2)
    raise AssertionError(f"transformers serve is not up after {timeout_s:.0f} s:\n{log.read_text()[-2000:]}")
