"""A file of requests through `/v1/batches`, beside the same rows as jobs of a map and as plain requests."""

from __future__ import annotations

import asyncio
import json
import statistics
import time

import modelbus
import openai

from .load import LoadJob
from .plan import Line, Plan
from .stand import QUESTION, Stand

ROWS = 3000


async def batches(stand: Stand, plan: Plan) -> list[Line]:
    """3,000 rows in a batch, beside `client.map` and beside 64 connections that ask them plainly, which keeps nothing."""
    await stand.model("chat")
    port = await stand.gateway()
    plain = LoadJob(
        port=port, body=stand.body("chat"), stream=False, connections=64, seconds=plan.seconds, warmup_s=0.5
    )
    rounds = []
    async with (
        modelbus.connect(stand.server.url) as client,
        openai.AsyncOpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="any", max_retries=0) as http,
    ):
        for _ in range(plan.rounds):
            batch = await _batch(http)
            began = time.perf_counter()
            rows = await client.map("chat", [QUESTION] * ROWS, concurrency=256)
            mapped = ROWS / (time.perf_counter() - began)
            assert all(row.error is None for row in rows)
            asked = (await stand.load(plain)).requests_per_s
            rounds.append((batch, mapped, asked))
    batch, mapped, asked = (statistics.median(column) for column in zip(*rounds, strict=True))
    return [
        Line(
            what=f"{ROWS:,} rows through /v1/batches, from the upload to the end",
            modelbus=f"{batch:,.0f} rows/s",
            other=f"client.map {mapped:,.0f} rows/s; plain requests {asked:,.0f}/s",
            result=f"{statistics.median(b / m for b, m, _ in rounds):.2f} of the map, "
            f"{statistics.median(b / a for b, _, a in rounds):.2f} of plain requests",
        )
    ]


async def _batch(http: openai.AsyncOpenAI) -> float:
    """Rows per second."""
    body = {"model": "chat", "messages": [{"role": "user", "content": QUESTION}]}
    lines = [
        json.dumps({"custom_id": str(n), "method": "POST", "url": "/v1/chat/completions", "body": body})
        for n in range(ROWS)
    ]
    began = time.perf_counter()
    file = await http.files.create(file=("rows.jsonl", "\n".join(lines).encode()), purpose="batch")
    batch = await http.batches.create(input_file_id=file.id, endpoint="/v1/chat/completions", completion_window="24h")
    while batch.status in ("validating", "in_progress", "finalizing"):
        await asyncio.sleep(0.02)
        batch = await http.batches.retrieve(batch.id)
    took = time.perf_counter() - began
    assert batch.status == "completed" and batch.request_counts is not None and batch.request_counts.completed == ROWS
    return ROWS / took
