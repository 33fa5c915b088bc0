"""Every shell command of the document that this project is built from, run as it stands there."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from tests.helpers.command_line import environment, modelbus
from tests.helpers.seed_document import COPY, commands, document
from tests.helpers.smollm2 import smollm2
from tests.helpers.transformers_serve import Served, transformers_serve

pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")
pytest.importorskip("torch")

KEY = "sk-key-of-the-seed-test"


def as_modelbus(command: str, served: Served) -> str:
    """The command for our names, with keys, hosts and models of this machine."""
    for theirs, ours in (
        ("ray start --head", "modelbus start --head"),
        ("byzerllm ", "modelbus "),
        ("saas.model=gpt-3.5-turbo-0125", f"saas.model={served.model} saas.base_url={served.base_url}"),
        ("saas.model=llama3:70b-instruct-q4_0", f"saas.model={served.model}"),
        ("http://192.168.3.106:11434/v1/", f"{served.base_url}/"),
    ):
        command = command.replace(theirs, ours)
    return command


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with transformers_serve(smollm2(), tmp_path_factory.mktemp("served")) as served:
        yield served


@pytest.fixture
def stopped_afterwards() -> Iterator[None]:
    yield
    modelbus("stop")


def shell(command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", "-c", command], capture_output=True, text=True, timeout=150, env=environment(MODEL_OPENAI_TOKEN=KEY)
    )


def test_our_copy_of_the_commands_is_what_the_document_says() -> None:
    assert commands(document().read_text()) == commands(COPY.read_text())


@pytest.mark.timeout(400)
def test_every_command_of_the_document_works(served: Served, isolated_home: Path, stopped_afterwards: None) -> None:
    for command in commands(document().read_text()):
        if "--infer_backend vllm" in command:
            continue  # in tests/workers/engines/test_vllm_command.py, where vLLM is
        done = shell(as_modelbus(command, served))
        said = f"{command}\n{done.stdout}\n{done.stderr}"
        if "--port 80000" in command:
            assert done.returncode == 2, said
            assert "1 to 65535" in done.stderr
            continue
        assert done.returncode == 0, said
        if " query " in command:
            assert len(done.stdout.strip()) > 3, said
        elif " stat " in command:
            # Workers say twice a second what they have done.
            end = time.monotonic() + 30
            while sum(msgspec.json.decode(done.stdout)["total_requests"]) < 2 and time.monotonic() < end:
                done = shell(as_modelbus(command, served))
            stat = msgspec.json.decode(done.stdout)
            assert (stat["total_workers"], stat["load_balance_strategy"]) == (3, "lru")
            assert len(stat["total_requests"]) == len(stat["state"]) == len(stat["workers_last_work_time"]) == 3
            assert sum(stat["total_requests"]) >= 2, "the question and the test request of deploy"
    left = [path for path in isolated_home.rglob("*") if path.is_file() and KEY.encode() in path.read_bytes()]
    assert left == [], "the key lies in a file"
