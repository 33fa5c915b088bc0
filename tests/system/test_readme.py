"""The README's Python examples run as they stand there."""

from __future__ import annotations

import asyncio
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from modelbus_broker.messages import Deployment
from modelbus_gateway.server import listening
from modelbus_gateway.settings import GatewaySettings

from tests.helpers.cluster import Cluster

README = Path(__file__).resolve().parents[2] / "README.md"
EXAMPLES = re.findall(r"^```python\n(.*?)^```", README.read_text(), re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize(
    ("example", "engine"), list(zip(EXAMPLES, ["echo", "echo", "echo", "scripted"], strict=True)),
    ids=["openai", "asyncio", "blocking", "prompts"],
)  # fmt: skip
async def test_an_example_of_the_readme_works(
    example: str, engine: str, cluster: Cluster, unused_tcp_port: int
) -> None:
    if engine == "echo":  # says what it was asked
        await cluster.deploy_echo("chat")
        await cluster.deploy_echo("emb")
    else:  # answers in the form that it is asked for
        deployment = Deployment(name="chat", model="chat", engine=engine, revision="1")
        await cluster.declare(deployment)
        cluster.start_worker(deployment)
        await cluster.wait_ready("chat", 1)
    settings = GatewaySettings(bus=cluster.settings, port=unused_tcp_port)
    script = example.replace("127.0.0.1:8000", f"127.0.0.1:{unused_tcp_port}")

    async with listening(settings):
        done = await asyncio.to_thread(
            subprocess.run,
            [sys.executable, "-W", "error", "-c", script],
            env={**os.environ, "MODELBUS_ADDRESS": cluster.settings.url},
            capture_output=True,
            text=True,
            timeout=60,
        )

    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    if engine == "echo":
        assert "capital of France" in done.stdout
    else:
        assert len(done.stdout.splitlines()) == 2 and done.stdout.splitlines()[0].endswith((" good", " bad"))
