"""The echo engine keeps its promises and its parameters do what they say."""

from __future__ import annotations

import asyncio
import math
import struct
import subprocess
import sys
from typing import Any

import pytest
from modelbus.testing import count_tokens, echo_answer, echo_logprob, echo_vector, pieces, token_id
from modelbus_broker.errors import ConfigurationError, EngineFailed, UpstreamFailed
from modelbus_broker.messages import Chat, ChatMessage, Completion, Embedding, ImagePart, ImageURL, Sampling, TextPart
from modelbus_workers.engines.base import EngineConfig, engine_class
from modelbus_workers.engines.echo import EchoEngine

from tests.workers.engines import contract
from tests.workers.engines.contract import ask, chat


async def started(**params: str) -> EchoEngine:
    engine = EchoEngine(EngineConfig(model="m", params=params))
    await engine.start()
    return engine


@pytest.mark.parametrize("check", contract.CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize(
    "params",
    [{}, {"interval_ms": "1"}, {"chunk": "2"}, {"tokens": "500"}, {"context_length": "1000"}, {"adapters": "true"}],
    ids=str,
)
async def test_echo_keeps_the_contract(check: contract.Check, params: dict[str, str]) -> None:
    await check(await started(**params))


async def test_it_is_found_by_its_name() -> None:
    assert engine_class("echo") is EchoEngine


async def test_it_says_what_the_last_user_said() -> None:
    messages = [ChatMessage(role="user", content="first"), ChatMessage(role="assistant", content="ok")]
    messages.append(ChatMessage(role="user", content="  keep  every\nblank \n"))
    answer = await ask(await started(), Chat(messages=messages))
    assert answer.texts == {0: "  keep  every\nblank \n"}
    assert answer.usage.prompt_tokens == 1 + 1 + 4


async def test_an_image_shows_in_the_answer() -> None:
    image = ImagePart(image_url=ImageURL(url="https://example.org/a.png"))
    message = ChatMessage(role="user", content=[TextPart(text="look"), image])
    answer = await ask(await started(), Chat(messages=[message]))
    assert answer.texts == {0: "look [image_url]"}


async def test_without_pace_the_whole_answer_is_one_output() -> None:
    answer = await ask(await started(), chat("one two three"))
    assert len(answer.outputs) == 1
    assert answer.outputs[0].token_ids == [token_id("one"), token_id(" two"), token_id(" three")]


async def test_with_an_interval_each_token_is_an_output() -> None:
    began = asyncio.get_running_loop().time()
    answer = await ask(await started(interval_ms="5", delay_ms="20"), chat("one two three"))
    assert [output.text for output in answer.outputs] == ["one", " two", " three"]
    assert asyncio.get_running_loop().time() - began >= 0.03


async def test_a_fixed_length_and_a_fixed_text_are_kept() -> None:
    answer = await ask(await started(tokens="5", text="a b"), chat("ignored"))
    assert answer.texts == {0: "a b a b a"}
    assert answer.usage.completion_tokens == 5


@pytest.mark.parametrize("stop", ["g w", " big wide", "wide world"])
async def test_a_stop_string_across_tokens_is_found(stop: str) -> None:
    text = "hello big wide world again"
    answer = await ask(await started(interval_ms="1"), chat(text, stop=[stop, "never"]))
    assert answer.texts[0] == text[: text.index(stop)]
    assert answer.reasons == {0: "stop"}


async def test_going_on_gives_the_rest_at_every_position() -> None:
    engine = await started(interval_ms="1")
    task = chat("one two three four five six", stop=["six"])
    whole = await ask(engine, task)
    for cut in range(len(whole.token_ids[0]) + 1):
        for emitted in (len("".join(pieces("one two three four five ")[:cut])), 0):
            rest = await ask(engine, task, output_token_ids=[whole.token_ids[0][:cut]], emitted_chars=[emitted])
            assert rest.texts.get(0, "") == whole.texts[0][emitted:]
            assert rest.token_ids.get(0, []) == whole.token_ids[0][cut:]
            said = cut == len(whole.token_ids[0]) and emitted > 0
            assert rest.reasons == ({} if said else whole.reasons), "what the client has is not said again"
            assert rest.usage == whole.usage


async def test_several_prompts_and_choices_are_numbered_as_the_api_does() -> None:
    task = Completion(prompt=["a b", [7, 8]], sampling=Sampling(n=2), echo=True)
    answer = await ask(await started(), task)
    assert answer.texts == {0: "a ba b", 1: "a ba b", 2: "7 87 8", 3: "7 87 8"}


async def test_vectors_are_unit_vectors_of_the_asked_size() -> None:
    answer = await ask(await started(), Embedding(input=["x", [1, 2]], dimensions=8))
    for vector in answer.vectors:
        assert math.isclose(sum(number**2 for number in struct.unpack("<8f", vector)), 1.0, abs_tol=1e-5)
    assert answer.vectors[0] == echo_vector("x", 8)


@pytest.mark.parametrize(
    ("fail", "outcomes"),
    [("never", "..."), ("always", "xxx"), ("first:2", "xx."), ("every:2", ".x.")],
)
async def test_failures_come_as_told_and_spare_the_self_test(fail: str, outcomes: str) -> None:
    engine = await started(fail=fail, fail_text="told so")
    await engine.self_test()
    seen = ""
    for _ in outcomes:
        try:
            await ask(engine, chat("one two"))
            seen += "."
        except EngineFailed as error:
            assert error.message == "told so"
            seen += "x"
    assert seen == outcomes


async def test_a_failure_can_come_after_some_tokens_and_with_any_code() -> None:
    engine = await started(fail="always", fail_after="2", fail_code="upstream_failed")
    texts = []
    with pytest.raises(UpstreamFailed) as caught:
        async for output in contract.outputs_of(engine, chat("one two three")):
            texts.append(getattr(output, "text", ""))
    assert "".join(texts) == "one two"
    assert caught.value.status == 502


async def test_a_hang_stands_still_and_counts_no_steps() -> None:
    engine = await started(hang_on="freeze")
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(ask(engine, chat("freeze now")), 0.3)
    assert engine.steps == 0
    assert (await ask(engine, chat("fine"))).texts == {0: "fine"}


def test_a_crash_ends_the_process() -> None:
    program = """
import asyncio
from modelbus_workers.engines.base import EngineConfig, Run
from modelbus_workers.engines.echo import EchoEngine
from modelbus_broker.messages import Chat, ChatMessage
async def main():
    engine = EchoEngine(EngineConfig(model="m", params={"crash_on": "boom", "fail_after": "1"}))
    async for output in engine.chat(Chat(messages=[ChatMessage(role="user", content="now boom")]), Run(id="r")):
        print(getattr(output, "text", ""), flush=True)
asyncio.run(main())
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.returncode == 86, done.stderr
    assert done.stdout.split() == ["now"]


async def test_a_start_can_be_told_to_fail() -> None:
    with pytest.raises(ConfigurationError, match="no luck today"):
        await started(start_error="no luck today")


@pytest.mark.parametrize(
    ("params", "words"),
    [
        ({"speed": "9"}, "no parameter speed; known are: adapters, block_on, chunk, context_length"),
        ({"tokens": "many"}, "parameter tokens .* Expected `int`"),
        ({"fail": "sometimes"}, "never, always, first:N or every:N"),
        ({"fail_code": "bad_luck"}, "no error code 'bad_luck'"),
        ({"delay_ms": "-1"}, "delay_ms must not be negative"),
        ({"slots": "0"}, "slots must be at least 1"),
    ],
)
def test_bad_parameters_are_named(params: dict[str, str], words: str) -> None:
    with pytest.raises(ConfigurationError, match=words):
        EchoEngine(EngineConfig(model="m", params=params))


@pytest.mark.parametrize("text", ["", " ", "a", " a", "a ", "a\n b", "a  b", "你好 世界", "a\x1cb", "é à", "one two"])
def test_counting_agrees_with_cutting(text: str) -> None:
    assert count_tokens(text) == len(pieces(text))
    assert "".join(pieces(text)) == text


@pytest.mark.parametrize(
    ("sampling", "text", "reason", "count"),
    [
        ({"max_tokens": 2}, "a b", "length", 2),
        ({"max_tokens": 3}, "a b c", "stop", 3),
        ({"max_tokens": 0}, "", "length", 0),
        ({"max_tokens": 5, "ignore_eos": True}, "a b c a b", "length", 5),
        ({"min_tokens": 4}, "a b c a", "stop", 4),
        ({"stop_token_ids": [token_id(" b")]}, "a", "stop", 2),
        ({"stop": ["a"], "min_tokens": 2}, "a b c", "stop", 3),
        ({"stop": ["c", "b c"]}, "a ", "stop", 3),
    ],
)
def test_sampling_limits_are_kept(sampling: dict[str, Any], text: str, reason: str, count: int) -> None:
    answer = echo_answer("a b c", Sampling(**sampling))
    assert (answer.text, answer.finish_reason, len(answer.pieces)) == (text, reason, count)


def test_made_up_probabilities_add_up_to_one_at_most() -> None:
    for piece in ("a", "word", "你"):
        logprob = echo_logprob(piece, 20)
        assert len(logprob.top) == 20
        assert sum(math.exp(top.logprob) for top in logprob.top) <= 1.0 + 1e-9
