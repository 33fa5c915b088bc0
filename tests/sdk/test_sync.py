"""The blocking face, called from ordinary threads against a real bus."""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections.abc import Iterator
from typing import Any

import modelbus
import pytest
from modelbus.background import BackgroundLoop
from modelbus.errors import ConfigurationError, InvalidRequest, ModelNotFound, OutputError
from modelbus.llm_config import request_fields
from modelbus.testing import ScriptedAnswer, ScriptedCall, ScriptedModel, stand_in

from tests.helpers.cluster import Cluster

#: What the seed's metadata had.
METADATA = {
    "request_id", "input_tokens_count", "generated_tokens_count", "time_cost", "first_token_time", "speed", "prob",
    "finish_reason", "reasoning_content",
}  # fmt: skip


@pytest.fixture(autouse=True)
def no_connection_left() -> Iterator[None]:
    yield
    modelbus.disconnect()


async def test_a_conversation_is_answered_in_the_seed_s_shape(cluster: Cluster) -> None:
    await cluster.deploy_echo("chat")

    def ask() -> list[modelbus.LLMResponse]:
        modelbus.connect_cluster(cluster.server.url)
        return modelbus.LLM("chat").chat_oai([{"role": "user", "content": "one two three"}])

    (answer,) = await asyncio.to_thread(ask)

    assert (answer.output, answer.input) == ("one two three", "one two three")
    assert set(answer.metadata) == METADATA
    assert answer.metadata["generated_tokens_count"] == 3
    assert answer.metadata["finish_reason"] == "stop"
    assert 0 < answer.metadata["first_token_time"] <= answer.metadata["time_cost"]


async def test_a_stream_repeats_the_whole_text_or_gives_increments(cluster: Cluster) -> None:
    await cluster.deploy_echo("chat", interval_ms="1")

    def ask(delta_mode: bool) -> list[tuple[str, modelbus.SingleOutputMeta]]:
        modelbus.connect_cluster(cluster.server.url)
        llm = modelbus.ByzerLLM.from_default_model("chat")
        return list(llm.stream_chat_oai("a b c", delta_mode=delta_mode))

    whole = await asyncio.to_thread(ask, False)
    increments = await asyncio.to_thread(ask, True)

    assert whole[-1][0] == "a b c" == "".join(text for text, _ in increments)
    assert all(later.startswith(earlier) for (earlier, _), (later, _) in zip(whole, whole[1:], strict=False))
    assert whole[-1][1].generated_tokens_count == 3 == increments[-1][1].generated_tokens_count
    assert whole[-1][1].finish_reason == "stop"


async def test_closing_a_stream_early_cancels_the_request(cluster: Cluster) -> None:
    await cluster.deploy_echo("chat", interval_ms="50", tokens="5000")

    def ask() -> bool:
        modelbus.connect_cluster(cluster.server.url)
        llm = modelbus.LLM("chat")
        for _ in llm.stream_chat_oai("go on"):
            break
        end = time.monotonic() + 20
        while llm.stat().busy_workers and time.monotonic() < end:
            time.sleep(0.1)
        return llm.stat().busy_workers == 0

    assert await asyncio.to_thread(ask)


async def test_texts_and_requests_become_one_vector_each(cluster: Cluster) -> None:
    await cluster.deploy_echo("emb", dimensions="4")

    def ask() -> list[modelbus.LLMResponse]:
        modelbus.connect_cluster(cluster.server.url)
        llm = modelbus.LLM().setup_default_emb_model_name("emb")
        return llm.emb(None, [modelbus.LLMRequest(instruction=["a", "b"]), "c"]) + llm.emb_query("a")

    answers = await asyncio.to_thread(ask)

    assert [answer.input for answer in answers] == ["a", "b", "c", "a"]
    assert [len(answer.output) for answer in answers] == [4, 4, 4, 4]
    assert answers[0].output == answers[3].output


async def test_pairs_are_scored_each_by_its_own_query_the_best_first(cluster: Cluster) -> None:
    await cluster.deploy_echo("rank")
    pairs = [("red blue", "nothing"), ("green", "green"), ("red blue", "red")]

    def ask() -> tuple[Any, Any]:
        modelbus.connect_cluster(cluster.server.url)
        llm = modelbus.LLM().setup_default_re_rank_model_name("rank")
        with pytest.raises(InvalidRequest, match="no pair"):
            llm.emb_rerank()
        return llm.emb_rerank(sentence_pairs=pairs), modelbus.LLM().emb_rerank("rank", pairs[2])

    several, one = await asyncio.to_thread(ask)

    assert several == [(pairs[1], 1.0), (pairs[2], 0.5), (pairs[0], 0.0)]
    assert one == (pairs[2], 0.5)


@dataclasses.dataclass
class Story:
    """A story."""

    title: str
    pages: int


def add(a: int, b: int) -> int:
    """Adds."""
    return a + b


def fail(reason: str) -> str:
    """Fails."""
    raise LookupError(reason)


def test_answers_become_objects_and_calls_of_functions() -> None:
    call = ScriptedAnswer(tool_calls=[ScriptedCall(name="add", arguments={"a": 1, "b": 2})])
    wrong = ScriptedAnswer(tool_calls=[ScriptedCall(name="fail", arguments={"reason": "gone"})])
    model = ScriptedModel('{"title": "T", "pages": 3}', call, call, wrong, "no need", "none")
    llm = modelbus.LLM("chat")

    with stand_in(model):
        (story,) = llm.chat_oai("a story", response_class=Story, llm_config={"max_length": 50})
        assert story.value == Story("T", 3)
        assert (story.response.output, story.metadata["rung"]) == ('{"title": "T", "pages": 3}', "native")
        assert model.last.chat.sampling.max_tokens == 50
        assert METADATA < set(story.metadata)

        (called,) = llm.chat_oai("1 + 2?", tools=[add, fail], tool_choice=add, execute_tool=True)
        assert (called.values, called.calls[0].function.name) == ([3], "add")
        (wanted,) = llm.chat_oai("1 + 2?", tools=[add])
        assert (wanted.values, len(wanted.calls)) == ([], 1)
        with pytest.raises(LookupError, match="gone"):
            llm.chat_oai("fail", tools=[add, fail], execute_tool=True)
        (answered,) = llm.chat_oai("hello", tools=[add], execute_tool=True)
        assert (answered.values, answered.response.output) == ([], "no need")
        with pytest.raises(InvalidRequest, match="not both"):
            llm.chat_oai("x", response_class=Story, tools=[add])  # type: ignore[call-overload]
    with stand_in(ScriptedModel("no", "no", "no")), pytest.raises(OutputError):
        llm.chat_oai("a story", response_class=Story)


async def test_it_works_in_a_thread_whose_own_loop_runs(cluster: Cluster) -> None:
    await cluster.deploy_echo("chat")
    modelbus.connect_cluster(cluster.server.url)

    # Blocks this loop, as in a notebook, and does not deadlock: the answer comes over another thread.
    assert modelbus.LLM("chat").chat_oai("hi")[0].output == "hi"


async def test_the_prompt_alone_is_given_without_asking(cluster: Cluster) -> None:
    (answer,) = modelbus.LLM("nobody").chat_oai("hi", only_return_prompt=True)

    assert (answer.output, answer.input) == ("", "hi")


async def test_errors_are_those_of_the_asyncio_client(cluster: Cluster) -> None:
    modelbus.connect_cluster(cluster.server.url)

    with pytest.raises(ModelNotFound):
        modelbus.LLM("nobody").chat_oai("hi")
    with pytest.raises(ModelNotFound):
        list(modelbus.LLM("nobody").stream_chat_oai("hi"))


def test_a_call_without_any_model_says_where_to_name_one() -> None:
    with pytest.raises(ConfigurationError, match="setup_default_model_name"):
        modelbus.LLM().chat_oai("hi")


def test_the_seed_s_names_of_fields_are_translated() -> None:
    config = {"max_length": 10, "gen.temperature": 0.1, "generation.top_p": 0.5, "stopping_sequences": ["x"]}

    assert request_fields(config) == {"max_tokens": 10, "temperature": 0.1, "top_p": 0.5, "stop": ["x"]}


def test_a_field_that_is_given_twice_and_differs_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="max_tokens twice"):
        request_fields({"max_length": 10, "gen.max_tokens": 11})


def test_a_blocking_call_on_the_background_loop_itself_is_an_error_and_no_deadlock() -> None:
    loop = BackgroundLoop()

    async def inner() -> None:
        return None

    async def outer() -> None:
        loop.run(inner())

    try:
        with pytest.raises(RuntimeError, match="own event loop"):
            loop.run(outer())
    finally:
        loop.stop()
