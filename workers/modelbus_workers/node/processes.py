"""One worker process: its start, its log, its end and the end of its children."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import msgspec
from modelbus_broker.names import model_token
from modelbus_broker.parent import die_with_parent

from modelbus_workers.job import DRAIN_END_S, WorkerJob

from . import keeper
from .room import Share

log = logging.getLogger(__name__)

#: A log that has grown beyond this is put aside as ``.1`` when its worker starts again.
_LOG_BYTES = 8 << 20
_TAIL_BYTES = 256 << 10
#: What a worker takes of the time in which it ends by itself may be exceeded by so much, on a busy host.
_LATE_S = 3.0
#: The longest that one may finish what it has: background requests may take a day.
_RETIRE_S = 24 * 3600.0


class Keeper:
    """The node's side of ``keeper.py``."""

    def __init__(self) -> None:
        self._groups: set[int] = set()
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", keeper.__file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            start_new_session=True,
        )
        self._send([f"+{group}" for group in self._groups])

    def add(self, group: int) -> None:
        self._groups.add(group)
        self._tell(f"+{group}")

    def drop(self, group: int) -> None:
        self._groups.discard(group)
        self._tell(f"-{group}")

    def close(self) -> None:
        if self._process is not None:
            with contextlib.suppress(OSError):
                self._process.communicate(timeout=5)

    def _tell(self, line: str) -> None:
        try:
            self._send([line])
        except OSError:  # someone killed it: the next one is told about all groups
            log.warning("the keeper of the workers has ended: starting another")
            if self._process is not None:
                with contextlib.suppress(OSError):
                    self._process.communicate()
            self.start()

    def _send(self, lines: list[str]) -> None:
        if self._process is not None and self._process.stdin is not None:
            self._process.stdin.write("".join(f"{line}\n" for line in lines).encode())
            self._process.stdin.flush()


class WorkerProcess:
    """A worker process that was started. ``code`` is set when it has ended.

    It leads a session and a process group of its own, so that a Ctrl-C meant for the node does not reach it and so
    that its children can be ended with it.
    """

    def __init__(
        self, job: WorkerJob, share: Share, process: asyncio.subprocess.Process, log_file: Path, log_from: int
    ) -> None:
        self.id = job.worker_id
        self.deployment = job.deployment
        self.share = share
        self.pid = process.pid
        self.code: int | None = None
        #: Its record has said "ok" at some time.
        self.ok = False
        self.ended = asyncio.Event()
        self._started = time.monotonic()
        self._ended_at = 0.0
        #: Monotonic; when it was first asked to stop, 0 before.
        self.stopping_at = 0.0
        #: SIGTERM was sent: it ends in bounded time.
        self.pressed = False
        self._process = process
        self._log_file = log_file
        self._log_from = log_from
        self._watching: asyncio.Task[None] | None = None

    @classmethod
    async def start(
        cls, job: WorkerJob, share: Share, logs: Path, keeper: Keeper, on_end: Callable[[], None]
    ) -> WorkerProcess:
        """Starts the process and gives it its job.

        Raises:
            OSError: the process or its log file cannot be made.
        """
        log_file = log_path(logs, job.deployment.name, job.replica)
        log_file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        _rotate(log_file)
        descriptor = os.open(log_file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        try:
            _note(descriptor, f"worker {job.worker_id}, revision {job.deployment.revision}, starts on node {job.node}")
            log_from = os.fstat(descriptor).st_size
            process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                "modelbus_workers.worker",
                stdin=asyncio.subprocess.PIPE,
                stdout=descriptor,
                stderr=descriptor,
                env=_environment(share),
                start_new_session=True,
                preexec_fn=die_with_parent(signal.SIGKILL),
            )
        finally:
            os.close(descriptor)
        keeper.add(process.pid)
        started = cls(job, share, process, log_file, log_from)
        started._watching = asyncio.create_task(started._watch(keeper, on_end), name=f"watch-{started.id}")
        assert process.stdin is not None
        process.stdin.write(msgspec.json.encode(job))
        process.stdin.close()
        return started

    @property
    def alive_s(self) -> float:
        """How long it has run, or ran."""
        return (self._ended_at or time.monotonic()) - self._started

    @property
    def drain_limit_s(self) -> float:
        """Within so many seconds after SIGTERM it ends by itself, unless it stands still."""
        return self.deployment.drain_s + DRAIN_END_S + _LATE_S

    async def stop(self, grace_s: float, hurry: asyncio.Event) -> None:
        """SIGTERM, then SIGKILL to all of the group after ``grace_s`` or as soon as ``hurry`` is set."""
        self.pressed = True
        await self._end(signal.SIGTERM, grace_s, hurry)

    async def retire(self, hurry: asyncio.Event) -> None:
        """Lets it finish what it has, at most to the deadlines; SIGKILL as soon as ``hurry`` is set."""
        # One that never was ok holds nothing, and may not listen to this signal yet.
        await self._end(signal.SIGUSR1 if self.ok else signal.SIGTERM, _RETIRE_S, hurry)

    async def _end(self, number: signal.Signals, grace_s: float, hurry: asyncio.Event) -> None:
        if self.code is None:
            self.stopping_at = self.stopping_at or time.monotonic()
            with contextlib.suppress(ProcessLookupError):
                self._process.send_signal(number)
            waits = {asyncio.ensure_future(self.ended.wait()), asyncio.ensure_future(hurry.wait())}
            try:
                await asyncio.wait(waits, timeout=grace_s, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for wait in waits:
                    wait.cancel()
                if self.code is None:
                    log.warning("worker %s (pid %d) did not stop: killing it", self.id, self.pid)
                    _kill_group(self.pid)
            await self.ended.wait()

    def last_words(self, lines: int = 5) -> str:
        """The last lines it wrote."""
        found = tail(self._log_file, lines + 1, self._log_from)
        return "\n".join([line for line in found if line.strip() and " node: worker " not in line][-lines:])

    async def _watch(self, keeper: Keeper, on_end: Callable[[], None]) -> None:
        code = await self._process.wait()
        _kill_group(self.pid)  # what it may have left
        keeper.drop(self.pid)
        with contextlib.suppress(OSError):
            descriptor = os.open(self._log_file, os.O_WRONLY | os.O_APPEND)
            _note(descriptor, f"worker {self.id}: {describe_end(code)}")
            os.close(descriptor)
        self._ended_at = time.monotonic()
        self.code = code
        self.ended.set()
        on_end()


def log_path(logs: Path, deployment: str, replica: int) -> Path:
    return logs / f"{model_token(deployment)}.{replica}.log"


def tail(path: Path, lines: int, start: int = 0) -> list[str]:
    """The last lines of a file, of at most 256 KiB, not before the byte ``start``; none if there is no file."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(start, size - _TAIL_BYTES, 0))
            return file.read(_TAIL_BYTES).decode(errors="replace").splitlines()[-lines:]
    except FileNotFoundError:
        return []


def describe_end(code: int) -> str:
    """How a process ended, in words."""
    if code >= 0:
        return f"it ended with status {code}"
    try:
        return f"it was ended by {signal.Signals(-code).name}"
    except ValueError:
        return f"it was ended by signal {-code}"


def _environment(share: Share) -> dict[str, str]:
    """A worker sees its own GPUs only, so also none when it asked for none."""
    return {
        **os.environ,
        "CUDA_DEVICE_ORDER": "PCI_BUS_ID",  # the order in which NVML counts
        "CUDA_VISIBLE_DEVICES": ",".join(map(str, share.gpus)),
        "PYTHONUNBUFFERED": "1",
    }


def _note(descriptor: int, text: str) -> None:
    """What the node itself has to say in a worker's log."""
    now = time.strftime("%Y-%m-%d %H:%M:%S")
    os.write(descriptor, f"{now} node: {text}\n".encode())


def _rotate(path: Path) -> None:
    with contextlib.suppress(FileNotFoundError):
        if path.stat().st_size > _LOG_BYTES:
            path.replace(path.with_name(path.name + ".1"))


def _kill_group(group: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(group, signal.SIGKILL)
