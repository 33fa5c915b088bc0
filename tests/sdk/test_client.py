"""The asyncio client against a real bus and real workers."""

from __future__ import annotations

import asyncio
import math
from typing import Any

import modelbus
import pytest
from modelbus.errors import BusUnavailable, InvalidRequest, ModelNotFound, ModelUnavailable
from modelbus.model_client import chat_task
from modelbus_broker.asking import CallOptions
from modelbus_broker.messages import Deployment
from modelbus_broker.topology import depths

from tests.helpers.cluster import Cluster


async def test_a_question_is_answered_with_usage(cluster: Cluster) -> None:
    await cluster.deploy_echo("chat")

    async with modelbus.connect(cluster.server.url) as client:
        answer = await client.chat("chat", "one two three", max_tokens=2)

    assert answer.text == "one two"
    assert (answer.finish_reason, answer.usage.completion_tokens) == ("length", 2)
    assert answer.model == "chat"


async def test_typed_messages_and_mappings_mean_the_same(cluster: Cluster) -> None:
    await cluster.deploy_echo("chat")
    client = await modelbus.connect(cluster.server.url)
    try:
        typed = await client.chat("chat", [modelbus.ChatMessage(role="user", content="Grüße 🚍")])
        plain = await client.chat("chat", [{"role": "user", "content": [{"type": "text", "text": "Grüße 🚍"}]}])
    finally:
        await client.close()

    assert typed.text == plain.text == "Grüße 🚍"


async def test_a_stream_gives_deltas_and_then_the_whole_answer(cluster: Cluster) -> None:
    await cluster.deploy_echo("chat", interval_ms="1")

    async with modelbus.connect(cluster.server.url) as client, client.stream("chat", "a b c d") as stream:
        deltas = [delta async for delta in stream]

        assert "".join(delta.text for delta in deltas) == "a b c d" == stream.answer.text
        assert len(deltas) > 1
        assert stream.usage.completion_tokens == 4
        assert deltas[-1].finish_reason == "stop"


async def until_idle(client: modelbus.Client, model: str) -> None:
    """Until no worker runs anything and no message of the model is left."""
    async with asyncio.timeout(20):
        while sum((await depths(client.bus)).values()) or (await client.stat(model)).busy_workers:
            await asyncio.sleep(0.1)


async def test_leaving_a_stream_early_cancels_the_request(cluster: Cluster) -> None:
    await cluster.deploy_echo("chat", interval_ms="50", tokens="5000")

    async with modelbus.connect(cluster.server.url) as client:
        async with client.stream("chat", "go on") as stream:
            async for _ in stream:
                break

        await until_idle(client, "chat")


async def test_cancelling_the_task_cancels_the_request(cluster: Cluster) -> None:
    await cluster.deploy_echo("chat", interval_ms="50", tokens="5000")

    async with modelbus.connect(cluster.server.url) as client:
        task = asyncio.create_task(client.chat("chat", "go on"))
        async with asyncio.timeout(20):
            while not (await client.stat("chat")).busy_workers:
                await asyncio.sleep(0.1)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

        await until_idle(client, "chat")


async def test_texts_become_vectors_in_their_order(cluster: Cluster) -> None:
    await cluster.deploy_echo("emb", dimensions="8")

    async with modelbus.connect(cluster.server.url) as client:
        both = await client.embed("emb", ["a", "b"])
        one = await client.embed("emb", "b")

    assert both.dimensions == 8
    assert both.vectors[1] == one.vectors[0] != both.vectors[0]
    assert math.isclose(sum(x * x for x in one.vectors[0]), 1.0, rel_tol=1e-4)


async def test_models_and_stat_tell_what_is_there(cluster: Cluster) -> None:
    await cluster.deploy_echo("chat", workers=2, slots="3")

    async with modelbus.connect(cluster.server.url) as client:
        await client.chat("chat", "hello")
        async with asyncio.timeout(20):
            while sum((await client.stat("chat")).total_requests) < 1:
                await asyncio.sleep(0.1)
        (info,) = await client.models()
        stat = await client.stat("chat")

    assert (info.model, info.engine, info.workers, info.wanted, info.slots) == ("chat", "echo", 2, 2, 6)
    assert (stat.total_workers, stat.worker_max_concurrency, stat.state) == (2, 3, [3, 3])
    assert sum(stat.total_requests) == 1


async def test_a_model_that_is_not_deployed_is_not_found(cluster: Cluster) -> None:
    async with modelbus.connect(cluster.server.url) as client:
        with pytest.raises(ModelNotFound):
            await client.chat("nobody", "hello")
        with pytest.raises(ModelNotFound):
            await client.stat("nobody")


async def test_a_model_without_a_live_worker_is_unavailable(cluster: Cluster) -> None:
    await cluster.declare(Deployment(name="chat", model="chat", engine="echo", revision="1"))

    async with modelbus.connect(cluster.server.url) as client:
        with pytest.raises(ModelUnavailable):
            await client.chat("chat", "hello")


async def test_without_a_bus_the_error_says_how_to_start_one() -> None:
    with pytest.raises(BusUnavailable, match="modelbus start --head"):
        await modelbus.connect()


async def test_no_text_to_embed_is_refused_here(cluster: Cluster) -> None:
    async with modelbus.connect(cluster.server.url) as client:
        with pytest.raises(InvalidRequest, match="no text"):
            await client.embed("emb", [])


def test_fields_find_their_place_in_the_task() -> None:
    task = chat_task("hi", {"temperature": 0, "stop": "x", "tools": [{"type": "function"}], "guided_json": {"a": 1}})

    assert (task.sampling.temperature, task.sampling.stop) == (0, ["x"])
    assert task.tools == [{"type": "function"}]
    assert task.extra == {"guided_json": {"a": 1}}


@pytest.mark.parametrize(
    ("messages", "fields", "param"),
    [
        ([], {}, "messages"),
        ([{"role": "nobody", "content": "x"}], {}, "messages[0].role"),
        ([{"content": "x"}], {}, "messages[0]"),
        ("x", {"temperature": "hot"}, "temperature"),
        ("x", {"max_tokens": 1.5}, "max_tokens"),
    ],
)
def test_what_has_the_wrong_type_is_refused_by_name(
    messages: list[dict[str, str]] | str, fields: dict[str, object], param: str
) -> None:
    with pytest.raises(InvalidRequest) as caught:
        chat_task(messages, fields)

    assert caught.value.param == param


def test_the_caller_s_messages_stay_as_they_are() -> None:
    messages = [{"role": "user", "content": "x"}]

    chat_task(messages, {})

    assert messages == [{"role": "user", "content": "x"}]


async def test_documents_are_ranked_and_texts_classified(cluster: Cluster) -> None:
    await cluster.deploy_echo("echo")
    documents = ["nothing here", "red and blue", "red"]

    async with modelbus.connect(cluster.server.url) as client:
        ranking = await client.rerank("echo", "red blue", documents, top_n=2)
        classes = await client.classify("echo", ["two words", "word " * 24])
        with pytest.raises(InvalidRequest, match="no document"):
            await client.rerank("echo", "red", [])
        with pytest.raises(InvalidRequest, match="top_n"):
            await client.rerank("echo", "red", documents, top_n=0)
        with pytest.raises(InvalidRequest, match="no text"):
            await client.classify("echo", [])

    assert [(found.index, found.score, found.text) for found in ranking.documents] == [
        (1, 1.0, "red and blue"), (2, 0.5, "red"),
    ]  # fmt: skip
    assert [found.label for found in classes.texts] == ["short", "long"]
    assert sum(classes.texts[0].probabilities.values()) == pytest.approx(1)


async def test_a_seed_is_an_integer_of_64_bits(cluster: Cluster) -> None:
    await cluster.deploy_echo()
    async with modelbus.connect(cluster.server.url) as client:
        for seed in (2**63, -(2**63) - 1, 2**70):
            with pytest.raises(InvalidRequest, match="64 bits") as refused:
                await client.chat("echo", "hi", seed=seed)
            assert refused.value.param == "seed"


@pytest.mark.parametrize(("options", "param"), [({"lane": "fast"}, "lane"), ({"budget_ms": -1}, "budget_ms")], ids=str)
async def test_an_option_that_makes_no_sense_is_refused_by_its_name(
    cluster: Cluster, options: dict[str, Any], param: str
) -> None:
    await cluster.deploy_echo("chat")
    async with modelbus.connect(cluster.server.url) as client:
        for ask in (client.chat, client.submit):
            with pytest.raises(InvalidRequest, match=param) as refused:
                await ask("chat", "hello", options=CallOptions(**options))
            assert refused.value.param == param
