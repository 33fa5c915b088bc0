"""The scripted engine keeps the contract of engines, follows its script on a real bus, and says what is wrong with one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema
import modelbus
import msgspec
import pytest
from modelbus.errors import ConfigurationError, EngineFailed, NotRecorded, UnsupportedField, UpstreamFailed
from modelbus.testing import Recorder
from modelbus_broker.messages import Chat, ChatMessage, Completion, Deployment
from modelbus_workers.engines.base import EngineConfig, engine_class
from modelbus_workers.engines.scripted import ScriptedEngine

from tests.helpers.cluster import Cluster
from tests.workers.engines import contract
from tests.workers.engines.contract import ask, chat

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"title": {"type": "string"}, "pages": {"type": "integer", "minimum": 40}},
    "required": ["title", "pages"],
    "additionalProperties": False,
}
FORMAT = {"type": "json_schema", "json_schema": {"name": "book", "schema": SCHEMA, "strict": True}}
TOOLS = [
    {"type": "function", "function": {"name": name, "parameters": {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}}}
    for name in ("first", "second")
]  # fmt: skip


async def started(**params: str) -> ScriptedEngine:
    engine = ScriptedEngine(EngineConfig(model="m", params=params))
    await engine.start()
    return engine


@pytest.mark.parametrize("check", contract.CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize(
    "params", [{}, {"chunks": "0"}, {"context_length": "1000", "interval_ms": "1"}, {"text": "a b c d e f", "chunks": "1"}], ids=str
)  # fmt: skip
async def test_scripted_keeps_the_contract(check: contract.Check, params: dict[str, str]) -> None:
    await check(await started(**params))


async def test_it_is_found_by_its_name() -> None:
    assert engine_class("scripted") is ScriptedEngine


async def test_a_completion_is_answered_for_each_prompt() -> None:
    answer = await ask(await started(text="and so on"), Completion(prompt=["one", "two"], echo=True))
    assert answer.texts == {0: "oneand so on", 1: "twoand so on"}


@pytest.mark.parametrize(
    ("params", "words"),
    [
        ({"script": "/nowhere.json"}, "cannot be read"),
        ({"script": "{"}, "no script"),
        ({"script": '{"answer": []}'}, "unknown field `answer`"),
        ({"script": '{"rules": [{"pattern": "(", "answer": "x"}]}'}, "regular expression"),
        ({"script": '{"answers": [{"error": "nonsense"}]}'}, "no error code 'nonsense'"),
        ({"fail": "sometimes"}, "parameter fail"),
        ({"fail_code": "nonsense"}, "nonsense"),
        ({"chunks": "-1"}, "chunks"),
        ({"cut_after": "0"}, "cut_after"),
        ({"slots": "0"}, "slots"),
        ({"chunkz": "1"}, "no parameter chunkz"),
        ({"malform_as": "other"}, "malform_as"),
        ({"script": "{}", "replay": "x"}, "exclude"),
        ({"replay": "/nowhere.jsonl"}, "cannot be read"),
    ],
    ids=str,
)
async def test_a_wrong_parameter_is_named(params: dict[str, str], words: str) -> None:
    with pytest.raises(ConfigurationError, match=words):
        await started(**params)


async def test_parameters_win_over_the_script() -> None:
    script = json.dumps(
        {"answers": ["one two three", {"text": "second"}], "chunks": 1, "otherwise": "schema", "text": "after"}
    )
    engine = await started(script=script, chunks="0")
    answers = [await ask(engine, chat("hi")) for _ in range(3)]
    assert [answer.texts[0] for answer in answers] == ["one two three", "second", "after"]
    assert [output.text for output in answers[0].outputs] == ["one", " two", " three"]


async def test_an_engine_without_tools_or_formats_refuses_them() -> None:
    engine = await started(tools="false", json_schema="false")
    capabilities = engine.capabilities()
    assert (capabilities.tools, capabilities.json_schema, capabilities.json_object) == (False, False, False)
    with pytest.raises(UnsupportedField, match="tools"):
        await ask(engine, Chat(messages=[ChatMessage(role="user", content="x")], tools=TOOLS))
    with pytest.raises(UnsupportedField, match="response_format"):
        await ask(engine, Chat(messages=[ChatMessage(role="user", content="x")], response_format=FORMAT))


def deployment(model: str, **params: str) -> Deployment:
    return Deployment(name=model, model=model, engine="scripted", revision="1", engine_params=params)


async def test_on_the_bus_it_follows_its_script_and_is_recorded_and_replayed(cluster: Cluster, tmp_path: Path) -> None:
    script = tmp_path / "script.json"
    script.write_text(
        json.dumps({
            "rules": [
                {"pattern": "(?i)weather", "answer": "It rains in Köln."},
                {"pattern": "break", "answer": {"text": "so far", "error": "upstream_failed", "error_text": "the provider is down", "after_tokens": 1}},
            ],
            "otherwise": "schema", "chunks": 3,
        })
    )  # fmt: skip
    traffic = tmp_path / "traffic.jsonl"
    await cluster.declare(deployment("m", script=str(script)))
    cluster.start_worker(deployment("m", script=str(script)))
    await cluster.wait_ready("m", 1)

    async def asked(client: modelbus.ModelClient, m: str) -> list[Any]:
        """The same conversation with the same answers, whoever gives them."""
        said: list[Any] = [(await client.chat(m, "How is the weather?")).text]
        async with client.stream(m, "the Weather again") as stream:
            said.append([delta.text async for delta in stream])
        with pytest.raises(UpstreamFailed, match="the provider is down"):
            await client.chat(m, "break")
        book = json.loads((await client.chat(m, "a book", response_format=FORMAT)).text)
        jsonschema.validate(book, SCHEMA)
        messages: list[Any] = [{"role": "user", "content": "use them"}]
        for expected in ("first", "second"):
            (call,) = (await client.chat(m, messages, tools=TOOLS)).tool_calls
            assert (call.function.name, isinstance(json.loads(call.function.arguments)["n"], int)) == (expected, True)
            messages.append({"role": "assistant", "tool_calls": [msgspec.to_builtins(call)]})
            messages.append({"role": "tool", "tool_call_id": call.id, "content": "done"})
        last = await client.chat(m, messages, tools=TOOLS)
        assert (last.tool_calls, last.finish_reason) == ([], "stop")
        vectors = (await client.embed(m, ["a", "b"])).vectors
        ranking = await client.rerank(m, "cats", ["dogs", "cats"])
        return [*said, book, last.text, last.usage, vectors, ranking.documents[0].text]

    async with modelbus.connect(cluster.server.url) as client:
        assert client.capabilities("m").tools and client.capabilities("m").json_schema
        recorded = await asked(Recorder(client, traffic), "m")
        assert recorded[0] == "It rains in Köln." == "".join(recorded[1])
        assert len(recorded[1]) > 1

        # The model's name is part of what was asked: recordings serve under the name that they were made with.
        traffic.write_text(traffic.read_text().replace('{"model": "m"', '{"model": "again"'))
        replay = deployment("again", replay=str(traffic))
        await cluster.declare(replay)
        cluster.start_worker(replay)
        await cluster.wait_ready("again", 1)
        assert await asked(client, "again") == recorded
        with pytest.raises(NotRecorded, match="nobody asked this of 'again'.*the nearest of 9 .* differs in messages"):
            await client.chat("again", "What is new?")


async def test_a_script_that_has_nothing_more_to_say_fails_with_the_question() -> None:
    engine = await started(script='{"answers": ["only this"]}')
    await ask(engine, chat("one"))
    with pytest.raises(EngineFailed, match="1 answers, all given, and no rule for 'two'"):
        await ask(engine, chat("two"))
