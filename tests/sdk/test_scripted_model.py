"""The models that ``modelbus.testing`` gives to those who test their own programs, in this process."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import modelbus
import msgspec
import pydantic
import pytest
from modelbus.errors import (
    ConfigurationError,
    DeadlineExceeded,
    EngineFailed,
    InvalidRequest,
    ModelBusError,
    ModelNotFound,
    NotRecorded,
    RequestCancelled,
    UpstreamFailed,
)
from modelbus.testing import (
    Asked,
    Recorder,
    Replay,
    Rule,
    Script,
    ScriptedAnswer,
    ScriptedCall,
    ScriptedModel,
    count_tokens,
)
from modelbus_broker.asking import CallOptions
from modelbus_broker.messages import Chat

FORMAT = {
    "type": "json_schema",
    "json_schema": {
        "name": "n",
        "schema": {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]},
    },
}


def tools(*names: str) -> list[dict[str, Any]]:
    return [{"type": "function", "function": {"name": name}} for name in names]


async def test_answers_come_in_order_and_then_it_fails_loudly() -> None:
    model = ScriptedModel("one", ScriptedAnswer(text="two", reasoning="hm"))

    assert (await model.chat("any", "a")).text == "one"
    second = await model.chat("any", "b")
    assert (second.text, second.reasoning, second.finish_reason) == ("two", "hm", "stop")
    assert second.usage.reasoning_tokens == 1 and second.usage.completion_tokens == 2
    with pytest.raises(EngineFailed, match="no rule for 'c'"):
        await model.chat("any", "c")
    assert [asked.messages[-1].text() for asked in model.requests] == ["a", "b", "c"]


@dataclasses.dataclass
class Point:
    x: int


class Story(pydantic.BaseModel):
    title: str


async def test_values_are_answered_as_json_and_errors_are_raised() -> None:
    model = ScriptedModel(Story(title="t"), Point(3), {"a": [1]}, UpstreamFailed("down"))

    texts = [(await model.chat("m", "x")).text for _ in range(3)]

    assert [json.loads(text) for text in texts] == [{"title": "t"}, {"x": 3}, {"a": [1]}]
    with pytest.raises(UpstreamFailed, match="down"):
        await model.chat("m", "x")


async def test_rules_look_at_the_last_message() -> None:
    model = ScriptedModel(
        rules={r"(?i)\bweather\b": "rain", r"\d": ScriptedAnswer(text="a number")}, otherwise="schema"
    )

    said = [(await model.chat("m", text)).text for text in ("The Weather?", "7", "else")]

    assert said == ["rain", "a number", "else"]


async def test_a_function_answers_from_the_whole_request() -> None:
    async def respond(chat: Chat) -> str:
        await asyncio.sleep(0)
        return f"{len(chat.messages)} {chat.sampling.temperature}"

    model = ScriptedModel(respond=respond)

    assert (
        await model.chat("m", [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}], temperature=0.5)
    ).text == "2 0.5"
    with pytest.raises(ZeroDivisionError):  # a mistake of the test itself is seen as it is
        await ScriptedModel(respond=lambda chat: str(1 / 0)).chat("m", "x")


async def test_without_a_script_each_tool_is_called_once_and_then_the_format_is_kept() -> None:
    model = ScriptedModel()
    messages: list[Any] = [{"role": "user", "content": "go"}]

    names = []
    while (answer := await model.chat("m", messages, tools=tools("a", "b"), response_format=FORMAT)).tool_calls:
        (call,) = answer.tool_calls
        assert answer.finish_reason == "tool_calls" and json.loads(call.function.arguments) == {}
        names.append((call.id, call.function.name))
        messages += [
            {"role": "assistant", "tool_calls": [msgspec.to_builtins(call)]},
            {"role": "tool", "tool_call_id": call.id, "content": "1"},
        ]

    assert names == [("call_1", "a"), ("call_2", "b")]
    assert json.loads(answer.text) == {"n": 1}
    again = [*messages, {"role": "user", "content": "once more"}]
    assert (await model.chat("m", again, tools=tools("a", "b"))).tool_calls[0].function.name == "a"
    assert not (await model.chat("m", "x", tools=tools("a"), tool_choice="none")).tool_calls
    forced = await model.chat(
        "m", messages, tools=tools("a", "b"), tool_choice={"type": "function", "function": {"name": "b"}}
    )
    assert forced.tool_calls[0].function.name == "b"
    assert (await model.chat("m", messages, tools=tools("a"), tool_choice="required")).tool_calls
    with pytest.raises(InvalidRequest, match="'c'"):
        await model.chat("m", "x", tools=tools("a"), tool_choice={"type": "function", "function": {"name": "c"}})
    with pytest.raises(InvalidRequest, match="no function"):
        await model.chat("m", "x", tools=[{"type": "function"}])
    assert json.loads((await model.chat("m", "x", response_format={"type": "json_object"})).text) == {}


@pytest.mark.parametrize(("chunks", "pieces"), [(0, 6), (1, 1), (3, 3)])
async def test_a_stream_comes_in_as_many_chunks_as_wanted(chunks: int, pieces: int) -> None:
    model = ScriptedModel("one two three four five six", chunks=chunks)

    async with model.stream("m", "x", logprobs=2) as stream:
        deltas = [delta async for delta in stream]

    assert len(deltas) == pieces and "".join(delta.text for delta in deltas) == "one two three four five six"
    assert [delta.finish_reason for delta in deltas] == [""] * (pieces - 1) + ["stop"]
    assert deltas[-1].position == 6 == stream.usage.completion_tokens
    assert sum(len(delta.logprobs) for delta in deltas) == 6
    assert stream.answer.text == "one two three four five six" and stream.id


async def test_calls_stream_in_pieces_that_make_one_call() -> None:
    calls = [ScriptedCall(name="f", arguments={"text": "a b c d"}), ScriptedCall(name="g", arguments="not json")]
    model = ScriptedModel(ScriptedAnswer(text="let me see", tool_calls=calls), chunks=0)

    async with model.stream("m", "x", tools=tools("f", "g")) as stream:
        deltas = [delta async for delta in stream]

    assert len([delta for delta in deltas if delta.tool_calls]) > 4
    answer = stream.answer
    assert (answer.text, answer.finish_reason) == ("let me see", "tool_calls")
    assert [(call.id, call.function.name, call.function.arguments) for call in answer.tool_calls] == [
        ("call_1", "f", '{"text": "a b c d"}'),
        ("call_2", "g", "not json"),
    ]


async def test_the_limit_of_tokens_counts_thoughts_text_and_calls() -> None:
    answer = ScriptedAnswer(reasoning="a b", text="c d", tool_calls=[ScriptedCall(name="f", arguments={"x": 1})])
    model = ScriptedModel(respond=lambda chat: answer)

    cut = {limit: await model.chat("m", "x", max_tokens=limit) for limit in (1, 3, 5, 6, 99)}

    assert [(a.reasoning, a.text, a.finish_reason, len(a.tool_calls)) for a in cut.values()] == [
        ("a", "", "length", 0),
        ("a b", "c", "length", 0),
        ("a b", "c d", "length", 1),
        ("a b", "c d", "tool_calls", 1),
        ("a b", "c d", "tool_calls", 1),
    ]
    assert all(a.usage.completion_tokens <= limit for limit, a in cut.items())


async def test_faults_come_when_they_are_asked_for() -> None:
    fails = ScriptedModel(text="one two three", fail="first:1", fail_after=2, fail_code="worker_lost", chunks=0)
    got = []
    with pytest.raises(ModelBusError, match="told to fail") as error:
        async for delta in fails.stream("m", "x"):
            got.append(delta.text)
    assert (error.value.code, got) == ("worker_lost", ["one", " two"])
    assert (await fails.chat("m", "x")).text == "one two three"

    cuts = ScriptedModel(text="one two three", cut="every:2", cut_after=2)
    endings = [(a.text, a.finish_reason) for a in [await cuts.chat("m", "x") for _ in range(3)]]
    assert endings == [("one two three", "stop"), ("one two", "length"), ("one two three", "stop")]

    slow = ScriptedModel("late", delay_ms=60_000)
    with pytest.raises(DeadlineExceeded, match=r"0\.05 s"):
        await slow.chat("m", "x", options=CallOptions(budget_ms=50))
    failing = ScriptedModel(fail="always")
    with pytest.raises(EngineFailed):
        await failing.embed("m", "x")


@pytest.mark.parametrize("how", ["cut", "fenced", "prose", "wrong"])
async def test_json_is_spoilt_and_other_text_is_not(how: str) -> None:
    model = ScriptedModel(malform="always", malform_as=how)

    text = (await model.chat("m", "x", response_format=FORMAT)).text
    arguments = (await model.chat("m", "x", tools=tools("f"))).tool_calls[0].function.arguments

    for spoilt in (text, arguments):
        if how == "wrong":
            assert json.loads(spoilt) == {"unexpected": True}
        else:
            with pytest.raises(ValueError):
                json.loads(spoilt)
    assert ("```json\n" in text) == (how == "fenced")
    assert (await model.chat("m", "plain words")).text == "plain words"


async def test_probabilities_are_those_of_the_script() -> None:
    model = ScriptedModel(ScriptedAnswer(text="yes", probabilities={"no": 0.2, "yes": 0.7, "maybe": 0.1}))

    (token,) = (await model.chat("m", "x", logprobs=2)).choices[0].logprobs

    assert [(top.token, round(math.exp(top.logprob), 6)) for top in token.top] == [("yes", 0.7), ("no", 0.2)]
    assert math.exp(token.logprob) == pytest.approx(0.7)


async def test_the_other_tasks_are_those_of_the_echo_model() -> None:
    model = ScriptedModel(dimensions=8)

    assert [len(vector) for vector in (await model.embed("m", ["a", "b"])).vectors] == [8, 8]
    assert (await model.rerank("m", "cats eat", ["a train", "cats"])).documents[0].text == "cats"
    assert (await model.classify("m", "word")).texts[0].label == "short"


async def test_names_and_parameters_are_checked() -> None:
    model = ScriptedModel("x", models=["chat"])
    assert model.capabilities("chat").tools and not ScriptedModel(tools=False).capabilities("m").tools
    for ask in (model.chat("other", "x"), model.embed("other", "x")):
        with pytest.raises(ModelNotFound, match="deployed: chat"):
            await ask
    assert model.requests == []
    for wrong in ({"chunkz": 1}, {"fail": "now"}, {"script": Script(), "rules": {"a": "b"}}):
        with pytest.raises(ConfigurationError):
            ScriptedModel(**wrong)
    script = Script(rules=[Rule(pattern="a", answer="b")], answers=["c"])
    follows = ScriptedModel(script=script)
    assert [(await follows.chat("m", text)).text for text in ("a", "x")] == ["b", "c"]


async def test_leaving_a_stream_early_ends_it() -> None:
    model = ScriptedModel("one two three", chunks=0)

    async with model.stream("m", "x") as stream:
        async for _ in stream:
            break

    with pytest.raises(RequestCancelled):
        await stream._call.batch()  # type: ignore[union-attr]
    assert model.last == Asked(model="m", task=model.last.task, options=model.last.options)


SECRETS = {
    "key": "sk-proj-abcdefghijklmnopqrstuv", "github": "ghp_0123456789abcdefghij", "aws": "AKIAIOSFODNN7EXAMPLE",
    "bearer": "Authorization: Bearer abc.def-ghi_jkl", "url": "postgres://me:hunter22@db/x", "json": '{"api_key": "plain-looking"}',
    "jwt": "eyJhbGciOiJI.eyJzdWIiOiIx.SflKxwRJSM",
}  # fmt: skip
HIDDEN = ["abcdefghijkl", "0123456789abcdef", "IOSFODNN7", "abc.def-ghi", "hunter22", "plain-looking", "SflKxwRJSM", "topsecret", "Agent 47"]  # fmt: skip


async def test_recordings_have_no_secrets_and_are_found_again(tmp_path: Path) -> None:
    path = tmp_path / "traffic.jsonl"
    call = ScriptedCall(name="login", arguments={"password": "topsecret", "user": "me"})
    answers = [
        *SECRETS.values(),
        ScriptedAnswer(tool_calls=[call]),
        "I met Agent 47.",
        UpstreamFailed("bad key sk-proj-abcdefghijklmnopqrstuv"),
    ]

    def redact(text: str) -> str:
        return text.replace("Agent 47", "someone")

    async def asked(client: modelbus.ModelClient) -> list[Any]:
        said: list[Any] = []
        for name, secret in SECRETS.items():
            async with client.stream("m", f"my {name} is {secret}", api_key="topsecret") as stream:
                said.append([delta.text async for delta in stream])
        said.append((await client.chat("m", "log in")).tool_calls[0].function.arguments)
        said.append((await client.chat("m", "Who is Agent 47?", logprobs=1)).text)
        with pytest.raises(UpstreamFailed) as error:
            await client.chat("m", "last")
        return [*said, error.value.message]

    real = await asked(Recorder(ScriptedModel(*answers, chunks=0), path, redact))

    assert json.loads(real[-3]) == {"password": "topsecret", "user": "me"}, "the caller gets what was said"
    text = path.read_text()
    assert [word for word in HIDDEN if word in text] == []
    assert len(text.splitlines()) == len(answers)
    again = await asked(Replay(path, redact))
    assert json.loads(again[-3]) == {"password": "***", "user": "me"}
    assert again[-2:] == ["I met someone.", "bad key ***"]
    with pytest.raises(NotRecorded):
        await Replay(path).chat("m", "Who is Agent 47?", logprobs=1)  # asked without taking it out
    with pytest.raises(NotRecorded, match="differs in sampling"):
        await Replay(path, redact).chat("m", "log in", temperature=1.0)


async def test_what_was_asked_twice_is_answered_in_order_and_unread_answers_are_not_recorded(tmp_path: Path) -> None:
    path = tmp_path / "traffic.jsonl"
    recorder = Recorder(ScriptedModel("first", "second", "left", chunks=0), path)
    assert [(await recorder.chat("m", "x")).text for _ in range(2)] == ["first", "second"]
    async with recorder.stream("m", "x") as stream:
        async for _ in stream:
            break
    with pytest.raises(ModelNotFound):
        await Recorder(ScriptedModel(models=["n"]), path).chat("m", "nobody")

    replay = Replay(path)

    assert [(await replay.chat("m", "x")).text for _ in range(3)] == ["first", "second", "second"]
    with pytest.raises(ModelNotFound, match="not deployed"):
        await replay.chat("m", "nobody")
    with pytest.raises(NotRecorded, match="recorded are requests to m"):
        await replay.embed("n", "x")


@pytest.mark.parametrize(
    "line", ["{", '{"model": 1, "task": {}}', '{"model": "m", "task": {}, "frames": [{"type": "pickle"}]}']
)
def test_a_line_that_is_no_recording_is_named(line: str, tmp_path: Path) -> None:
    path = tmp_path / "traffic.jsonl"
    path.write_text(f'{{"model": "m", "task": {{}}}}\n\n{line}\n')

    with pytest.raises(ConfigurationError, match="line 3"):
        Replay(path)


async def test_the_prompt_is_counted_in_tokens_of_the_echo_model() -> None:
    answer = await ScriptedModel("a b").chat("m", "one two  three")

    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (count_tokens("one two  three"), 2)
