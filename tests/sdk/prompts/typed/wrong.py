"""What type checkers must refuse: every line that says so, and no other; see test_typing.py."""

from __future__ import annotations

from collections.abc import Iterator

import modelbus


@modelbus.prompt(llm="chat")
def text(name: str, times: int = 1) -> str:
    """{{ name }}"""
    ...


@modelbus.prompt(llm="chat")
async def later(name: str) -> str:
    """{{ name }}"""
    ...


@modelbus.prompt(llm="chat")
def pieces(name: str) -> Iterator[str]:
    """{{ name }}"""
    ...


class Author:
    """Writes."""

    @modelbus.prompt(llm="chat")
    def write(self, about: str) -> str:
        """{{ about }}"""
        ...


@modelbus.tool
def add(a: int, b: int = 1) -> int:
    return a + b


def plain() -> None:
    add()  # refused
    add("a")  # refused
    add(1).upper()  # refused
    modelbus.tool(3)  # refused
    modelbus.Chat("chat", tools=[3])  # refused
    modelbus.Chat("chat").ask(3)  # refused
    text()  # refused
    text(1)  # refused
    text("a", 2, 3)  # refused
    text("a", tines=2)  # refused
    text.prompt(1)  # refused
    number: int = text("a")  # refused
    Author().write(1)  # refused
    Author().write("a", "b")  # refused
    text.with_return_type(int)("a").upper()  # refused
    whole: str = pieces("a")  # refused
    modelbus.prompt(llm=3)  # refused
    text.submit(1)  # refused
    assert number or whole


async def asynchronous() -> None:
    later("a").upper()  # refused
    (await later("a")).nothing()  # refused
    async for _ in pieces("a"):  # refused
        pass
