"""The previous major version of the OpenAI client, in an environment of its own that `make setup` makes."""

from __future__ import annotations

import asyncio
import json
import subprocess
from pathlib import Path

import pytest
from modelbus_gateway.server import listening
from modelbus_gateway.settings import GatewaySettings

from tests.helpers.cluster import Cluster

ROOT = Path(__file__).resolve().parents[2]
PYTHON = ROOT / ".venv-openai2" / "bin" / "python"


@pytest.mark.skipif(not PYTHON.exists(), reason="the second environment is not here: make setup")
async def test_the_openai_client_2_gets_the_same_answers(cluster: Cluster, unused_tcp_port: int) -> None:
    await cluster.deploy_echo("echo")
    settings = GatewaySettings(bus=cluster.settings, port=unused_tcp_port)

    async with listening(settings):
        done = await asyncio.to_thread(
            subprocess.run,
            [str(PYTHON), str(ROOT / "tests" / "helpers" / "openai_client.py"), f"{settings.address}/v1", "echo"],
            capture_output=True,
            text=True,
            timeout=60,
        )

    assert done.returncode == 0, done.stderr
    answers = json.loads(done.stdout)
    assert answers.pop("version").startswith("2.")
    assert answers == {
        "plain": "one two three",
        "plain_usage": 6,
        "stream": "one two three",
        "stream_usage": 6,
        "completion": "four five",
        "vectors": 2,
        "models": ["echo"],
        "missing": "model_not_found",
        "async_plain": "one two three",
        "async_stream": "one two three",
    }
