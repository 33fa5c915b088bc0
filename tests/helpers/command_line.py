"""The ``modelbus`` command as a user runs it: a process, its two outputs and its exit code."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
import psutil

#: Where the script of the installed package lies.
SCRIPTS = Path(sys.executable).parent


def environment(**more: str) -> dict[str, str]:
    """The test's own environment, with the script on the PATH and a wide terminal."""
    path = f"{SCRIPTS}{os.pathsep}{os.environ.get('PATH', '')}"
    return {**os.environ, "PATH": path, "COLUMNS": "200", "NO_COLOR": "1", **more}


class Ran(msgspec.Struct, frozen=True):
    """What a command did."""

    code: int
    out: str
    err: str

    def json(self) -> Any:
        return msgspec.json.decode(self.out)


def modelbus(*arguments: str, timeout_s: float = 100.0, env: Mapping[str, str] | None = None) -> Ran:
    """Runs ``modelbus ARGUMENTS`` to its end."""
    done = subprocess.run(
        [str(SCRIPTS / "modelbus"), *arguments],
        capture_output=True, text=True, timeout=timeout_s, env=environment(**(env or {})), stdin=subprocess.DEVNULL,
    )  # fmt: skip
    return Ran(done.returncode, done.stdout, done.stderr)


def modelbus_ok(*arguments: str, env: Mapping[str, str] | None = None) -> Ran:
    """The same, and it must succeed."""
    ran = modelbus(*arguments, env=env)
    assert ran.code == 0, f"modelbus {' '.join(arguments)}\n{ran.out}\n{ran.err}"
    return ran


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        assert isinstance(port, int)
        return port


def processes_of(home: Path) -> list[psutil.Process]:
    """Every live process that was started under this home folder."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get("MODELBUS_HOME") == str(home) and process.pid != os.getpid():
                found.append(process)
        except psutil.Error:
            continue
    return found
