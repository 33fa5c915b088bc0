"""What type checkers accept, and which types they see; see test_typing.py."""

from __future__ import annotations

import dataclasses
from collections.abc import AsyncIterator, Iterator
from typing import Literal, assert_type

import modelbus


@dataclasses.dataclass
class Story:
    """A story."""

    title: str


@modelbus.prompt(llm="chat")
def text(name: str, times: int = 1) -> str:
    """{{ name }}"""
    ...


@modelbus.prompt(llm="chat", temperature=0)
def story(about: str) -> Story:
    """{{ about }}"""
    return modelbus.context(day="Monday")


@modelbus.prompt(llm="chat")
def maybe(about: str) -> list[Story] | None:
    """{{ about }}"""
    ...


@modelbus.prompt(llm="chat")
def mood(said: str) -> Literal["good", "bad"]:
    """{{ said }}"""
    ...


@modelbus.prompt(llm="chat")
async def later(name: str) -> Story:
    """{{ name }}"""
    ...


@modelbus.prompt(llm="chat")
def pieces(name: str) -> Iterator[str]:
    """{{ name }}"""
    ...


@modelbus.prompt(llm="chat")
def pieces_later(name: str) -> AsyncIterator[str]:
    """{{ name }}"""
    ...


@modelbus.prompt(llm="chat")
def parts(name: str) -> Iterator[modelbus.Partial[Story]]:
    """{{ name }}"""
    ...


class Author:
    """Writes."""

    def __init__(self, llm: modelbus.LLM) -> None:
        self.llm = llm

    @modelbus.prompt(llm=lambda self: self.llm)
    def write(self, about: str) -> Story:
        """{{ about }}"""
        ...

    @modelbus.prompt(llm=lambda self: self.llm)
    async def write_later(self, about: str) -> Story:
        """{{ about }}"""
        ...

    @modelbus.prompt(llm=lambda self: self.llm)
    def pieces(self, about: str) -> Iterator[str]:
        """{{ about }}"""
        ...


@modelbus.tool
def add(a: int, b: int = 1, *, db: modelbus.Injected[dict[str, int]]) -> int:
    return a + b + db["x"]


@modelbus.tool(timeout_s=5, needs_approval=True)
async def fetch(url: str) -> bytes:
    return url.encode()


def plain() -> None:
    assert_type(add(1, db={"x": 1}), int)
    chat = modelbus.Chat("chat", tools=[add, fetch, plain, modelbus.ToolSet(add)], temperature=0)
    assert_type(chat.ask("Hello").answer, str)
    assert_type(list(chat.stream("Hello")), list[str])
    assert_type(modelbus.Team(modelbus.Agent("a", tools=[add]), llm="chat").run("x").answer, str)
    assert_type(text("Ann"), str)
    assert_type(text(name="Ann", times=2), str)
    assert_type(text.prompt("Ann"), str)
    assert_type(story("tea"), Story)
    assert_type(maybe("tea"), list[Story] | None)
    assert_type(mood("fine"), Literal["good", "bad"])
    assert_type(story.result("tea").value, Story)
    assert_type(story.with_options(temperature=1).with_llm("other")("tea"), Story)
    assert_type(text.with_return_type(int)("Ann"), int)
    assert_type(story.submit("tea").result(), Story)
    assert_type(story.map(["tea"])[0].get(), Story)
    assert_type(list(pieces("Ann")), list[str])
    for part in parts("Ann"):
        assert_type(part, modelbus.Partial[Story])
        assert_type(part.value, Story | None)
    author = Author(modelbus.LLM("chat"))
    assert_type(author.write("tea"), Story)
    assert_type(Author.write(author, "tea"), Story)
    assert_type(list(author.pieces("tea")), list[str])


async def asynchronous() -> None:
    assert_type(await fetch("a"), bytes)
    async with modelbus.connect() as client:
        assert_type((await modelbus.run_tools(client, "chat", "x", [add, plain])).answer, str)
    assert_type(await text.aio("Ann"), str)
    assert_type(await later("Ann"), Story)
    assert_type((await later.result("Ann")).value, Story)
    assert_type(await (await later.submit("Ann")), Story)
    assert_type((await later.map(["Ann"]))[0].get(), Story)
    assert_type([piece async for piece in pieces_later("Ann")], list[str])
    assert_type([piece async for piece in pieces.aio("Ann")], list[str])
    assert_type(await Author(modelbus.LLM("chat")).write_later("tea"), Story)
