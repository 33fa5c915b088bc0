"""What is measured, as real processes: a nats-server, workers, gateways, the bare server, and LiteLLM's proxy."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import msgspec
import psutil
from modelbus_broker import names
from modelbus_broker.buckets import Bucket
from modelbus_broker.connection import Bus
from modelbus_broker.messages import Deployment, encode
from modelbus_broker.registry import Registry
from modelbus_broker.server import EmbeddedServer, ServerSettings
from modelbus_broker.settings import BusSettings
from modelbus_broker.storing import PublisherSettings
from modelbus_broker.topology import declare_bus, declare_memory, declare_model
from modelbus_workers.job import WorkerJob

from .bare import Answers
from .load import LoadJob, LoadResult

ROOT = Path(__file__).resolve().parents[2]
VLLM = ROOT / ".venv-vllm" / "bin" / "python"
WORKER = ("-m", "modelbus_workers.worker")
LITELLM = ROOT / ".venv-litellm" / "bin" / "litellm"
ANSWER = "The capital of France is Paris."
QUESTION = "What is the capital of France?"

#: engine, engine parameters, usage events
MODELS: dict[str, tuple[str, dict[str, str], bool]] = {
    "chat": ("echo", {"text": ANSWER}, True),
    "chat-without-usage-events": ("echo", {"text": ANSWER}, False),
    "paced": ("echo", {"text": ANSWER, "tokens": "100", "interval_ms": "20"}, True),
    "flood": ("echo", {"text": ANSWER, "tokens": "200", "chunk": "1"}, True),
    "steady": ("echo", {"text": ANSWER, "tokens": "250", "interval_ms": "20"}, True),
    "endless": ("echo", {"text": ANSWER, "tokens": "100000", "interval_ms": "20"}, True),
    "held": ("echo", {"text": ANSWER, "tokens": "20", "interval_ms": "500"}, True),
}


class Stand:
    """Starts each part when a row first asks for it, and ends all of them."""

    def __init__(self, server: EmbeddedServer, bus: Bus, folder: Path) -> None:
        self.server = server
        self.bus = bus
        self.folder = folder
        self.processes: list[subprocess.Popen[bytes]] = []
        self._workers: dict[str, list[tuple[str, subprocess.Popen[bytes]]]] = {}
        self._gateways: dict[str, tuple[int, subprocess.Popen[bytes]]] = {}
        self._bares: dict[str, int] = {}

    async def model(self, name: str, *, upstream: str = "") -> None:
        """Has a worker of this model ready; with ``upstream`` on the engine ``openai`` in front of that URL."""
        if name in self._workers:
            return
        engine, params, usage_events = MODELS.get(name, ("openai", {}, True))
        if upstream:
            params = {"base_url": upstream, "api_key": "none", "model": "chat", "task": "chat"}
        deployment = Deployment(
            name=name, model=name, engine=engine, revision="1", engine_params=params, slots=2048,
            pretrained_model_type="saas/openai" if upstream else "echo",
        )  # fmt: skip
        await self.deployed(deployment, usage_events=usage_events)

    async def llama_cpp(self, name: str, file: Path, params: dict[str, str]) -> None:
        """Has a worker of this GGUF file ready, with four slots."""
        deployment = Deployment(
            name=name, model=name, engine="llama_cpp", revision="1", engine_params=params, slots=4, model_path=str(file),
            pretrained_model_type="custom/auto",
        )  # fmt: skip
        await self.deployed(deployment)

    async def deployed(self, deployment: Deployment, *, usage_events: bool = True) -> None:
        """Has a worker of this deployment ready."""
        self._workers[deployment.name] = []
        await declare_model(self.bus, deployment.model)
        key = names.deployment_key(deployment.name)
        await Bucket(self.bus, names.BUCKET_DEPLOYMENTS).put(key, encode(deployment))
        await self._worker(deployment, usage_events)

    async def search_service(self, name: str, folder: Path) -> None:
        """Has an embedded search service ready, with its stores in a folder."""
        if name not in self._workers:
            folder.mkdir(parents=True, exist_ok=True)
            await self.deployed(
                Deployment(name=name, model=name, engine="search", revision="1", model_path=str(folder))
            )

    async def another_worker(self, name: str) -> None:
        """One more worker of a model that is there already."""
        engine, params, usage_events = MODELS[name]
        deployment = Deployment(
            name=name, model=name, engine=engine, revision="1", engine_params=params, slots=2048, replicas=2,
            pretrained_model_type="echo",
        )  # fmt: skip
        await self._worker(deployment, usage_events)

    async def vllm_worker(self, deployment: Deployment, command: Sequence[str] = WORKER) -> int:
        """A worker, or one more, that runs where vLLM is installed; returns its process id."""
        if deployment.name not in self._workers:
            self._workers[deployment.name] = []
            await declare_model(self.bus, deployment.model)
            key = names.deployment_key(deployment.name)
            await Bucket(self.bus, names.BUCKET_DEPLOYMENTS).put(key, encode(deployment))
        await self._worker(deployment, usage_events=True, command=[str(VLLM), *command], timeout_s=600.0)
        return self._workers[deployment.name][-1][1].pid

    async def _worker(
        self,
        deployment: Deployment,
        usage_events: bool,
        command: Sequence[str] = (sys.executable, *WORKER),
        timeout_s: float = 120.0,
    ) -> None:
        name = deployment.name
        job = WorkerJob(
            worker_id=names.new_worker_id(), deployment=deployment, bus=BusSettings(url=self.server.url), node="bench",
            params=deployment.engine_params, usage_events=usage_events, log_level="WARNING",
        )  # fmt: skip
        worker = self._start(list(command), f"worker-{name}")
        assert worker.stdin is not None
        worker.stdin.write(msgspec.json.encode(job))
        worker.stdin.close()
        self._workers[name].append((job.worker_id, worker))
        registry = Registry(self.bus)
        await registry.start()
        try:
            ready = lambda: any(record.id == job.worker_id for record in registry.workers_of(name))  # noqa: E731
            await self._until(ready, worker, f"worker-{name}", timeout_s)
            compats = sorted({record.compat for record in registry.workers_of(name) if record.compat})
            await declare_model(self.bus, name, compats=compats)
        finally:
            await registry.close()

    def kill_worker(self, name: str, worker_id: str) -> None:
        """SIGKILL; returns when the process has ended."""
        found = next((id, process) for id, process in self._workers[name] if id == worker_id)
        self._workers[name].remove(found)
        found[1].kill()
        found[1].wait()

    async def keep_frames(self, keep: bool) -> None:
        """Declares the stream that keeps frames for clients that come back, or removes it."""
        if keep:
            await declare_memory(self.bus)
        else:
            await self.bus.js_request(f"STREAM.DELETE.{names.STREAM_OUT}")

    async def gateway(self, publishing: PublisherSettings | None = None) -> int:
        """The port of a gateway: the real command, or one with guarantees switched off."""
        key = repr(publishing)
        if key not in self._gateways:
            port = free_port()
            if publishing is None:
                command = [
                    "-m",
                    "modelbus_gateway",
                    "--port",
                    str(port),
                    "--address",
                    self.server.url,
                    "--log-level",
                    "error",
                ]
            else:
                job = msgspec.json.encode({"url": self.server.url, "port": port, "publishing": publishing}).decode()
                command = ["-m", "tests.bench.weakened", job]
            label = f"gateway-{len(self._gateways)}"
            process = self._start([sys.executable, *command], label)
            self._gateways[key] = port, process
            await self._until_http(f"http://127.0.0.1:{port}/health/ready", process, label)
        return self._gateways[key][0]

    def gateway_rss_mib(self) -> float:
        """The memory of the real gateway now, MiB."""
        return float(psutil.Process(self._gateways[repr(None)][1].pid).memory_info().rss) / 2**20

    def worker_rss_mib(self, name: str) -> float:
        """The memory of a model's first worker now, MiB."""
        return float(psutil.Process(self._workers[name][0][1].pid).memory_info().rss) / 2**20

    def gateway_cpu_s(self) -> float:
        times = psutil.Process(self._gateways[repr(None)][1].pid).cpu_times()
        return float(times.user + times.system)

    async def bare(self, model: str) -> int:
        """The port of a bare server that answers with the bytes that the gateway answers for this model."""
        if model not in self._bares:
            plain, events = await asyncio.to_thread(self._record, await self.gateway(), model)
            params = MODELS[model][1]
            first, token, last = events
            answers = Answers(
                plain=_b64(plain), first_event=_b64(first), event=_b64(token), last_events=_b64(last),
                tokens=int(params.get("tokens", "6")), interval_ms=float(params.get("interval_ms", "0")),
            )  # fmt: skip
            command = [sys.executable, "-m", "tests.bench.bare", msgspec.json.encode(answers).decode()]
            process = self._start(command, f"bare-{model}", stdout=subprocess.PIPE)
            assert process.stdout is not None
            self._bares[model] = int(await asyncio.to_thread(process.stdout.readline))
        return self._bares[model]

    async def litellm(self, upstream: str) -> int:
        """The port of LiteLLM's proxy in front of that URL."""
        port = free_port()
        config = self.folder / "litellm.yaml"
        parameters = {"model": "openai/chat", "api_base": upstream, "api_key": "none"}
        config.write_text(json.dumps({"model_list": [{"model_name": "chat", "litellm_params": parameters}]}))
        environment = {
            **os.environ,
            "LITELLM_LOCAL_MODEL_COST_MAP": "True",  # nothing is fetched at its start
            "LITELLM_LOG": "ERROR",
            # It listens on the loopback for a minute and has no key to give away; checking keys would slow it down.
            "LITELLM_DANGEROUSLY_PERMIT_WEAK_OR_UNSET_MASTER_KEY": "true",
        }
        command = [
            str(LITELLM),
            "--config",
            str(config),
            "--host",
            "127.0.0.1",
            "--port",
            str(port),
            "--telemetry",
            "False",
        ]
        process = self._start(command, "litellm", environment=environment)
        await self._until_http(f"http://127.0.0.1:{port}/health/liveliness", process, "litellm", timeout_s=120)
        return port

    async def llama_server(self, python: Path, file: Path, settings: dict[str, str]) -> int:
        """The port of llama-cpp-python's own server of this file, in the environment of this Python."""
        port = free_port()
        options = [word for name, value in settings.items() for word in (f"--{name}", value)]
        command = [
            str(python), str(ROOT / "tests" / "bench" / "llama_server.py"), "--model", str(file), "--host", "127.0.0.1",
            "--port", str(port), "--interrupt_requests", "false", *options,
        ]  # fmt: skip
        process = self._start(command, "llama-server")
        await self._until_http(f"http://127.0.0.1:{port}/v1/models", process, "llama-server", timeout_s=120)
        return port

    async def load(self, job: LoadJob) -> LoadResult:
        """Runs the load generator in a process of its own.

        Raises:
            RuntimeError: it failed, or a request did.
        """
        text = msgspec.json.encode(job).decode()
        done = await asyncio.to_thread(
            subprocess.run, [sys.executable, "-m", "tests.bench.load", text], capture_output=True, cwd=ROOT
        )
        if done.returncode:
            raise RuntimeError(f"the load generator failed: {done.stderr.decode()[-2000:]}")
        result = msgspec.json.decode(done.stdout, type=LoadResult)
        if result.errors or not result.requests:
            raise RuntimeError(f"{result.errors} of {result.requests + result.errors} requests failed: {result.error}")
        return result

    def body(self, model: str, *, stream: bool = False, content: str = QUESTION) -> str:
        """The path of a file with a request for this model."""
        text = body_of(model, stream=stream, content=content)
        path = self.folder / f"{model}-{stream}-{len(content)}.json"
        path.write_bytes(text)
        return str(path)

    def close(self) -> None:
        for process in self.processes:
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
        for process in self.processes:
            try:
                process.wait(timeout=10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait(timeout=10)

    def _record(self, port: int, model: str) -> tuple[bytes, tuple[bytes, bytes, bytes]]:
        plain = _post(port, body_of(model, stream=False))
        stream = _post(port, body_of(model, stream=True))
        events = [event + b"\n\n" for event in stream.split(b"\n\n") if event]
        tokens = [n for n, event in enumerate(events) if b'"content":"' in event and b'"content":""' not in event]
        first, last = tokens[0], tokens[-1]
        return plain, (b"".join(events[:first]), events[first], b"".join(events[last + 1 :]))

    def _start(
        self, command: list[str], label: str, *, stdout: int | None = None, environment: dict[str, str] | None = None
    ) -> subprocess.Popen[bytes]:
        with (self.folder / f"{label}.log").open("ab") as log:
            process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=stdout or log, stderr=log, cwd=ROOT, env=environment
            )
        self.processes.append(process)
        return process

    async def _until_http(
        self, url: str, process: subprocess.Popen[bytes], label: str, timeout_s: float = 30.0
    ) -> None:
        def answers() -> bool:
            try:
                urllib.request.urlopen(url, timeout=2).close()
            except (urllib.error.URLError, ConnectionError, TimeoutError):
                return False
            return True

        await self._until(answers, process, label, timeout_s)

    async def _until(
        self, condition: object, process: subprocess.Popen[bytes], label: str, timeout_s: float = 30.0
    ) -> None:
        assert callable(condition)
        end = time.monotonic() + timeout_s
        while not await asyncio.to_thread(condition):
            if process.poll() is not None or time.monotonic() > end:
                words = (self.folder / f"{label}.log").read_text(errors="replace")[-2000:]
                raise RuntimeError(f"{label} did not come up: {words}")
            await asyncio.sleep(0.05)


@contextlib.asynccontextmanager
async def stand() -> AsyncIterator[Stand]:
    """A bus of its own with nothing on it yet; ends everything that was started on it."""
    with tempfile.TemporaryDirectory(prefix="modelbus-bench-") as folder:
        async with EmbeddedServer(ServerSettings(store=Path(folder) / "nats")) as server:
            async with await Bus.connect(BusSettings(url=server.url), name="bench") as bus:
                await declare_bus(bus)
                stand = Stand(server, bus, Path(folder))
                try:
                    yield stand
                finally:
                    await asyncio.to_thread(stand.close)


def body_of(model: str, *, stream: bool, content: str = QUESTION) -> bytes:
    return json.dumps({"model": model, "messages": [{"role": "user", "content": content}], "stream": stream}).encode()


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def _post(port: int, body: bytes) -> bytes:
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/v1/chat/completions", data=body, headers={"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=60) as response:
        return bytes(response.read())


def _b64(data: bytes) -> str:
    return base64.b64encode(data).decode()
