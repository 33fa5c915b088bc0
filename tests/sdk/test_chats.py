"""Conversations: what they remember, what they send, and how they are kept."""

from __future__ import annotations

import asyncio
import json
from contextlib import aclosing
from pathlib import Path
from typing import Any

import modelbus
import pydantic
import pytest
from modelbus.chats import Chat, exchanges, fitted
from modelbus.errors import (
    ConfigurationError,
    Conflict,
    ContextLengthExceeded,
    InvalidRequest,
    PromptError,
    UpstreamFailed,
)
from modelbus.testing import ScriptedAnswer, ScriptedCall, ScriptedModel
from modelbus.tools import EndEvent, TextEvent
from modelbus_broker.messages import ChatMessage


def add(a: int, b: int) -> int:
    """Adds."""
    return a + b


def call(a: int, b: int) -> ScriptedAnswer:
    return ScriptedAnswer(tool_calls=[ScriptedCall(name="add", arguments={"a": a, "b": b})])


def sent(model: ScriptedModel) -> list[list[tuple[str, str]]]:
    return [[(message.role, message.text()) for message in asked.messages] for asked in model.requests]


async def test_a_conversation_remembers_what_was_said_and_called() -> None:
    model = ScriptedModel("Hello, Ann.", call(1, 2), "It is 3.", "Ann.")
    chat = Chat(model, model="m", system="Be kind.", tools=[add], temperature=0.5)

    first = await chat.aio_ask("I am Ann.")
    second = await chat.aio_ask("What is 1 + 2?", max_tokens=9)
    await chat.aio_ask({"role": "user", "content": [{"type": "text", "text": "Who am I?"}]})

    assert (first.answer, second.answer, second.values, chat.last and chat.last.answer) == (
        "Hello, Ann.",
        "It is 3.",
        [3],
        "Ann.",
    )
    assert [message.role for message in chat.messages] == [
        "user", "assistant", "user", "assistant", "tool", "assistant", "user", "assistant"
    ]  # fmt: skip
    assert sent(model)[1] == [
        ("system", "Be kind."),
        ("user", "I am Ann."),
        ("assistant", "Hello, Ann."),
        ("user", "What is 1 + 2?"),
    ]
    assert sent(model)[3][-1] == ("user", "Who am I?") and len(sent(model)[3]) == 8
    assert [(asked.chat.sampling.temperature, asked.chat.sampling.max_tokens) for asked in model.requests] == [
        (0.5, None), (0.5, 9), (0.5, 9), (0.5, None)
    ]  # fmt: skip
    assert chat.usage.completion_tokens > 6


def test_plain_programs_use_the_same_methods_without_await() -> None:
    chat = Chat(ScriptedModel("one", "two three four", chunks=0), model="m")

    assert chat.ask("x").answer == "one"
    assert list(chat.stream("y")) == ["two", " three", " four"]
    assert [message.text() for message in chat.messages] == ["x", "one", "y", "two three four"]


async def test_a_blocking_call_in_an_event_loop_is_refused() -> None:
    with pytest.raises(PromptError, match="event loop"):
        Chat(ScriptedModel("x"), model="m").ask("x")


async def test_streams_give_pieces_and_leave_a_whole_turn_behind() -> None:
    chat = Chat(ScriptedModel(call(2, 2), "that is four", "x", chunks=0), model="m", tools=[add])

    pieces = [piece async for piece in chat.aio_stream("2 + 2?")]
    events = [event async for event in chat.aio_events("more")]

    assert pieces == ["that", " is", " four"]
    assert len(chat.messages) == 6 and chat.messages[3].text() == "that is four"
    assert isinstance(events[0], TextEvent) and isinstance(events[-1], EndEvent)


async def test_an_answer_becomes_an_object() -> None:
    class Person(pydantic.BaseModel):
        name: str

    chat = Chat(ScriptedModel('{"name": "Ann"}', "just words", {"name": "Bob"}), model="m")

    assert (await chat.aio_ask("Who?", output=Person)).value == Person(name="Ann")
    assert (await chat.aio_ask("And?", output=Person)).value == Person(name="Bob")
    assert [message.text() for message in chat.messages] == ["Who?", '{"name": "Ann"}', "And?", "just words"]


async def test_a_turn_that_fails_or_is_left_leaves_no_trace() -> None:
    model = ScriptedModel("first", UpstreamFailed("down"), "a b c d", "again", chunks=0)
    chat = Chat(model, model="m")
    await chat.aio_ask("one")
    before = list(chat.messages)

    with pytest.raises(UpstreamFailed):
        await chat.aio_ask("two")
    assert chat.messages == before
    async with aclosing(chat.aio_stream("three")) as stream:
        async for _ in stream:
            break
    assert chat.messages == before
    with pytest.raises(InvalidRequest, match="assistant"):
        await chat.aio_ask(ChatMessage(role="assistant", content="x"))
    assert (await chat.aio_ask("four")).answer == "again"
    assert [message.text() for message in chat.messages] == ["one", "first", "four", "again"]


async def test_one_turn_at_a_time() -> None:
    chat = Chat(ScriptedModel("late", delay_ms=60_000), model="m")
    waiting = asyncio.create_task(chat.aio_ask("x"))
    await asyncio.sleep(0)

    with pytest.raises(Conflict, match="fork"):
        await chat.aio_ask("y")
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert chat.messages == []


async def test_forks_go_their_own_ways_and_the_last_exchange_can_be_taken_back() -> None:
    model = ScriptedModel(text="ok")
    chat = Chat(model, model="m", system="a", tools=[add])
    await chat.aio_ask("one")
    other = chat.fork(system="b", tools=[])

    await other.aio_ask("two")

    assert (len(chat.messages), len(other.messages), chat.system, other.system) == (4, 6, "a", "b")
    assert model.last.chat.tools is None
    assert [message.text() for message in other.undo()] == ["two", "ok"]
    assert len(other.undo()) == 4 and other.undo() == [] and other.messages == []
    assert len(chat.messages) == 4


async def test_a_conversation_is_saved_and_loaded(tmp_path: Path) -> None:
    path = tmp_path / "chat.json"
    chat = Chat(ScriptedModel(call(1, 1), "zwei ✓"), model="m", system="s", tools=[add])
    await chat.aio_ask("eins und eins?")
    chat.save(path)
    model = ScriptedModel("drei")

    loaded = Chat.load(path, model, model="m", tools=[add])
    await loaded.aio_ask("und noch eins?")

    assert loaded.messages[: len(chat.messages)] == chat.messages and loaded.system == "s"
    assert loaded.usage.prompt_tokens > chat.usage.prompt_tokens
    assert [role for role, _ in sent(model)[0]] == ["system", "user", "assistant", "tool", "assistant", "user"]
    assert json.loads(path.read_text())["messages"][0] == {"role": "user", "content": "eins und eins?"}
    assert [file.name for file in tmp_path.iterdir() if file.is_file()] == ["chat.json"]
    for text in ("{", '{"messages": [{"role": "nobody"}]}', '{"version": 2}', '{"tools": []}'):
        path.write_text(text)
        with pytest.raises(ConfigurationError):
            Chat.load(path, model, model="m")
    with pytest.raises(ConfigurationError, match="cannot be read"):
        Chat.load(tmp_path / "nothing", model, model="m")


def turn(role: Any, text: str) -> ChatMessage:
    return ChatMessage(role=role, content=text)


def test_whole_exchanges_are_left_out_the_oldest_first() -> None:
    said = [
        turn("system", "s"), turn("user", "1"), turn("assistant", "a"), turn("tool", "r"), turn("assistant", "b"), turn("user", "2"),
        turn("assistant", "c"), turn("user", "3"),
    ]  # fmt: skip
    one = lambda message: 1  # noqa: E731

    texts = {limit: "".join(message.text() for message in fitted(said, limit, one)) for limit in (0, 8, 7, 4, 3, 2)}

    assert texts == {0: "s1arb2c3", 8: "s1arb2c3", 7: "s2c3", 4: "s2c3", 3: "s3", 2: "s3"}
    assert [len(part) for part in exchanges(said)] == [1, 4, 2, 1]
    with pytest.raises(ContextLengthExceeded, match="have 2 tokens, and the conversation may have 1"):
        fitted(said, 1, one)
    assert fitted([], 5, one) == []


async def test_what_is_sent_fits_the_budget_and_what_is_kept_is_whole() -> None:
    model = ScriptedModel(text="fine")
    chat = Chat(model, model="m", system="s", history_tokens=40)

    for number in range(5):
        await chat.aio_ask(f"{number} " + "word " * 5)

    assert len(chat.messages) == 10
    assert [len(asked) for asked in sent(model)] == [2, 4, 4, 4, 4]
    assert sent(model)[-1][1][1].startswith("3 ")
    with pytest.raises(ContextLengthExceeded):
        await chat.aio_ask("word " * 50)
    assert len(chat.messages) == 10


def test_who_is_asked_must_be_said() -> None:
    with pytest.raises(ConfigurationError):
        Chat(ScriptedModel("x"))
    with pytest.raises(ConfigurationError):
        Chat("")
    assert "chat with m" in repr(Chat("m")) and modelbus.Chat is Chat
