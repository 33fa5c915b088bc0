"""The tool that is meant: chosen by how likely the request is, offered alone."""

from __future__ import annotations

import json
from typing import Any

import pytest
from modelbus.answer_types import ChatAnswer
from modelbus.answers import ChoiceAnswer
from modelbus.structure import answer, tool_calls
from modelbus.structure.likely_tools import MOST_CHARS, MOST_TOOLS, likeliest, question
from modelbus.structure.profiles import Profile
from modelbus.structure.tool_calls import ToolCallsOutput
from modelbus_broker.messages import ChatMessage, FunctionCall, Ladder, ToolCall, Usage

NAMES = ("get_weather", "play_music", "set_timer")
TOOLS = [
    {"type": "function", "function": {"name": name, "description": f"Does {name}.", "parameters": {}}} for name in NAMES
]
ASKED = [ChatMessage(role="system", content="Be brief."), ChatMessage(role="user", content="Ring in 10 minutes.")]


class Model:
    """A model behind a grammar, whose worker chooses among tools."""

    def __init__(self) -> None:
        self.fields: list[dict[str, Any]] = []

    def profile(self, model: str) -> Profile:
        return Profile(grammar=True, likelihoods=True)

    async def chat(self, model: str, messages: Any, **fields: Any) -> ChatAnswer:
        self.fields.append(fields)
        call = ToolCall(id="c", function=FunctionCall(name="play_music", arguments="{}"))
        if "tools" in fields:
            said = ChoiceAnswer(index=0, tool_calls=[call], finish_reason="tool_calls")
            return ChatAnswer(id="r", model=model, choices=[said], usage=Usage(), rung="grammar", attempts=2)
        text = json.dumps({"name": "play_music", "arguments": {}})
        said = ChoiceAnswer(index=0, text=text, finish_reason="stop")
        return ChatAnswer(id="r", model=model, choices=[said], usage=Usage())


async def test_the_sdk_leaves_the_choice_to_the_worker() -> None:
    model, calls = Model(), tool_calls(TOOLS, choice="required", parallel=False)
    ladder = Ladder(rungs=("grammar",), reasks=1)
    found = await answer(model, "m", "Put on a song.", calls, ladder=ladder)
    assert isinstance(found.value, list) and [call.function.name for call in found.value] == ["play_music"]
    assert (found.rung, found.attempts) == ("grammar", 2), "as its worker says"
    (asked,) = model.fields
    assert (asked["tools"], asked["tool_choice"], asked["parallel_tool_calls"]) == (TOOLS, "required", False)
    assert asked["ladder"] == ladder and "response_format" not in asked

    for other in (Ladder(likely_tool=False), Ladder(reason_first=True)):
        model.fields.clear()
        await answer(model, "m", "Put on a song.", calls, ladder=other)
        assert "response_format" in model.fields[-1] and all("tools" not in asked for asked in model.fields)


class Told:
    """Says how likely a request is, by a table, and notes what it was asked."""

    def __init__(self, *likely: float) -> None:
        self.likely = list(likely)
        self.asked: list[tuple[str, str]] = []

    async def __call__(self, messages: list[ChatMessage], text: str) -> tuple[float, Usage]:
        self.asked.append((messages[-1].text(), text))
        return self.likely[len(self.asked) - 1], Usage(prompt_tokens=7)


def names(output: ToolCallsOutput) -> list[str]:
    return [form.name for form in output.forms]


@pytest.mark.parametrize("choice", ["auto", "required"])
async def test_the_likeliest_is_offered_alone(choice: Any) -> None:
    told = Told(-900.5, -1200.0, -30.25)  # of long texts no float has the probability itself
    output, usage = await likeliest(tool_calls(TOOLS, choice=choice), ASKED, told)

    assert (names(output), output.must, output.parallel) == (["set_timer"], choice == "required", True)
    assert usage.prompt_tokens == 21
    assert told.asked[1] == ("Tool: play music. Does play_music. What does the user say?", "Ring in 10 minutes.")
    assert question(output.forms[0])[0].role == "user"
    first, _ = await likeliest(tool_calls(TOOLS), ASKED, Told(-1.0, -1.0, -1.0))
    assert names(first) == ["get_weather"], "the same every time"


async def test_where_there_is_nothing_to_choose_nobody_is_asked() -> None:
    told = Told()
    follow_up = [
        *ASKED,
        ChatMessage(role="assistant", content="Which?"),
        ChatMessage(role="user", content="The first one."),
    ]
    after_results = [*ASKED, ChatMessage(role="tool", content="done", tool_call_id="1")]
    many = [{"name": f"tool_{n}", "parameters": {}} for n in range(MOST_TOOLS + 1)]
    for output, messages in (
        (tool_calls(TOOLS), after_results),
        (tool_calls(TOOLS), follow_up),
        (tool_calls(TOOLS), []),
        (tool_calls(TOOLS[:1]), ASKED),
        (tool_calls(TOOLS, choice="play_music"), ASKED),
        (tool_calls(many), ASKED),
    ):
        assert await likeliest(output, messages, told) == (output, Usage())
    assert told.asked == []


async def test_of_a_long_request_the_end_is_looked_at() -> None:
    told = Told(-3.0, -2.0, -1.0)
    text = "x" * MOST_CHARS + " and play something"
    await likeliest(tool_calls(TOOLS), [ChatMessage(role="user", content=text)], told)
    assert {said for _, said in told.asked} == {text[-MOST_CHARS:]}


def test_only_where_a_grammar_runs_and_the_engine_can_tell() -> None:
    able = Profile(grammar=True, likelihoods=True)
    assert able.chooses_tool(Ladder())
    assert not able.chooses_tool(Ladder(likely_tool=False))
    assert not able.chooses_tool(Ladder(rungs=("prompted",)))
    assert not Profile(grammar=True).chooses_tool(Ladder())
    assert not Profile(grammar=True, likelihoods=True, native_tools=True).chooses_tool(Ladder())
