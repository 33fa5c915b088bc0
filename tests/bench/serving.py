"""The transformers engine behind the bus, beside ``transformers serve`` on the same weights, type and thread."""

from __future__ import annotations

import asyncio
import json
import statistics
import time
from collections.abc import AsyncIterator
from contextlib import ExitStack
from pathlib import Path

import aiohttp
import msgspec
from modelbus_broker.messages import Deployment

from ..helpers.smollm2 import smollm2
from ..helpers.transformers_serve import transformers_serve
from .plan import Line, Plan
from .stand import Stand

TOKENS = 32
SUBJECTS = ("the sea", "a lighthouse", "two brothers", "an old clock")


class _Side(msgspec.Struct, frozen=True):
    base_url: str
    model: str


class _Result(msgspec.Struct, frozen=True):
    tokens_per_s: float
    first_ms: float  #: median time to the first text


async def transformers_engine(stand: Stand, plan: Plan) -> list[Line]:
    """SmolLM2 through the bus beside `transformers serve`: throughput and time to first token, 1 and 4 clients."""
    folder = smollm2()
    gateway = f"http://127.0.0.1:{await stand.gateway()}/v1"
    params = {"dtype": "float32", "device": "cpu", "num_threads": "1"}
    await stand.deployed(_deployment("in-turn", folder, params))
    await stand.deployed(_deployment("sharing", folder, params | {"continuous_batching": "true"}))
    with ExitStack() as stack:
        served = await asyncio.to_thread(stack.enter_context, transformers_serve(folder, stand.folder))
        sides = {
            "in-turn": _Side(gateway, "in-turn"),
            "sharing": _Side(gateway, "sharing"),
            "serve": _Side(served.base_url, served.model),
        }
        for side in sides.values():
            await _load(side, 1, 1.0)
        lines = []
        for clients, names in ((1, ("in-turn",)), (4, ("in-turn", "sharing"))):
            rounds: list[dict[str, _Result]] = []
            for _ in range(plan.rounds):
                rounds.append({name: await _load(sides[name], clients, plan.seconds) for name in (*names, "serve")})
            lines += [_line(clients, name, rounds) for name in names]
    return lines


def _deployment(name: str, folder: Path, params: dict[str, str]) -> Deployment:
    return Deployment(
        name=name, model=name, engine="transformers", revision="1", model_path=str(folder), engine_params=params,
        slots=4, pretrained_model_type="custom/auto",
    )  # fmt: skip


def _line(clients: int, name: str, rounds: list[dict[str, _Result]]) -> Line:
    def median(of: str, field: str) -> float:
        return float(statistics.median(getattr(results[of], field) for results in rounds))

    ratio = statistics.median(results[name].tokens_per_s / results["serve"].tokens_per_s for results in rounds)
    how = ", sharing passes" if name == "sharing" else ""
    texts = [
        f"{median(of, 'tokens_per_s'):.1f} tokens/s, first after {median(of, 'first_ms'):,.0f} ms"
        for of in (name, "serve")
    ]
    return Line(
        what=f"transformers engine, SmolLM2-135M in float32 on one thread, {clients} client{'s' if clients > 1 else ''}{how}",
        modelbus=texts[0],
        other=f"{texts[1]} (transformers serve)",
        result=f"{ratio:.2f}",
        goal="0.98 or more",
        met=ratio >= 0.98,
    )


async def _load(side: _Side, clients: int, seconds: float) -> _Result:
    """Each client asks again and again; what is running when the time is up is waited for and counts."""
    began = time.perf_counter()
    first: list[float] = []
    tokens = 0

    async def client(http: aiohttp.ClientSession, number: int) -> None:
        nonlocal tokens
        turn = 0
        while time.perf_counter() - began < seconds or not turn:
            asked_at = time.perf_counter()
            waited = False
            async for text in _texts(http, side, f"Tell me a long story about {SUBJECTS[(number + turn) % 4]}."):
                if text and not waited:
                    first.append((time.perf_counter() - asked_at) * 1000)
                    waited = True
            tokens += TOKENS
            turn += 1

    timeout = aiohttp.ClientTimeout(total=600)
    async with aiohttp.ClientSession(timeout=timeout) as http:
        await asyncio.gather(*(client(http, number) for number in range(clients)))
    return _Result(tokens / (time.perf_counter() - began), statistics.median(first))


async def _texts(http: aiohttp.ClientSession, side: _Side, question: str) -> AsyncIterator[str]:
    """The pieces of a streamed answer of ``TOKENS`` tokens; one that ends by itself earlier is an error here."""
    body = {
        "model": side.model, "messages": [{"role": "user", "content": question}], "max_tokens": TOKENS, "temperature": 0,
        "stream": True,
    }  # fmt: skip
    reason = None
    async with http.post(f"{side.base_url}/chat/completions", json=body) as response:
        response.raise_for_status()
        async for line in response.content:
            if line.startswith(b"data: {"):
                for choice in json.loads(line[6:])["choices"]:
                    reason = choice.get("finish_reason") or reason
                    yield choice["delta"].get("content") or ""
    if reason != "length":
        raise RuntimeError(f"{side.base_url}: the answer ended with {reason!r} and not after {TOKENS} tokens")
