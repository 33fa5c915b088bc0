"""Hooks around calls, prices, and the page that tells of them."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import modelbus
import msgspec
import pytest
from modelbus import hooks
from modelbus.errors import ConfigurationError, EngineFailed, InvalidRequest
from modelbus.hooks import (
    Call,
    ChatCall,
    ClassificationCall,
    DecisionCall,
    EmbeddingCall,
    Following,
    JobCall,
    ScoreCall,
)
from modelbus.prices import Meter, Price, PriceTable
from modelbus.testing import ScriptedAnswer, ScriptedModel
from modelbus_broker.messages import Usage
from modelbus_gateway.metrics import Metrics

from tests.helpers.cluster import Cluster
from tests.helpers.doc_blocks import DOCS, run_page


@pytest.fixture(autouse=True)
def no_hooks_left() -> Iterator[None]:
    yield
    hooks._hooks.clear()


async def test_hooks_are_laid_around_each_other_and_taken_off() -> None:
    model, said = ScriptedModel("one", "two", "three"), []

    async def outer(call: ChatCall, following: Following) -> modelbus.ChatAnswer:
        said.append("outer in")
        answer: modelbus.ChatAnswer = await following(call)
        said.append(f"outer out {answer.text}")
        return answer

    async def inner(call: ChatCall) -> None:
        said.append(f"inner {call.model} {call.task.messages[-1].text()}")

    remove_outer, remove_inner = hooks.add(outer), hooks.before(inner, ChatCall)
    assert (await model.chat("m", "hello")).text == "one"
    assert said == ["outer in", "inner m hello", "outer out one"]
    remove_outer()
    remove_outer()
    await model.chat("m", "again")
    assert said[3:] == ["inner m again"]
    remove_inner()
    await model.chat("m", "alone")
    assert len(said) == 4


async def test_a_hook_changes_the_question_answers_it_changes_the_answer_or_refuses() -> None:
    model = ScriptedModel("one", "two")
    remove = hooks.before(lambda call: msgspec.structs.replace(call, model="other"))
    assert (await model.chat("m", "hello")).model == "other"
    remove()

    answer = modelbus.ChatAnswer(id="", model="none", choices=[modelbus.ChoiceAnswer(text="made up")], usage=Usage())
    remove = hooks.before(lambda call: answer)
    assert (await model.chat("m", "hello")).text == "made up"
    assert len(model.requests) == 1
    remove()

    remove = hooks.after(lambda call, found: msgspec.structs.replace(found, model=f"{found.model}!"))
    assert (await model.chat("m", "hello")).model == "m!"
    remove()

    def refuse(call: ChatCall) -> None:
        raise InvalidRequest("not today")

    hooks.before(refuse, ChatCall)
    with pytest.raises(InvalidRequest, match="not today"):
        await model.chat("m", "hello")


async def test_a_stream_passes_through_hooks_before_it_is_asked_and_when_it_has_been_read() -> None:
    model, said = ScriptedModel("one two three", "four"), []
    hooks.before(lambda call: said.append(f"before {call.options.stream}"))
    remove = hooks.after(lambda call, answer: msgspec.structs.replace(answer, model=f"{answer.text}!"))

    async with model.stream("m", "hello") as stream:
        said += [delta.text async for delta in stream if delta.text]
    assert said[0] == "before True" and "".join(said[1:]) == stream.answer.text == "one two three"
    assert stream.answer.model == "one two three!"
    assert (await model.stream("m", "again").read()).model == "four!"
    remove()

    answer = modelbus.ChatAnswer(id="", model="none", choices=[modelbus.ChoiceAnswer(text="made up")], usage=Usage())
    remove = hooks.before(lambda call: answer, ChatCall)
    async with model.stream("m", "hello") as stream:
        assert [(delta.text, delta.finish_reason) async for delta in stream] == [("made up", "stop")]
    assert stream.answer == answer and len(model.requests) == 2
    remove()


async def test_a_stream_that_fails_is_left_or_refused_leaves_no_hook_behind() -> None:
    model = ScriptedModel(
        ScriptedAnswer(text="a b c", error="engine_failed", after_tokens=1), "one two", "three", chunks=3
    )
    ends: list[object] = []

    async def watch(call: ChatCall, following: Following) -> modelbus.ChatAnswer:
        try:
            answer: modelbus.ChatAnswer = await following(call)
        except BaseException as error:
            ends.append(type(error))
            raise
        with pytest.raises(InvalidRequest, match="asked twice"):
            await following(call)
        return answer

    remove = hooks.add(watch, ChatCall)
    with pytest.raises(EngineFailed):
        await model.stream("m", "fails").read()
    async with model.stream("m", "left early") as stream:
        await anext(stream)
    assert ends == [EngineFailed, asyncio.CancelledError]
    assert (await model.stream("m", "hello").read()).text == "three"
    remove()

    def refuse(call: ChatCall) -> None:
        raise InvalidRequest("not today")

    hooks.before(refuse, ChatCall)
    with pytest.raises(InvalidRequest, match="not today"):
        await model.stream("m", "hello").start()
    assert not [task for task in asyncio.all_tasks() if task.get_name().startswith("hooks")]


async def test_every_kind_of_call_is_seen_and_only_the_kinds_that_are_asked_for(cluster: Cluster) -> None:
    await cluster.deploy_echo("m")
    seen: list[tuple[type[Call], str]] = []
    hooks.after(lambda call, answer: seen.append((type(call), type(answer).__name__)))
    only: list[Call] = []
    hooks.before(only.append, JobCall, ScoreCall)

    async with modelbus.connect(cluster.server.url) as client:
        await client.chat("m", "one")
        await client.stream("m", "one").read()
        await client.embed("m", "one")
        best = (await client.rerank("m", "one", ["two", "one"], top_n=1)).documents
        await client.classify("m", "one")
        await client.decide("m", "one", "Is it?")
        assert (await (await client.submit("m", "one"))).text == "one"
        rows = await client.map("m", ["two", "three"])
        hooks._hooks.clear()
        hooks.add(_wrong, EmbeddingCall)
        with pytest.raises(InvalidRequest, match="a hook answered a EmbeddingCall with ChatAnswer"):
            await client.embed("m", "one")
        await client.chat("m", "one")

    assert len(best) == 1 and [row.get().text for row in rows] == ["two", "three"]
    assert seen[:7] == [
        (ChatCall, "ChatAnswer"), (ChatCall, "ChatAnswer"), (EmbeddingCall, "EmbeddingAnswer"), (ScoreCall, "Ranking"),
        (ClassificationCall, "ClassificationAnswer"), (DecisionCall, "Decision"), (JobCall, "JobRecord"),
    ]  # fmt: skip
    assert seen[7:] == [(JobCall, "JobRecord")] * 2
    assert [type(call) for call in only] == [ScoreCall, JobCall, JobCall, JobCall]
    assert sorted(call.index for call in only[2:] if isinstance(call, JobCall)) == [0, 1]


async def _wrong(call: EmbeddingCall, following: Following) -> modelbus.ChatAnswer:
    return modelbus.ChatAnswer(id="", model="", choices=[], usage=Usage())


def test_prices() -> None:
    table = PriceTable({"chat": Price(input=2, output=10, cached_input=0.5), "*": Price(input=1)})
    usage = Usage(prompt_tokens=1000, cached_tokens=400, completion_tokens=100)
    assert table.cost("chat", usage) == pytest.approx((600 * 2 + 400 * 0.5 + 100 * 10) / 1e6)
    assert table.cost("chat:adapter", usage) == table.cost("chat", usage)
    assert table.cost("other", usage) == pytest.approx(1000 / 1e6)
    assert PriceTable({}).cost("chat", usage) is None


@pytest.mark.parametrize("text", ["", "[]", '{"chat": {"inptu": 1}}', '{"chat": {"input": "much"}}', None])
def test_a_table_that_cannot_be_used_names_its_file(tmp_path: Path, text: str | None) -> None:
    path = tmp_path / "prices.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ConfigurationError, match=r"prices\.json"):
        PriceTable.read(path)


def test_the_gateway_counts_costs(tmp_path: Path) -> None:
    path = tmp_path / "prices.json"
    path.write_text('{"chat": {"input": 1000000, "output": 2000000, "currency": "EUR"}}')
    metrics = Metrics(lambda: 0, PriceTable.read(path))
    metrics.tokens("chat", Usage(prompt_tokens=3, completion_tokens=2))
    metrics.tokens("free", Usage(prompt_tokens=3))
    shown = metrics.exposition().decode()
    assert 'modelbus_gateway_cost_total{currency="EUR",model="chat"} 7.0' in shown
    assert 'modelbus_gateway_tokens_total{kind="prompt",model="free"} 3.0' in shown
    assert "free" not in "".join(line for line in shown.splitlines() if "cost" in line)


async def test_the_page_on_tracing_is_right_and_chat_oai_is_hooked_too(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    await cluster.deploy_echo("chat")
    monkeypatch.setenv("MODELBUS_ADDRESS", cluster.server.url)
    await asyncio.to_thread(run_page, DOCS / "tracing.md")
    meter = Meter()
    hooks.add(meter)

    def plain() -> str:
        try:
            return str(modelbus.LLM("chat").chat_oai("one two")[0].output)
        finally:
            modelbus.disconnect()

    assert await asyncio.to_thread(plain) == "one two"
    assert (meter.by_model["chat"].requests, meter.by_model["chat"].completion_tokens) == (1, 2)
