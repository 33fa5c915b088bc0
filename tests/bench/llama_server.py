"""llama-cpp-python's own server, told not to reorder weights: that ends the process on CPUs with AMX, and it has no option.

.venv-llama-server/bin/python tests/bench/llama_server.py --model FILE ...
"""

from __future__ import annotations

from typing import Any

from llama_cpp import llama_cpp
from llama_cpp.server.__main__ import main

default = llama_cpp.llama_model_default_params


def plain() -> Any:
    params = default()
    params.use_extra_bufts = False
    return params


if __name__ == "__main__":
    llama_cpp.llama_model_default_params = plain
    main()
