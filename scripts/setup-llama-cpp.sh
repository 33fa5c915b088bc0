#!/usr/bin/env bash
# Adds llama-cpp-python to .venv, for the tests of the llama_cpp engine. It is compiled here, for this machine's CPU.
# Usage: scripts/setup-llama-cpp.sh [server]   (after make setup, whose Python and uv it uses)
# server: makes .venv-llama-server instead, with the server of that package, which one row of the benchmarks is compared with.
set -euo pipefail
cd "$(dirname "$0")/.."

started=$SECONDS
if ! command -v c++ >/dev/null; then
  echo "llama.cpp is compiled, and there is no C++ compiler here: on Debian and Ubuntu install the package g++" >&2; exit 1
fi
if index=$(.venv/bin/python -m pip config get global.index-url 2>/dev/null); then export UV_DEFAULT_INDEX=${UV_DEFAULT_INDEX:-$index}; fi
[[ -z ${PIP_INDEX_URL:-} ]] || export UV_DEFAULT_INDEX=${UV_DEFAULT_INDEX:-$PIP_INDEX_URL}

environment=.venv constraints=core packages=(llama-cpp-python llguidance)
if [[ ${1:-} == server ]]; then
  environment=.venv-llama-server constraints=llama-server packages=('llama-cpp-python[server]')
  [[ -x $environment/bin/python ]] || .venv/bin/uv venv --quiet --python .venv/bin/python $environment
fi

printf '\033[1m==> %s\033[0m\n' "Adding llama-cpp-python to $environment: 70 MB to download, then some minutes of compiling, if not in a cache."
# Without the library for images, and without looking for a TLS library. A GPU is for whoever sets CMAKE_ARGS.
export CMAKE_ARGS=${CMAKE_ARGS:-"-DLLAVA_BUILD=OFF -DLLAMA_OPENSSL=OFF -DCMAKE_PROJECT_llama_cpp_INCLUDE=$PWD/scripts/llama-cpp.cmake"}
.venv/bin/uv pip install --python $environment/bin/python --constraint constraints/$constraints.txt "${packages[@]}"

touch $environment/.made-llama-cpp
printf '\033[1m==> %s\033[0m\n' "Done in $((SECONDS - started)) s."
