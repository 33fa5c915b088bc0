"""nats-py without aiohttp, and with it for those who want WebSockets in the same process."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import time
from pathlib import Path

from modelbus_broker.server import nats_server_binary

PROGRAM = """
import asyncio, sys
import modelbus_broker.connection
assert "aiohttp" not in sys.modules
import nats

async def main() -> None:
    connection = await nats.connect(sys.argv[1])
    await connection.flush()
    print(connection.is_connected, "aiohttp" in sys.modules)
    await connection.close()

asyncio.run(main())
"""


def test_aiohttp_is_imported_only_where_a_program_connects_over_websockets(tmp_path: Path) -> None:
    config = tmp_path / "nats.conf"
    config.write_text('listen: "127.0.0.1:-1"\nwebsocket { listen: "127.0.0.1:-1", no_tls: true }\n')
    command = [str(nats_server_binary()), "--config", str(config), "--ports_file_dir", str(tmp_path)]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as server:
        try:
            url = _websocket_url(tmp_path)
            done = subprocess.run([sys.executable, "-c", PROGRAM, url], capture_output=True, text=True, timeout=100)
        finally:
            server.terminate()

    assert (done.stdout.split(), done.returncode) == (["True", "True"], 0), done.stderr


def _websocket_url(folder: Path) -> str:
    """Where the server listens, which it writes down when it does."""
    for _ in range(500):
        for file in folder.glob("*.ports"):
            with contextlib.suppress(json.JSONDecodeError):  # it is being written
                return str(json.loads(file.read_text())["websocket"][0])
        time.sleep(0.1)
    raise AssertionError("nats-server does not listen")
