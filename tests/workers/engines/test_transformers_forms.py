"""JSON schemas and tool calls on a real model, and going on in the middle of them."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import jiter
import jsonschema
import pytest
import pytest_asyncio
from modelbus_broker.errors import InvalidRequest, UnsupportedField
from modelbus_broker.messages import Chat, ChatMessage, FunctionCall, Sampling, ToolCall, encode
from modelbus_workers.engines.base import EngineConfig
from modelbus_workers.engines.transformers import TransformersEngine

from tests.helpers.smollm2 import smollm2, smollm2_with
from tests.workers.engines.contract import Answer, Said, ask, goes_on_anywhere, said

pytest.importorskip("torch")
pytest.importorskip("transformers")

pytestmark = [
    pytest.mark.asyncio(loop_scope="module"),
    pytest.mark.timeout(300),
    # The library's own deprecations are not ours to repair.
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "maxLength": 12},
        "native": {"const": "東京 é"},
        "emoji": {"enum": ["🗼", "🦙🎉"]},
        "big": {"type": "boolean"},
    },
    "required": ["city", "native", "emoji", "big"],
    "additionalProperties": False,
}
FORMAT = {"type": "json_schema", "json_schema": {"name": "city", "schema": SCHEMA}}
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Current weather of a city",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string", "maxLength": 12},
                "sky": {"enum": ["🌧️ 雨", "☀️ 晴れ"]},
            },
            "required": ["city", "sky"],
            "additionalProperties": False,
        },
    },
}
TIME = {
    "type": "function",
    "function": {
        "name": "get_time",
        "parameters": {
            "type": "object",
            "properties": {"zone": {"type": "string", "maxLength": 12}},
            "required": ["zone"],
            "additionalProperties": False,
        },
    },
}
SCHEMAS = {tool["function"]["name"]: tool["function"]["parameters"] for tool in (WEATHER, TIME)}  # type: ignore[index]
TOKYO = "Describe the city of Tokyo."
RAIN = "What is the weather in Paris?"


def chat(text: str, *, sampling: dict[str, Any] | None = None, **fields: Any) -> Chat:
    greedy: dict[str, Any] = {"temperature": 0.0, "max_tokens": 90}
    return Chat(
        messages=[ChatMessage(role="user", content=text)], sampling=Sampling(**greedy | (sampling or {})), **fields
    )


async def started(folder: Path, **params: str) -> TransformersEngine:
    engine = TransformersEngine(
        EngineConfig(
            model="m", model_path=str(folder), params={"num_threads": "1", "dtype": "float32"} | params, slots=3
        )
    )
    await engine.start()
    return engine


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def engine() -> AsyncIterator[TransformersEngine]:
    """It reads side by side what is asked side by side, which takes less time; those of other formats do not."""
    made = await started(smollm2(), continuous_batching="true")
    yield made
    await made.close()


class Alone:
    """Answers to requests that ran alone. What several tests ask, greedily, is asked once."""

    def __init__(self, engine: TransformersEngine) -> None:
        self._engine = engine
        self._answers: dict[bytes, Answer] = {}

    async def ask(self, task: Chat) -> Answer:
        key = encode(task)
        if key not in self._answers:
            self._answers[key] = await ask(self._engine, task)
        return self._answers[key]


@pytest.fixture(scope="module")
def alone(engine: TransformersEngine) -> Alone:
    return Alone(engine)


def put_together(choice: Said) -> list[tuple[str, str, Any]]:
    """Id, name and arguments of each call."""
    calls: list[tuple[str, str, str]] = []
    for piece in choice.calls:
        if piece.name:
            assert piece.index == len(calls) and piece.id and not piece.arguments
            calls.append((piece.id, piece.name, ""))
        else:
            assert piece.index == len(calls) - 1 and piece.arguments
            calls[-1] = (*calls[-1][:2], calls[-1][2] + piece.arguments)
    return [(id, name, json.loads(arguments)) for id, name, arguments in calls]


def calls_of(answer: Answer) -> list[tuple[str, str, Any]]:
    return put_together(said(answer.outputs)[0])


def is_valid(value: object, schema: dict[str, Any]) -> bool:
    jsonschema.validate(value, schema)
    return True


async def test_an_answer_keeps_to_its_schema(alone: Alone) -> None:
    answer = await alone.ask(chat(TOKYO, response_format=FORMAT))

    assert is_valid(json.loads(answer.texts[0]), SCHEMA)
    assert answer.reasons == {0: "stop"}
    assert answer.usage.completion_tokens == len(answer.token_ids[0])


async def test_a_sampled_answer_keeps_to_its_schema_too(engine: TransformersEngine) -> None:
    sampling = {"temperature": 0.9, "seed": 3, "n": 3, "frequency_penalty": 1.0, "min_tokens": 2, "max_tokens": 200}
    answer = await ask(engine, chat(TOKYO, response_format=FORMAT, sampling=sampling))

    assert len(set(answer.texts.values())) > 1
    whole = [answer.texts[choice] for choice, reason in answer.reasons.items() if reason == "stop"]
    assert whole, "all were cut"
    assert all(is_valid(json.loads(text), SCHEMA) for text in whole)


async def test_a_json_object_is_one(engine: TransformersEngine) -> None:
    wanted = {"type": "json_object"}
    answer = await ask(engine, chat("Give me JSON with a name.", response_format=wanted, sampling={"max_tokens": 40}))

    cut = answer.reasons == {0: "length"}
    assert isinstance(jiter.from_json(answer.texts[0].encode(), partial_mode=cut), dict)


async def test_a_token_limit_cuts_json_with_length(engine: TransformersEngine) -> None:
    answer = await ask(engine, chat(TOKYO, response_format=FORMAT, sampling={"max_tokens": 7}))

    assert (answer.reasons, answer.usage.completion_tokens) == ({0: "length"}, 7)


async def test_min_tokens_and_ignore_eos_do_not_break_a_complete_answer(engine: TransformersEngine) -> None:
    yes = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"enum": ["yes", "no"]}}}
    sampling = {"min_tokens": 30, "ignore_eos": True, "max_tokens": 40}
    answer = await ask(engine, chat("Is it raining?", response_format=yes, sampling=sampling))

    assert json.loads(answer.texts[0]) in ("yes", "no")
    assert answer.reasons == {0: "stop"}


async def test_log_probabilities_under_a_schema_are_of_what_it_allows(engine: TransformersEngine) -> None:
    yes = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"enum": ["yes", "no"]}}}
    answer = await ask(engine, chat("Is it raining?", response_format=yes, sampling={"logprobs": 5}))

    scores = [score for output in answer.outputs for score in output.logprobs]
    assert "".join(score.token for score in scores) == answer.texts[0]
    assert all(score.top and score.top[0].logprob == score.logprob for score in scores)
    assert {top.token for top in scores[0].top} <= {'"', '"n', '"y', '"yes', '"no'}
    assert all(top.logprob > float("-inf") for score in scores for top in score.top)


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "get_time"}}])
async def test_a_forced_call_comes_as_a_call(alone: Alone, choice: Any) -> None:
    answer = await alone.ask(chat(RAIN, tools=[WEATHER, TIME], tool_choice=choice))

    calls = calls_of(answer)
    assert answer.texts == {0: ""}
    assert answer.reasons == {0: "tool_calls"}
    assert all(is_valid(arguments, SCHEMAS[name]) for _, name, arguments in calls)
    assert len({id for id, _, _ in calls}) == len(calls)
    if choice != "required":
        assert [name for _, name, _ in calls] == ["get_time"]


async def test_only_one_call_where_the_client_wants_one_at_a_time(engine: TransformersEngine, alone: Alone) -> None:
    many = await alone.ask(chat(RAIN, tools=[WEATHER, TIME], tool_choice="required"))
    one = await ask(engine, chat(RAIN, tools=[WEATHER, TIME], tool_choice="required", parallel_tool_calls=False))

    assert len(calls_of(many)) > 1
    assert calls_of(one) == calls_of(many)[:1]
    assert one.reasons == {0: "tool_calls"}


async def test_a_model_that_does_not_call_answers_in_words(engine: TransformersEngine, alone: Alone) -> None:
    with_tools = await ask(engine, chat("Hi!", tools=[WEATHER]))
    without = await alone.ask(chat("Hi!"))
    not_shown = await ask(engine, chat("Hi!", tools=[WEATHER], tool_choice="none"))

    assert with_tools.texts[0] and with_tools.reasons == {0: "stop"}
    assert not calls_of(with_tools)
    assert with_tools.prompt_tokens > without.prompt_tokens == not_shown.prompt_tokens  # type: ignore[operator]
    assert not_shown.texts == without.texts


async def test_a_call_cut_by_the_limit_says_length(engine: TransformersEngine) -> None:
    for limit in (4, 20):
        answer = await ask(engine, chat(RAIN, tools=[WEATHER], tool_choice="required", sampling={"max_tokens": limit}))
        assert (answer.texts, answer.reasons) == ({0: ""}, {0: "length"})


async def test_earlier_calls_and_results_reach_a_model_whose_template_knows_none(engine: TransformersEngine) -> None:
    call = ToolCall(id="c1", function=FunctionCall(name="get_weather", arguments='{"city": "Paris"}'))
    messages = [
        ChatMessage(role="system", content="Be brief."),
        ChatMessage(role="user", content=RAIN),
        ChatMessage(role="assistant", content=None, tool_calls=[call]),
        ChatMessage(role="tool", tool_call_id="c1", content="Heavy rain, 12 degrees."),
    ]
    task = Chat(messages=messages, tools=[WEATHER], sampling=Sampling(temperature=0.0, max_tokens=40))

    answer = await ask(engine, task)

    assert "rain" in answer.texts[0].lower()


@pytest.mark.parametrize(
    "task",
    [
        chat(TOKYO, response_format=FORMAT, sampling={"logprobs": 2}),
        chat(TOKYO, response_format=FORMAT, sampling={"stop": ["emoji"]}),
        chat(TOKYO, response_format=FORMAT, sampling={"temperature": 1.3, "seed": 7, "presence_penalty": 0.5, "n": 2, "max_tokens": 24}),
        chat(RAIN, tools=[WEATHER, TIME], tool_choice="required", sampling={"logprobs": 1, "max_tokens": 48}),
        chat(RAIN, tools=[WEATHER], tool_choice="required", sampling={"max_tokens": 24}),
        chat(RAIN, tools=[WEATHER], tool_choice={"type": "function", "function": {"name": "get_weather"}}, sampling={"n": 2, "temperature": 1.2, "seed": 1}),
        chat("Hi!", tools=[WEATHER], response_format={"type": "json_object"}, sampling={"max_tokens": 40}),
        chat("Repeat exactly: 🦙🎉 日本語 é", tools=[WEATHER], sampling={"max_tokens": 24, "stop": ["🎉🎉"]}),
    ],
    ids=["schema", "schema stopped", "schema sampled", "calls", "call cut", "named sampled", "call or schema", "free with tools"],
)  # fmt: skip
async def test_an_answer_with_a_form_goes_on_from_every_position(engine: TransformersEngine, task: Chat) -> None:
    def cuts(length: int) -> set[int]:
        # Some in the middle, and the last ones, where an answer ends in more than one way.
        return {1, length // 3, length * 2 // 3, *range(max(0, length - 2), length + 1)}

    outputs = await goes_on_anywhere(engine, task, cuts, at_once=8)

    texts = [output.text for output in outputs]
    if task.response_format == FORMAT and task.sampling.stop == [] and not task.sampling.temperature:
        assert any(not text for text in texts), "some token ends inside a character"
    if task.tool_choice == "required":
        assert any(output.tool_calls and not output.tool_calls[0].name for output in outputs), (
            "arguments come in pieces"
        )


async def test_requests_with_and_without_a_form_run_side_by_side(engine: TransformersEngine, alone: Alone) -> None:
    calls = chat(RAIN, tools=[WEATHER, TIME], tool_choice="required")
    tasks = [chat(TOKYO, response_format=FORMAT), chat("Hi!"), calls]
    expected = [await alone.ask(task) for task in tasks]

    together = await asyncio.gather(*(ask(engine, task) for task in tasks))

    assert [answer.token_ids for answer in together] == [answer.token_ids for answer in expected]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "objekt"}}}},
            "response_format",
        ),
        ({"tools": [TIME], "tool_choice": {"type": "function", "function": {"name": "no"}}}, "tool_choice"),
    ],
)
async def test_a_wrong_form_is_refused_before_any_token(
    engine: TransformersEngine, fields: dict[str, Any], param: str
) -> None:
    steps = engine.steps

    with pytest.raises(InvalidRequest) as caught:
        await ask(engine, chat("Hi!", **fields))

    assert (caught.value.param, engine.steps) == (param, steps)


TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if tools %}{{ tools | tojson }}{% endif %}{# MARK #}<|im_start|>assistant\n"
)


@pytest.mark.parametrize(
    ("name", "marks", "special"),
    [
        ("hermes", ["<tool_call>", "</tool_call>"], False),
        ("llama3_json", ["<|python_tag|>"], True),
        ("mistral", ["[TOOL_CALLS]"], True),
        ("mistral", ["[TOOL_CALLS]", "[ARGS]"], True),
    ],
)
async def test_each_format_is_written_read_and_gone_on_with(
    tmp_path: Path, name: str, marks: list[str], special: bool
) -> None:
    template = TEMPLATE.replace("MARK", " ".join(marks))
    folder = smollm2_with(tmp_path / "model", template=template, words=dict.fromkeys(marks, special))
    engine = await started(folder)
    try:
        task = chat(RAIN, tools=[WEATHER, TIME], tool_choice="required", sampling={"max_tokens": 60, "seed": 2})
        answer = await ask(engine, task)
        assert answer.texts == {0: ""}
        ids = [id for id, *_ in calls_of(answer)] if answer.reasons == {0: "tool_calls"} else []
        assert all((len(id) == 9) == (name == "mistral") for id in ids)
        assert said(answer.outputs)[0].calls[0].name in SCHEMAS
        token_of_its_own = engine._text is not None and engine._text.call_tokens
        assert token_of_its_own and set(token_of_its_own) == set(marks)
        await goes_on_anywhere(engine, task, range(3, len(answer.outputs), 24))
        assert engine.capabilities().tools
    finally:
        await engine.close()


async def test_a_model_whose_calls_cannot_be_told_serves_no_tools(tmp_path: Path, engine: TransformersEngine) -> None:
    folder = smollm2_with(tmp_path / "model", template=TEMPLATE, words={})
    unknown = await started(folder)
    told = await started(folder, tool_parser="hermes")
    try:
        assert not unknown.capabilities().tools and unknown.capabilities().json_schema
        with pytest.raises(UnsupportedField, match="tool_parser"):
            await ask(unknown, chat(RAIN, tools=[WEATHER]))
        assert told.capabilities().tools
        assert len({unknown.compat(), told.compat(), engine.compat()}) == 3
    finally:
        await unknown.close()
        await told.close()
