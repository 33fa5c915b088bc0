"""The llama_cpp engine behind gateway and bus, beside the server that llama-cpp-python brings, on the same settings."""

from __future__ import annotations

import asyncio
import json
import statistics

import msgspec

from tests.helpers.smollm2 import smollm2_gguf

from .load import LoadJob
from .plan import Line, Plan
from .stand import ROOT, Stand

SERVER = ROOT / ".venv-llama-server" / "bin" / "python"
#: What both are told; one thread, as clients, gateway and bus run on this machine too.
SETTINGS = {"n_ctx": "1024", "n_batch": "512", "n_threads": "1", "flash_attn": "true"}
#: Of each request another one, so that no server reads only what is new in it.
QUESTION = "Tell me 000000 things about the sea."


async def llama_cpp(stand: Stand, plan: Plan) -> list[Line]:
    """SmolLM2 in 4 bits on a CPU, streams of 64 tokens, for 1, 2 and 4 clients at once."""
    if not SERVER.exists():
        return [Line(what="llama-cpp-python's server", modelbus="", other="not installed: make bench-setup", result="")]
    file = await asyncio.to_thread(smollm2_gguf)
    await stand.llama_cpp("smollm2", file, SETTINGS | {"use_extra_bufts": "false"})
    body = stand.folder / "smollm2.json"
    asked = {
        "model": "smollm2", "messages": [{"role": "user", "content": QUESTION}], "stream": True, "temperature": 0,
        "max_tokens": 64,
    }  # fmt: skip
    body.write_text(json.dumps(asked))
    mine = LoadJob(port=await stand.gateway(), body=str(body), stream=True, numbered=True)
    theirs = msgspec.structs.replace(mine, port=await stand.llama_server(SERVER, file, SETTINGS))
    for job in (mine, theirs):
        await _tokens_per_s(stand, job, 1)
    lines = []
    for clients in (1, 2, 4):
        rounds = [[await _tokens_per_s(stand, job, clients) for job in (mine, theirs)] for _ in range(plan.rounds)]
        rate, other, ratio = (
            statistics.median(values) for values in zip(*((*pair, pair[0] / pair[1]) for pair in rounds), strict=True)
        )
        lines.append(
            Line(
                what=f"llama.cpp on one core: {clients} at once",
                modelbus=f"{rate:.1f} tokens/s",
                other=f"{other:.1f} tokens/s (llama_cpp.server)",
                result=f"{ratio:.2f}",
            )
        )
    return lines


async def _tokens_per_s(stand: Stand, job: LoadJob, clients: int) -> float:
    result = await stand.load(msgspec.structs.replace(job, connections=clients, requests=2 * clients))
    return result.frames_per_s
