"""How well a small model calls tools, rung by rung: three sets of 24 requests with 3 tools to SmolLM2, through the bus.

Goals are of the first set. The second was written before anything was chosen with the first. How the tool is chosen was tuned on
the third, of eight times three tools, and on no other.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import modelbus
import msgspec
from modelbus_broker.errors import ModelBusError
from modelbus_broker.messages import ChatMessage, Deployment, Ladder, ToolCall

from tests.helpers.smollm2 import smollm2

from .plan import Line, Plan
from .stand import Stand

_DATA = Path(__file__).parents[1] / "data"
SETS = {f"set {n}": _DATA / f"tool_requests{suffix}.json" for n, suffix in ((1, ""), (2, "_2"), (3, "_3"))}
_ONLY_PROMPTED = Ladder(rungs=("prompted",), reasks=0)
#: way -> the ladder, the least of valid calls, the least of right tools
WAYS: dict[str, tuple[Ladder, int, int]] = {
    "grammar": (Ladder(rungs=("grammar",), reasks=0), 24, 21),
    "grammar, the model chooses": (Ladder(rungs=("grammar",), reasks=0, likely_tool=False), 0, 0),
    "prompted": (_ONLY_PROMPTED, 16, 0),
    "prompted, without examples": (msgspec.structs.replace(_ONLY_PROMPTED, examples=0), 0, 0),
    "prompted, 2 re-asks": (msgspec.structs.replace(_ONLY_PROMPTED, reasks=2), 0, 0),
}
#: What the others are compared with.
FLOOR = "prompted, without examples"


class Score(msgspec.Struct):
    """What came of the requests."""

    valid: int = 0  #: calls of a tool that there is, with arguments that fit its schema
    right: int = 0  #: and it is the tool that was meant
    exact: int = 0  #: with the arguments that were meant
    seconds: float = 0.0


async def structure(stand: Stand, plan: Plan) -> list[Line]:
    """24 tool requests with 3 tools to SmolLM2, on each rung of the ladder; greedy decoding, so one round is enough."""
    await stand.deployed(
        Deployment(
            name="smollm2", model="smollm2", engine="transformers", revision="1", model_path=str(smollm2()),
            engine_params={"dtype": "float32", "num_threads": "1"},
        )
    )  # fmt: skip
    lines: list[Line] = []
    async with modelbus.connect(stand.server.url) as client:
        for name, path in SETS.items():
            data = json.loads(path.read_text())
            groups = data if isinstance(data, list) else [data]
            scores: dict[str, Score] = {}
            for way, (ladder, _, _) in WAYS.items():
                scores[way] = await _score(client, groups, ladder)
                print(f"  {name}, {way}: {scores[way]}", file=sys.stderr, flush=True)
            lines += _lines(name, scores, sum(len(g["requests"]) for g in groups), goals=name == "set 1")
    return lines


def _lines(name: str, scores: dict[str, Score], requests: int, *, goals: bool) -> list[Line]:
    floor = scores[FLOOR]
    lines = []
    for way, score in scores.items():
        _, valid, right = WAYS[way] if goals else (None, 0, 0)
        lines.append(
            Line(
                what=f"24 tool requests, {name}, {way}",
                modelbus=f"{score.valid} valid, {score.right} right tool, {score.exact} exact",
                other="" if way == FLOOR else f"{floor.valid} valid, {floor.right} right tool",
                result=f"{score.valid / max(1, floor.valid):.1f} x the valid calls, {score.seconds / requests:.1f} s each",
                goal=(f"{valid} valid" + (f", {right} right" if right else "")) if valid else "",
                met=score.valid >= valid and score.right >= right if valid else None,
            )
        )
    return lines


async def _score(client: modelbus.Client, groups: list[Any], ladder: Ladder) -> Score:
    score = Score()
    began = time.perf_counter()
    for tools, request in [(group["tools"], request) for group in groups for request in group["requests"]]:
        try:
            answer = await client.chat(
                "smollm2", [ChatMessage(role="user", content=request["text"])], tools=tools, tool_choice="required",
                parallel_tool_calls=False, ladder=ladder, temperature=0, max_tokens=96,
            )  # fmt: skip
        except ModelBusError:
            continue
        for call in answer.tool_calls:
            _count(score, call, request)
    score.seconds = time.perf_counter() - began
    return score


def _count(score: Score, call: ToolCall, request: Any) -> None:
    score.valid += 1
    if call.function.name == request["tool"]:
        score.right += 1
        score.exact += json.loads(call.function.arguments) == request["arguments"]
