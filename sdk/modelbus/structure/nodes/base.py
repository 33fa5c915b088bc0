"""What every node has, and how it tells what is wrong with a value."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..partial import MISSING
from ..schemas import Schema


class Retry(ValueError):
    """Raised by a validator of the user: the model is told these words and asked again."""


class Reading:
    """One pass over a value: what is wrong with it so far."""

    def __init__(self, *, strict: bool = False) -> None:
        self.strict = strict  #: nothing is converted: a text is no number
        self.problems: list[str] = []

    def wrong(self, at: str, words: str) -> Any:
        """Notes a problem; returns MISSING."""
        self.problems.append(f"{at or 'the answer'}: {words}")
        return MISSING


class Definitions(dict[str, Schema]):
    """Schemas that are referred to by name, and the classes that they are of."""

    def __init__(self) -> None:
        super().__init__()
        self.owners: dict[str, type[Any]] = {}


class Node:
    """What one annotation means."""

    def schema(self, defs: Definitions) -> Schema:
        """Definitions that are referred to go to ``defs``."""
        raise NotImplementedError

    def read(self, data: Any, at: str, reading: Reading) -> Any:
        """The value, or MISSING when something is wrong with it."""
        raise NotImplementedError


def kind_of(data: Any) -> str:
    """How a value is called in an error."""
    match data:
        case None:
            return "null"
        case bool():
            return "true" if data else "false"
        case str():
            return f"the text {data if len(data) <= 60 else data[:57] + '...'!r}"
        case list():
            return "a list"
        case dict():
            return "an object"
    return repr(data)


def member(at: str, name: str) -> str:
    return f"{at}.{name}" if at else name


def checked(make: Callable[[], Any], at: str, reading: Reading) -> Any:
    """A value whose class, or whose validator, may say what is wrong with it."""
    try:
        return make()
    except (ValueError, TypeError, AssertionError) as error:
        return reading.wrong(at, str(error) or type(error).__name__)
