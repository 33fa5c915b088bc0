"""How long `modelbus storage start` takes, from the command to a service that has answered a request through its queue.

The floor is what no command can do without: two Python processes, one after the other, that import the libraries of the
command line and of the engine and do nothing.
"""

from __future__ import annotations

import asyncio
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from .plan import Line, Plan
from .stand import Stand

_LIBRARIES = ("import asyncio, click, msgspec, nats", "import asyncio, msgspec, nats, numpy, snowballstemmer, tantivy")


async def storage_start(stand: Stand, plan: Plan) -> list[Line]:
    """`modelbus storage start`, embedded, in a home of its own."""
    return await asyncio.to_thread(_measured, plan.rounds)


def _measured(rounds: int) -> list[Line]:
    starts, floors = [], []
    with tempfile.TemporaryDirectory(prefix="modelbus-bench-") as home:
        _run(home, "start", "--head")
        try:
            for _ in range(rounds):
                starts.append(_run(home, "storage", "start"))
                _run(home, "storage", "stop")
                began = time.perf_counter()
                for libraries in _LIBRARIES:
                    subprocess.run([sys.executable, "-c", libraries], check=True)
                floors.append(time.perf_counter() - began)
        finally:
            _run(home, "stop")
    start, floor = statistics.median(starts), statistics.median(floors)
    return [
        Line(
            what="modelbus storage start",
            modelbus=f"{start:.2f} s",
            other=f"{floor:.2f} s (two processes that import the libraries)",
            result=f"{start / floor:.2f} times",
            goal="2 s or less",
            met=start <= 2,
        )
    ]


def _run(home: str, *arguments: str) -> float:
    """Seconds that a command took."""
    environment = {**os.environ, "MODELBUS_HOME": home, "MODELBUS_ADDRESS": "", "MODELBUS_CREDS": ""}
    command = [str(Path(sys.executable).with_name("modelbus")), *arguments]
    began = time.perf_counter()
    subprocess.run(command, check=True, capture_output=True, env=environment)
    return time.perf_counter() - began
