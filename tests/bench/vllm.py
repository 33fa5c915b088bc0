"""The vllm engine beside vLLM's own server, both on one engine core, and what a kill does to an answer."""

from __future__ import annotations

import asyncio
import json
import os
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import aiohttp
import msgspec
import psutil
from modelbus_broker.messages import Deployment

from tests.helpers.smollm2 import smollm2

from .failing import watching
from .load import LoadJob, LoadResult
from .plan import Line, Plan
from .stand import VLLM, Stand, free_port

TOKENS = 24  #: of each answer
CLIENTS = (1, 8, 64)
SETTINGS = {
    "dtype": "float32", "enforce_eager": "true", "kv_cache_memory_bytes": str(768 << 20), "max_model_len": "512",
    "max_num_seqs": "64",
}  # fmt: skip
_SETTINGS = ", ".join(f"{name} {value}" for name, value in SETTINGS.items())
NOT_HERE = "not installed: make vllm-setup"


def _deployment(name: str) -> Deployment:
    return Deployment(
        name=name, model=name, engine="vllm", revision="1", replicas=2, model_path=str(smollm2()), engine_params=SETTINGS
    )  # fmt: skip


def _body(name: str, tokens: int) -> dict[str, object]:
    return {
        "model": name, "messages": [{"role": "user", "content": "Tell me a story of the sea."}], "stream": True,
        "max_tokens": tokens, "temperature": 0, "ignore_eos": True,
    }  # fmt: skip


async def vllm(stand: Stand, plan: Plan) -> list[Line]:
    """Streams of 24 tokens through the bus and from vLLM's own server, on one engine core, from 1, 8 and 64 clients."""
    if not VLLM.exists():
        return [Line(what="vLLM's server", modelbus="", other=NOT_HERE, result="")]
    port = free_port()
    worker = await stand.vllm_worker(_deployment("fast"), ["-m", "tests.bench.vllm_server", str(port)])
    body = stand.folder / "vllm.json"
    body.write_text(json.dumps(_body("fast", TOKENS)))
    mine = LoadJob(port=await stand.gateway(), body=str(body), stream=True, warmup_s=0.0)
    theirs = msgspec.structs.replace(mine, port=port)
    lines: list[Line] = []
    for clients in CLIENTS:
        rounds = []
        for number in range(plan.rounds + 1):
            results = {}
            sides = [("mine", mine), ("theirs", theirs)]
            # Each comes first as often: what else the machine does changes from one to the next.
            for side, job in sides if number % 2 else reversed(sides):
                job = msgspec.structs.replace(job, connections=clients, requests=max(4, 2 * clients))
                if side == "mine":
                    results[side] = await stand.load(job)
                else:
                    with _ordinary_schedule(worker):
                        results[side] = await stand.load(job)
            if number:  # the first round fills caches
                rounds.append(results)
        lines += _lines(clients, rounds)
    return lines


@contextmanager
def _ordinary_schedule(process: int) -> Iterator[None]:
    """Takes from the front end that both sides have what a worker asked of the kernel and vLLM's server does not."""
    threads = {thread.id: os.sched_getscheduler(thread.id) for thread in psutil.Process(process).threads()}
    for thread in threads:
        os.sched_setscheduler(thread, os.SCHED_OTHER, os.sched_param(0))
    try:
        yield
    finally:
        for thread, policy in threads.items():
            with suppress(ProcessLookupError):  # it has ended
                os.sched_setscheduler(thread, policy, os.sched_param(0))


def _lines(clients: int, rounds: list[dict[str, LoadResult]]) -> list[Line]:
    def middle(side: str, value: str) -> float:
        return statistics.median(float(getattr(results[side], value)) for results in rounds)

    def per_token(result: LoadResult) -> float:
        return (result.p50_ms - result.first_p50_ms) / (TOKENS - 1)

    ratios = [r["mine"].requests_per_s / r["theirs"].requests_per_s for r in rounds]
    ratio = statistics.median(ratios)
    first = statistics.median(r["mine"].first_p50_ms - r["theirs"].first_p50_ms for r in rounds)
    added = statistics.median(per_token(r["mine"]) - per_token(r["theirs"]) for r in rounds)
    most = clients == max(CLIENTS)
    return [
        Line(
            what=f"vllm, one engine core ({_SETTINGS}), {clients} clients: tokens",
            modelbus=f"{middle('mine', 'requests_per_s') * TOKENS:.0f} tokens/s",
            other=f"{middle('theirs', 'requests_per_s') * TOKENS:.0f} tokens/s (vLLM's server)",
            result=f"{ratio:.3f} ({min(ratios):.2f} to {max(ratios):.2f})",
            goal="0.98 or more" if most else "",
            met=ratio >= 0.98 if most else None,
        ),
        Line(
            what="... first token, p50",
            modelbus=f"{middle('mine', 'first_p50_ms'):.1f} ms",
            other=f"{middle('theirs', 'first_p50_ms'):.1f} ms",
            result=f"{first:+.1f} ms",
            goal="5 ms or less" if clients == 1 else "",
            met=first <= 5 if clients == 1 else None,
        ),
        Line(what="... each token after it", modelbus="", other="", result=f"{added:+.2f} ms", goal="0"),
    ]


async def vllm_kill(stand: Stand, plan: Plan) -> list[Line]:
    """A vllm worker is killed in mid-answer, another one goes on: the same text, in float32 and one request at a time."""
    if not VLLM.exists():
        return [Line(what="vllm, worker killed", modelbus="", other=NOT_HERE, result="")]
    for _ in range(2):
        await stand.vllm_worker(_deployment("safe"))
    url = f"http://127.0.0.1:{await stand.gateway()}/v1/chat/completions"
    gaps, same = [], 0
    async with watching(stand) as watch, aiohttp.ClientSession() as session:
        undisturbed = _Answer()
        await undisturbed.read(session, url)
        for number in range(plan.rounds):
            answer = _Answer()
            reading = asyncio.create_task(answer.read(session, url))
            while len(answer.times) < 10 + 7 * number and not reading.done():
                await asyncio.sleep(0.005)
            await asyncio.to_thread(stand.kill_worker, "safe", watch.worker_of[answer.id])
            killed = time.perf_counter()
            await reading
            before, after = ([at for at in answer.times if (at > killed) == later] for later in (False, True))
            gaps.append(after[0] - before[-1])
            same += answer.text == undisturbed.text
            if number + 1 < plan.rounds:
                await stand.vllm_worker(_deployment("safe"))
    return [
        Line(
            what=f"vllm, worker killed in mid-answer, {plan.rounds} times: the same text",
            modelbus=f"{same} of {plan.rounds}; gap p50 {statistics.median(gaps):.2f} s, longest {max(gaps):.2f} s",
            other="",
            result="all" if same == plan.rounds else "not all",
            goal="all",
            met=same == plan.rounds,
        )
    ]


class _Answer:
    """One stream: its text and when its tokens came."""

    def __init__(self) -> None:
        self.id = ""
        self.text = ""
        self.times: list[float] = []

    async def read(self, session: aiohttp.ClientSession, url: str) -> None:
        async with session.post(url, json=_body("safe", 120)) as response:
            self.id = response.headers["x-request-id"]
            async for line in response.content:
                if line.startswith(b"data: {"):
                    document = json.loads(line[6:])
                    if "error" in document:
                        raise RuntimeError(f"the stream {self.id} failed: {document['error']}")
                    text = "".join(choice["delta"].get("content") or "" for choice in document["choices"])
                    if text:
                        self.text += text
                        self.times.append(time.perf_counter())
