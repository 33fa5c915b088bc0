"""Runs the tests of the vllm engine in the environment that has vLLM."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from tests.helpers.smollm2 import smollm2
from tests.helpers.vllm_tests import VLLM_TESTS

ROOT = Path(__file__).parents[3]


@pytest.mark.timeout(900)
def test_the_vllm_engine_passes_its_tests_in_its_own_environment() -> None:
    python = ROOT / ".venv-vllm" / "bin" / "python"
    if not python.exists():
        pytest.skip("there is no .venv-vllm: make vllm-setup")

    smollm2()  # made here: that environment cannot read the package's GGUF
    # What pytest says of its own run is not for the one inside.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    # vLLM leaves a socket's context behind when it cannot start; pytest hears of it after the last test.
    ignored = ["-W", "ignore::ResourceWarning", "-W", "ignore::pytest.PytestUnraisableExceptionWarning"]
    run = subprocess.run(
        [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", *ignored, *(f"tests/{file}" for file in VLLM_TESTS)],
        cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=840,
    )  # fmt: skip

    assert run.returncode == 0, run.stdout[-20_000:]
