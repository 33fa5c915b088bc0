"""`make bench`: measures modelbus beside a bare aiohttp server that answers with the same bytes.

    python -m tests.bench.run [ROW ...] [--seconds S] [--rounds N] [--requests N]

Everything runs on this machine at once, the load generator included. Runs of both sides alternate; a ratio is the
median of the rounds' own ratios, so that a slow moment of the machine touches both sides of it.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable

import msgspec
from modelbus_broker.storing import PublisherSettings

from .batching import batches
from .failing import cancel, failover
from .knowing import knowledge
from .llama import llama_cpp
from .load import LoadJob, LoadResult
from .plan import Line, Plan
from .prompting import prompts
from .quality import search_quality
from .searching import search
from .serving import transformers_engine
from .soak import soak
from .stand import LITELLM, ROOT, Stand, stand
from .starting import storage_start
from .structure import structure
from .vllm import vllm, vllm_kill

LONG_PROMPT = "word " * 99_999 + "word"


async def chat(stand: Stand, plan: Plan) -> list[Line]:
    """Plain chat on 64 connections, with all guarantees and with each one off."""
    off = PublisherSettings(dedupe=False, expiry=False)
    sides = {
        "bare": LoadJob(port=0, body=""),
        "all": await _side(stand, "chat"),
        "without deduplication": await _side(stand, "chat", PublisherSettings(dedupe=False)),
        "without deadlines": await _side(stand, "chat", PublisherSettings(expiry=False)),
        "without usage events": await _side(stand, "chat-without-usage-events"),
        "without any of the three": await _side(stand, "chat-without-usage-events", off),
    }
    sides["bare"] = msgspec.structs.replace(sides["all"], port=await stand.bare("chat"))
    rounds = await _alternate(stand, plan, sides, connections=64)
    bare = statistics.median(results["bare"].requests_per_s for results in rounds)
    lines = []
    for name in list(sides)[1:]:
        ratio = statistics.median(results[name].requests_per_s / results["bare"].requests_per_s for results in rounds)
        rate = statistics.median(results[name].requests_per_s for results in rounds)
        p50 = statistics.median(results[name].p50_ms for results in rounds)
        full = name == "all"
        lines.append(
            Line(
                what="plain chat, 64 connections, every guarantee" if full else f"... {name}",
                modelbus=f"{rate:,.0f} requests/s, p50 {p50:.1f} ms",
                other=f"{bare:,.0f} requests/s",
                result=f"{ratio:.2f}",
                goal="0.45 or more (aim 0.6)" if full else "",
                met=ratio >= 0.45 if full else None,
            )
        )
    return lines


async def latency(stand: Stand, plan: Plan) -> list[Line]:
    """One connection: how much longer an answer takes."""
    mine = await _side(stand, "chat")
    sides = {"all": mine, "bare": msgspec.structs.replace(mine, port=await stand.bare("chat"))}
    rounds = await _alternate(stand, plan, sides, connections=1)
    return [_added("plain chat, one connection: added p50", rounds, 0.7)]


async def prompt(stand: Stand, plan: Plan) -> list[Line]:
    """A prompt of 100,000 tokens: how much longer an answer takes."""
    await stand.model("chat")
    port = await stand.gateway()
    body = stand.body("chat", content=LONG_PROMPT)
    sides = {
        "all": LoadJob(port=port, body=body),
        "bare": LoadJob(port=await stand.bare("chat"), body=body),
    }
    rounds = await _alternate(stand, plan, sides, connections=1)
    return [_added("prompt of 100,000 tokens: added p50", rounds, 5.0)]


async def streams(stand: Stand, plan: Plan) -> list[Line]:
    """512 streams with one token per 20 ms each, new ones all the time."""
    mine = await _side(stand, "paced", stream=True)
    sides = {"all": mine, "bare": msgspec.structs.replace(mine, port=await stand.bare("paced"))}
    rounds = await _alternate(stand, plan, sides, connections=512, warmup_s=3.0)
    frames = _ratio(rounds, lambda result: result.frames_per_s)
    first = _ratio(rounds, lambda result: result.first_p99_ms)
    middle = {name: _median(rounds, name, lambda result: result.frames_per_s) for name in sides}
    late = {name: _median(rounds, name, lambda result: result.first_p99_ms) for name in sides}
    soon = {name: _median(rounds, name, lambda result: result.first_p50_ms) for name in sides}
    return [
        Line(
            what="512 streams, one token per 20 ms: frames",
            modelbus=f"{middle['all']:,.0f}/s",
            other=f"{middle['bare']:,.0f}/s",
            result=f"{frames:.2f}",
            goal="0.95 or more",
            met=frames >= 0.95,
        ),
        Line(
            what="... first token, p99",
            modelbus=f"{late['all']:.1f} ms (p50 {soon['all']:.1f})",
            other=f"{late['bare']:.1f} ms (p50 {soon['bare']:.1f})",
            result=f"{first:.1f} times",
            goal="3 or less",
            met=first <= 3.0,
        ),
    ]


async def held(stand: Stand, plan: Plan) -> list[Line]:
    """1,000 streams at once, each to its end."""
    job = msgspec.structs.replace(
        await _side(stand, "held", stream=True), connections=1000, warmup_s=2.0, once=True, seconds=60.0
    )
    result = await stand.load(job)
    whole = result.requests == 1000 and result.frames >= 20_000
    return [
        Line(
            what="1,000 streams held at once, 10 s each",
            modelbus=f"{result.requests} complete, {result.frames:,} frames",
            other="",
            result="all" if whole else "not all",
            goal="all complete",
            met=whole,
        )
    ]


async def memory(stand: Stand, plan: Plan) -> list[Line]:
    """The gateway's memory after what ran before it in this run."""
    await _side(stand, "chat")
    rss = stand.gateway_rss_mib()
    return [
        Line(
            what="memory of the gateway after these runs",
            modelbus=f"{rss:.0f} MiB",
            other="",
            result="",
            goal="100 MB or less",
            met=rss * 2**20 <= 100e6,
        )
    ]


async def imports(stand: Stand, plan: Plan) -> list[Line]:
    """How long `import modelbus` takes in a new process."""
    text = "import time; began = time.perf_counter(); import modelbus; print(time.perf_counter() - began)"
    times = []
    for _ in range(plan.rounds):
        done = await asyncio.to_thread(subprocess.run, [sys.executable, "-c", text], capture_output=True, check=True)
        times.append(float(done.stdout))
    middle = statistics.median(times)
    return [
        Line(
            what="import modelbus",
            modelbus=f"{middle * 1000:.0f} ms",
            other="",
            result="",
            goal="350 ms or less",
            met=middle <= 0.35,
        )
    ]


async def litellm(stand: Stand, plan: Plan) -> list[Line]:
    """LiteLLM's proxy and modelbus (engine `openai`) in front of the same mock upstream."""
    if not LITELLM.exists():
        return [Line(what="LiteLLM's proxy", modelbus="", other="not installed: make bench-setup", result="")]
    await stand.model("chat")
    upstream = f"http://127.0.0.1:{await stand.bare('chat')}/v1"
    await stand.model("proxied", upstream=upstream)
    port = await stand.gateway()
    sides = {
        "echo": LoadJob(port=port, body=stand.body("chat")),
        "all": LoadJob(port=port, body=stand.body("proxied")),
        "bare": LoadJob(port=await stand.litellm(upstream), body=stand.body("chat")),
    }
    lines = []
    rounds = await _alternate(stand, plan, sides, connections=64, warmup_s=2.0)
    rate = _median(rounds, "bare", lambda result: result.requests_per_s)
    for side, what in (("all", "the same mock upstream behind LiteLLM's proxy"), ("echo", "... and modelbus on echo")):
        ratio = statistics.median(results[side].requests_per_s / results["bare"].requests_per_s for results in rounds)
        lines.append(
            Line(
                what=what,
                modelbus=f"{_median(rounds, side, lambda result: result.requests_per_s):,.0f} requests/s",
                other=f"{rate:,.0f} requests/s (LiteLLM)",
                result=f"{ratio:.0f} times",
                goal="100 times expected" if side == "all" else "",
                met=None,
            )
        )
    return lines


async def guarantees(stand: Stand, plan: Plan) -> list[Line]:
    """Streams as fast as they come, with their frames kept for clients that come back (`MB_OUT`) and without."""
    job = await _side(stand, "flood", stream=True)
    rounds = []
    for _ in range(plan.rounds):
        results = {}
        for name in ("kept", "not kept"):
            await stand.keep_frames(name == "kept")
            part = msgspec.structs.replace(plan, rounds=1)
            results[name] = (await _alternate(stand, part, {name: job}, connections=64))[0][name]
        rounds.append(results)
    await stand.keep_frames(True)
    ratio = statistics.median(results["kept"].frames_per_s / results["not kept"].frames_per_s for results in rounds)
    kept, not_kept = (_median(rounds, side, lambda result: result.frames_per_s) for side in ("kept", "not kept"))
    return [
        Line(
            what="64 streams, as fast as they come: frames kept (MB_OUT)",
            modelbus=f"{kept:,.0f} frames/s",
            other=f"{not_kept:,.0f} frames/s (not kept)",
            result=f"{ratio:.2f}",
        )
    ]


Row = Callable[[Stand, Plan], Awaitable[list[Line]]]
ROWS: dict[str, Row] = {
    "chat": chat,
    "latency": latency,
    "prompt": prompt,
    "streams": streams,
    "held": held,
    "memory": memory,
    "imports": imports,
    "litellm": litellm,
    "guarantees": guarantees,
    "llama_cpp": llama_cpp,
    "failover": failover,
    "cancel": cancel,
    "prompts": prompts,
    "batches": batches,
    "search": search,
    "storage-start": storage_start,
    "knowledge": knowledge,
    "search-quality": search_quality,
    "transformers_engine": transformers_engine,
    "soak": soak,
    "structure": structure,
    "vllm": vllm,
    "vllm-kill": vllm_kill,
}


async def _side(
    stand: Stand, model: str, publishing: PublisherSettings | None = None, *, stream: bool = False
) -> LoadJob:
    await stand.model(model)
    return LoadJob(port=await stand.gateway(publishing), body=stand.body(model, stream=stream), stream=stream)


async def _alternate(
    stand: Stand, plan: Plan, sides: dict[str, LoadJob], *, connections: int, warmup_s: float = 0.5
) -> list[dict[str, LoadResult]]:
    """All sides one after another, as often as the plan has rounds."""
    rounds = []
    for number in range(plan.rounds):
        results = {}
        for name, job in sides.items():
            _progress(f"    round {number + 1} of {plan.rounds}: {name}")
            job = msgspec.structs.replace(job, connections=connections, seconds=plan.seconds, warmup_s=warmup_s)
            results[name] = await stand.load(job)
        rounds.append(results)
    _progress("")
    return rounds


def _median(rounds: list[dict[str, LoadResult]], side: str, of: Callable[[LoadResult], float]) -> float:
    return statistics.median(of(results[side]) for results in rounds)


def _ratio(rounds: list[dict[str, LoadResult]], of: Callable[[LoadResult], float]) -> float:
    return statistics.median(of(results["all"]) / (of(results["bare"]) or 1e-9) for results in rounds)


def _added(what: str, rounds: list[dict[str, LoadResult]], goal_ms: float) -> Line:
    added = statistics.median(results["all"].p50_ms - results["bare"].p50_ms for results in rounds)
    return Line(
        what=what,
        modelbus=f"{_median(rounds, 'all', lambda result: result.p50_ms):.2f} ms",
        other=f"{_median(rounds, 'bare', lambda result: result.p50_ms):.2f} ms",
        result=f"+{added:.2f} ms",
        goal=f"{goal_ms:g} ms or less",
        met=added <= goal_ms,
    )


def _progress(text: str) -> None:
    if sys.stderr.isatty():
        print(f"\r{text:<70}", end="" if text else "\r", file=sys.stderr, flush=True)


def _table(lines: list[Line]) -> str:
    head = ["", "modelbus", "bare server", "result", "goal", ""]
    marks = {True: "met", False: "MISSED", None: ""}
    cells = [head, *([line.what, line.modelbus, line.other, line.result, line.goal, marks[line.met]] for line in lines)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(head))]
    rows = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in cells
    ]
    return "\n".join([rows[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *rows[1:]])


async def measure(rows: list[str], plan: Plan) -> list[Line]:
    lines: list[Line] = []
    async with stand() as parts:
        for name in rows:
            print(f"{name}: {(ROWS[name].__doc__ or '').splitlines()[0]}", file=sys.stderr, flush=True)
            try:
                lines += await ROWS[name](parts, plan)
            except RuntimeError as error:
                print(f"{name} failed: {error}", file=sys.stderr)
                lines.append(Line(what=name, modelbus="", other="", result="failed", met=False))
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(prog="make bench", description="Rows: " + ", ".join(ROWS))
    parser.add_argument("rows", nargs="*", choices=[[], *ROWS], metavar="ROW", help="all of them when none is named")
    parser.add_argument("--seconds", type=float, default=5.0, help="length of one run (default: 5)")
    parser.add_argument("--rounds", type=int, default=5, help="alternating runs of each side (default: 5)")
    parser.add_argument("--requests", type=int, default=300_000, help="of the row soak (default: 300000)")
    given = parser.parse_args()
    plan = Plan(seconds=given.seconds, rounds=given.rounds, requests=given.requests)
    began = time.monotonic()
    lines = asyncio.run(measure(given.rows or list(ROWS), plan))
    print(f"\n{_table(lines)}\n")
    print(
        f"{plan.rounds} alternating runs of {plan.seconds:g} s; {os.cpu_count()} CPUs, {platform.machine()}, "
        f"Python {platform.python_version()}; {time.monotonic() - began:.0f} s in all"
    )
    results = ROOT / ".cache" / "bench" / f"{time.strftime('%Y%m%d-%H%M%S')}.json"
    results.parent.mkdir(parents=True, exist_ok=True)
    results.write_text(json.dumps({"plan": msgspec.to_builtins(plan), "lines": msgspec.to_builtins(lines)}, indent=2))
    print(f"saved in {results.relative_to(ROOT)}")
    return 1 if any(line.met is False for line in lines) else 0


if __name__ == "__main__":
    sys.exit(main())
