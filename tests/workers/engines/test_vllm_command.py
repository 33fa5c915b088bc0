"""The vLLM command of the document that this project is built from. Run inside .venv-vllm; see test_vllm_environment.py."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator

import pytest

from tests.helpers.command_line import environment, modelbus
from tests.helpers.seed_document import commands, document
from tests.helpers.smollm2 import smollm2

#: What this machine lacks: that model, a GPU, and memory that nobody else uses. The rest stands as it is.
REPLACED = (
    ("byzerllm ", "modelbus "),
    ("/home/winubuntu/models/openbuddy-zephyr-7b-v14.1", str(smollm2())),
    ("--gpus_per_worker 1", "--gpus_per_worker 0"),
    (
        "backend.max_model_len=28000",
        "backend.max_model_len=2800 backend.dtype=float32 backend.enforce_eager=true backend.kv_cache_memory_bytes=268435456",
    ),
)


@pytest.fixture
def head() -> Iterator[None]:
    assert modelbus("start", "--head").code == 0
    yield
    modelbus("stop")


@pytest.mark.timeout(400)
def test_the_command_of_the_document_brings_a_model_up_on_vllm(head: None) -> None:
    (command,) = (line for line in commands(document().read_text()) if "--infer_backend vllm" in line)
    for theirs, ours in REPLACED:
        assert theirs in command
        command = command.replace(theirs, ours)

    deployed = subprocess.run(
        ["bash", "-c", command], capture_output=True, text=True, timeout=350, env=environment(TORCHDYNAMO_DISABLE="1")
    )
    assert deployed.returncode == 0, f"{command}\n{deployed.stdout}\n{deployed.stderr}"

    said = modelbus("query", "--model", "zephyr_7b_chat", "--query", "What is the capital of France?")
    assert "Paris" in said.out, said
    state = modelbus("stat", "--model", "zephyr_7b_chat").json()
    assert state["total_workers"] == 1
