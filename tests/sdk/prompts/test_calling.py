"""Prompt functions that ask the engine echo over a real bus."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import modelbus
import pytest
from modelbus.errors import ModelNotFound, PromptError, UnsupportedField
from modelbus.prompts.continuing import CONTINUE
from modelbus.testing import Recorder, ScriptedAnswer, ScriptedModel
from modelbus_broker.topology import depths


@modelbus.prompt(llm="chat")
def say(text: str) -> str:
    """{{ text }}"""


@modelbus.prompt(llm="chat")
async def say_async(text: str) -> str:
    """{{ text }}"""


@modelbus.prompt(llm="chat")
def pieces(text: str) -> Iterator[str]:
    """{{ text }}"""


@modelbus.prompt(llm="chat")
def pieces_async(text: str) -> AsyncIterator[str]:
    """{{ text }}"""


async def until_idle(client: modelbus.Client, model: str) -> None:
    async with asyncio.timeout(60):
        while sum((await depths(client.bus)).values()) or (await client.stat(model)).busy_workers:
            await asyncio.sleep(0.05)


def test_a_call_waits_for_the_answer_of_the_model_that_is_named(connected: None) -> None:
    assert say("one two") == "one two"
    assert say.with_llm(modelbus.LLM("chat"))("one") == "one"
    assert say.run("one") == "one", "byzerllm's name"
    with pytest.raises(ModelNotFound):
        say.with_llm("nobody")("one")


def test_a_result_tells_what_it_cost(connected: None) -> None:
    result = say.with_options(max_tokens=2).result("one two three")

    assert (result.value, result.raw, result.model, result.rung) == ("one two", "one two", "chat", "text")
    assert (result.usage.prompt_tokens, result.usage.completion_tokens) == (3, 2)
    assert (result.finish_reason, result.attempts) == ("length", 1)
    assert result.request_id


def test_a_function_may_return_its_result(connected: None) -> None:
    @modelbus.prompt(llm="chat")
    def both(text: str) -> modelbus.Result[str]:
        """{{ text }}"""

    assert both("one").value == "one"


async def test_a_def_has_aio_and_an_async_def_is_awaited(connected: None, client: modelbus.Client) -> None:
    # By name over the connection that the process shares, by client over this loop's own.
    assert await say.aio("a b") == "a b"
    assert await say_async("a b") == "a b"
    assert await say.with_llm(client, model="chat").aio("a b") == "a b"
    assert (await say_async.with_llm(client, model="chat").result("a b")).usage.completion_tokens == 2


def test_a_model_in_this_process_takes_the_place_of_one_on_the_bus() -> None:
    model = ScriptedModel("one", "two", chunks=2)

    assert say.with_llm(model)("x") == "one"
    assert "".join(pieces.with_llm(model)("x")) == "two"
    assert [asked.model for asked in model.requests] == ["chat", "chat"], "the name stays"


def test_a_model_that_only_answers_is_asked_to_go_on() -> None:
    model = ScriptedModel(ScriptedAnswer(text="one tw", finish_reason="length"), "o three")

    assert say.with_max_turns(2).with_llm(model)("x") == "one two three"
    assert [message.role for message in model.last.messages] == ["user", "assistant", "user"]
    assert model.last.messages[-1].text() == CONTINUE
    with pytest.raises(UnsupportedField, match="beginning"):
        say.with_return_prefix("one").with_llm(model)("x")


async def test_a_blocking_call_in_a_running_loop_is_an_error_and_no_deadlock(connected: None) -> None:
    with pytest.raises(PromptError, match=r"say was called while an event loop runs.*await \.\.\.\.aio"):
        say("x")
    with pytest.raises(PromptError, match="while an event loop runs"):
        next(pieces("x"))


async def test_a_client_serves_blocking_calls_from_other_threads(client: modelbus.Client, tmp_path: Path) -> None:
    mine = say.with_llm(client, model="chat")
    recorded = say.with_llm(Recorder(client, tmp_path / "traffic.jsonl"))

    assert await asyncio.to_thread(mine, "a b") == await asyncio.to_thread(recorded, "a b") == "a b"
    assert await asyncio.to_thread(lambda: list(pieces.with_llm(client, model="chat")("a b"))) == ["a b"]


async def test_a_client_whose_loop_has_ended_is_an_error(url: str) -> None:
    def elsewhere() -> None:
        client = asyncio.run(opened())
        with pytest.raises(PromptError, match="does not run"):
            say.with_llm(client, model="chat")("x")

    async def opened() -> modelbus.Client:
        async with modelbus.connect(url) as client:
            return client

    await asyncio.to_thread(elsewhere)


def test_an_iterator_gives_the_pieces_as_they_come(connected: None) -> None:
    stream = pieces.with_llm("slow").with_options(max_tokens=4)("one two three")
    with pytest.raises(PromptError, match="not been read to its end"):
        stream.result  # noqa: B018  # it is a property that raises

    said = list(stream)

    assert "".join(said) == "one two three one"
    assert len(said) > 1
    assert (stream.result.usage.completion_tokens, stream.result.finish_reason) == (4, "length")
    assert list(stream) == [], "it has ended"


async def test_an_asynchronous_iterator_gives_them_too(connected: None, client: modelbus.Client) -> None:
    assert [piece async for piece in pieces_async("a b")] == ["a b"]
    async with pieces.with_llm(client, model="slow").with_options(max_tokens=2).aio("a b c") as stream:
        assert "".join([piece async for piece in stream]) == "a b"

    @modelbus.prompt(llm="chat")
    async def later(text: str) -> AsyncIterator[str]:
        """{{ text }}"""

    assert [piece async for piece in await later("a")] == ["a"]


async def test_leaving_a_stream_early_takes_the_request_back(connected: None, client: modelbus.Client) -> None:
    async with pieces.with_llm(client, model="slow").aio("go") as stream:
        async for _ in stream:
            break
    await until_idle(client, "slow")

    def leave() -> None:
        with pieces.with_llm("slow")("go") as stream:
            next(stream)

    await asyncio.to_thread(leave)
    await until_idle(client, "slow")

    def drop() -> None:
        for _ in pieces.with_llm("slow")("go"):
            break

    gc.disable()  # it is gone when nobody holds it, not when the collector comes by
    try:
        await asyncio.to_thread(drop)
        await until_idle(client, "slow")
    finally:
        gc.enable()


async def test_an_error_ends_the_stream_it_belongs_to(connected: None) -> None:
    with pytest.raises(ModelNotFound):
        async for _ in pieces_async.with_llm("nobody")("x"):
            raise AssertionError


@pytest.mark.parametrize("max_turns", [1, 2, 10])
def test_a_text_that_was_cut_is_gone_on_with(connected: None, max_turns: int) -> None:
    words = [f"word{n}" for n in range(8)]
    mine = say.with_options(max_tokens=3).with_max_turns(max_turns)

    result = mine.result(" ".join(words))

    assert result.value == " ".join(words[: 3 * max_turns])
    assert result.attempts == min(max_turns, 3)
    assert result.finish_reason == ("stop" if max_turns == 10 else "length")
    assert result.usage.completion_tokens == min(8, 3 * max_turns)


def test_a_stream_goes_on_too(connected: None) -> None:
    assert "".join(pieces.with_options(max_tokens=2).with_max_turns(9)("a b c d e")) == "a b c d e"


def test_an_answer_begins_as_it_is_told(connected: None) -> None:
    assert say.with_return_prefix("one two")("one two three") == "one two three"
    assert "".join(pieces.with_return_prefix("one")("one two")) == "one two"
    with pytest.raises(PromptError, match="with_return_prefix"):
        say.with_return_type(int).with_return_prefix("1")("12")


def test_a_stop_list_ends_the_answer(connected: None) -> None:
    assert say.with_stop("three", "two")("one two three") == "one "


def test_parts_reach_the_engine(connected: None) -> None:
    @modelbus.prompt(llm="chat")
    def see(image: modelbus.Image) -> str:
        """Look: {{ image }}"""

    assert see(modelbus.Image(b"\x89PNG")) == "Look:  [image_url]"
