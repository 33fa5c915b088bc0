#!/usr/bin/env bash
# Writes the constraints files from the environments that passed the tests: exact versions, no index, no host, no path.
# After raising a version by hand (uv pip install --python .venv/bin/python NAME==VERSION): make test, then make lock.
set -euo pipefail
cd "$(dirname "$0")/.."
export LC_ALL=C

freeze() { # environment -> file
  local python=".venv$1/bin/python" file="constraints/$2.txt" pins
  [[ -x $python ]] || { echo "constraints/$2.txt is left as it is: .venv$1 is not here"; return 0; }
  # A local tag such as +cpu names a build, not a version: without it the same pin takes the build that a machine has.
  pins=$(.venv/bin/uv pip freeze --python "$python" --quiet | sed -n -E 's/^([A-Za-z0-9._-]+==[^+@ ]+)(\+.*)?$/\1/p' |
    grep -v -E '^(modelbus|pip)==' | sort -f)
  { echo "# $3"; echo "# Written by scripts/lock.sh."; echo "$pins"; } > "$file"
  echo "$file: $(grep -c == "$file") versions"
}

freeze "" core "What make setup installs: the package with its transformers, gpu and dev extras."
freeze -openai2 openai2 "The older OpenAI client that the gateway is tested with."
freeze -litellm litellm "The proxy that the benchmarks are compared with (make bench-setup)."
