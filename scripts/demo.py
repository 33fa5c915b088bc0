"""`make demo`: a bus, a real language model and the gateway on this machine, asked through HTTP, and stopped again.

Everything goes through the real command line, with a home folder of its own, so that a bus that already runs on this
host is left alone. The exit code is 0 only when the model answered and nothing is left running.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parent.parent
MODELBUS = str(Path(sys.executable).with_name("modelbus"))
MODELS = ROOT / ".cache" / "models"
QUESTION = "What is the capital of France?"
TERMINAL = sys.stdout.isatty()


def main() -> int:
    home = Path(tempfile.mkdtemp(prefix="modelbus-demo-"))
    os.environ["MODELBUS_HOME"] = str(home)
    for name in ("MODELBUS_ADDRESS", "MODELBUS_CREDS", "MODELBUS_API_KEY"):
        os.environ.pop(name, None)  # of another bus
    signal.signal(signal.SIGTERM, _interrupt)
    began = time.monotonic()
    code = 1
    try:
        _demonstrate()
        code = 0
    except subprocess.CalledProcessError as failed:
        print(f"\nThis command failed with exit code {failed.returncode}: {' '.join(failed.cmd)}", file=sys.stderr)
        _print_logs(home)
    except KeyboardInterrupt:
        print("\nInterrupted: stopping everything.", file=sys.stderr)
        code = 130
    except Exception as error:
        print(f"\nThe demo failed: {type(error).__name__}: {error}", file=sys.stderr)
        _print_logs(home)
    finally:
        # A second Ctrl-C must not leave processes behind.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        clean = _stop_everything(home)
        shutil.rmtree(home, ignore_errors=True)
    if code == 0:
        print(f"\nDone in {time.monotonic() - began:.0f} s. The model stays converted in {MODELS.relative_to(ROOT)}/.")
    return code if clean or code else 1


def _demonstrate() -> None:
    bus_port, http_port = _free_port(), _free_port()

    with _step("Convert SmolLM2-135M-Instruct (98 MB, from an installed package; once, up to a minute)"):
        model = _convert()
    with _step("Start the bus and a node on this host"):
        _modelbus("start", "--head", "--port", str(bus_port))
    with _step("Deploy the model on the transformers engine, one worker on one CPU"):
        _modelbus(
            "deploy", "--pretrained_model_type", "custom/auto", "--infer_backend", "transformers",
            "--model_path", str(model), "--cpus_per_worker", "1", "--gpus_per_worker", "0", "--num_workers", "1",
            "--model", "chat",
        )  # fmt: skip
    with _step("Start the gateway"):
        gateway = _start_gateway(http_port)
    with _step("Ask it through HTTP, with the openai package"):
        _ask(f"http://127.0.0.1:{http_port}/v1")
    with _step("Look at the workers"):
        _modelbus("stat", "--model", "chat")
    with _step("Stop the gateway"):
        gateway.send_signal(signal.SIGINT)
        if gateway.wait(timeout=20) not in (0, 130):
            raise RuntimeError(f"the gateway ended with exit code {gateway.returncode}")


def _convert() -> Path:
    command = [sys.executable, "-m", "modelbus_workers.smollm2", str(MODELS)]
    with _ticking():
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return Path(done.stdout.strip().splitlines()[-1])


def _start_gateway(port: int) -> subprocess.Popen[bytes]:
    command = [MODELBUS, "serve", "--port", str(port)]
    print(f"    $ modelbus {' '.join(command[1:])}", flush=True)
    gateway = subprocess.Popen(command)
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        if gateway.poll() is not None:
            raise subprocess.CalledProcessError(gateway.returncode, command)
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/health/ready", timeout=2).close()
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            time.sleep(0.1)
        else:
            return gateway
    raise TimeoutError("the gateway was not ready within 30 s")


def _ask(base_url: str) -> None:
    from openai import OpenAI

    print(f"    question: {QUESTION}\n    answer:   ", end="", flush=True)
    began, first, answer = time.monotonic(), 0.0, ""
    with OpenAI(base_url=base_url, api_key="none") as client:
        stream = client.chat.completions.create(
            model="chat",
            messages=[{"role": "user", "content": QUESTION}],
            temperature=0,
            max_tokens=40,
            stream=True,
            stream_options={"include_usage": True},
        )
        tokens = 0
        for chunk in stream:
            tokens = chunk.usage.completion_tokens if chunk.usage else tokens
            text = chunk.choices[0].delta.content if chunk.choices else None
            if text:
                first = first or time.monotonic() - began
                answer += text
                print(text, end="", flush=True)
    print(f"\n    first token after {first:.2f} s, {tokens} tokens in {time.monotonic() - began:.2f} s")
    if "Paris" not in answer:
        raise RuntimeError(f"the answer should name Paris and is {answer!r}")


def _modelbus(*arguments: str) -> None:
    shown = [argument.replace(str(ROOT) + "/", "") for argument in arguments]
    print(f"    $ modelbus {' '.join(shown)}", flush=True)
    subprocess.run([MODELBUS, *arguments], check=True)


def _stop_everything(home: Path) -> bool:
    """Stops what the demo started and says whether all of it had ended by itself."""
    with _step("Stop everything and look whether anything is left"):
        if Path(MODELBUS).exists() and _left(home):
            subprocess.run([MODELBUS, "stop"], check=False)
        # The process that held the server may need a moment to be reaped.
        _, left = psutil.wait_procs(_left(home), timeout=10)
        for process in left:
            print(f"    still there, ended by force: {process.pid} {_command(process)}", file=sys.stderr)
            process.kill()
        psutil.wait_procs(left, timeout=5)
        if not left:
            print("    nothing is left running")
    return not left


def _left(home: Path) -> list[psutil.Process]:
    """The processes that were started with the demo's home folder, wherever they detached themselves to."""
    return [
        process for process in psutil.process_iter() if process.pid != os.getpid() and _home_of(process) == str(home)
    ]


def _home_of(process: psutil.Process) -> str:
    try:
        if process.status() == psutil.STATUS_ZOMBIE:
            return ""
        return str(process.environ().get("MODELBUS_HOME", ""))
    except (psutil.Error, OSError):
        return ""


def _command(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline()[:4])
    except psutil.Error:
        return "?"


def _print_logs(home: Path) -> None:
    for log in sorted(home.rglob("*.log")):
        lines = log.read_text(errors="replace").splitlines()[-15:]
        if lines:
            print(f"--- the end of {log.relative_to(home)}", *lines, sep="\n", file=sys.stderr)


@contextmanager
def _step(title: str) -> Iterator[None]:
    _step_number[0] += 1
    print(_bold(f"\n{_step_number[0]}. {title}"), flush=True)
    began = time.monotonic()
    yield
    print(_dim(f"    ({time.monotonic() - began:.1f} s)"), flush=True)


_step_number = [0]


@contextmanager
def _ticking() -> Iterator[None]:
    """Shows the seconds that pass: each on a terminal, every tenth elsewhere."""
    ended = threading.Event()

    def tick() -> None:
        began = time.monotonic()
        while not ended.wait(1 if TERMINAL else 10):
            print(f"\r    ... {time.monotonic() - began:.0f} s", end="" if TERMINAL else "\n", flush=True)

    ticker = threading.Thread(target=tick, daemon=True)
    ticker.start()
    try:
        yield
    finally:
        ended.set()
        ticker.join()
        if TERMINAL:
            print("\r", end="", flush=True)


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def _bold(text: str) -> str:
    return f"\033[1m{text}\033[0m" if TERMINAL else text


def _dim(text: str) -> str:
    return f"\033[2m{text}\033[0m" if TERMINAL else text


if __name__ == "__main__":
    sys.exit(main())
