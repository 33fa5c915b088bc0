"""A text that comes in pieces becomes items: pieces of text, items of a list, an object that grows. Nothing is taken back."""

from __future__ import annotations

from typing import Any, Generic, TypeVar

import msgspec
from modelbus_broker.errors import OutputError

from ..structure import MISSING, Broken, OutputType, PartialJSON, Result
from .replies import Partial
from .templates import as_json

T = TypeVar("T")

#: What holds a list, or another value that is no object, where only objects may be asked for.
_WRAP = "value"


class Cut(Generic[T]):
    """Makes items of a text that comes in pieces."""

    def feed(self, piece: str) -> list[T]:
        """The items that this piece completes."""
        raise NotImplementedError

    def finish(self, result: Result[Any]) -> list[T]:
        """The items that only the end completes."""
        return []


class TextCut(Cut[str]):
    """The pieces as they are."""

    def feed(self, piece: str) -> list[str]:
        return [piece]


class _Begun:
    """The JSON value in a text that is still being written; what stands around it is passed over."""

    def __init__(self, output: OutputType[Any]) -> None:
        self._opening = "{" if output.schema.get("type") == "object" else "[{"
        self._wrapped = output.schema.get("type") != "object"
        self._before = ""
        self._json: PartialJSON | None = None
        self.lost = False  #: it is no JSON: only the end can tell what it is

    def feed(self, piece: str) -> Any:
        """The value so far, or MISSING."""
        if self.lost:
            return MISSING
        if self._json is None:
            self._before += piece
            at = self._start()
            if at < 0:
                return MISSING
            self._json, piece = PartialJSON(), self._before[at:]
        try:
            self._json.feed(piece)
        except Broken:
            self.lost = True
            return MISSING
        return self._value()

    @property
    def open(self) -> str | int | None:
        """The member or the item that is being written; None: all that has come is whole."""
        if self._json is None:
            return None
        path = self._json.path
        if self._inside():
            path = path[1:]
        return path[0] if path else None

    def _start(self) -> int:
        """Where the value begins; -1: not yet."""
        text = self._before.lstrip()
        after = 0
        if text.startswith("<think>"[: len(text)]):
            closed = self._before.find("</think>")
            if closed < 0:
                return -1
            after = closed
        found = [at for letter in self._opening if (at := self._before.find(letter, after)) >= 0]
        return min(found, default=-1)

    def _inside(self) -> bool:
        return self._wrapped and self._json is not None and isinstance(self._json.value, dict)

    def _value(self) -> Any:
        assert self._json is not None
        value = self._json.value
        return value.get(_WRAP, MISSING) if self._inside() else value


class ItemsCut(Cut[T]):
    """The items of a list, each as soon as it is whole, and checked.

    Raises:
        OutputError: an item is wrong, and others were given out before it.
    """

    def __init__(self, output: OutputType[list[T]]) -> None:
        item = output.item
        assert item is not None
        self._item: OutputType[T] = item
        self._begun = _Begun(output)
        self._given = 0

    def feed(self, piece: str) -> list[T]:
        value = self._begun.feed(piece)
        if not isinstance(value, list):
            return []
        open_at = self._begun.open
        whole = value[self._given : open_at if isinstance(open_at, int) else len(value)]
        try:
            items = [self._item.validate(data) for data in whole]
        except OutputError:
            if self._given:
                raise
            self._begun.lost = True  # it was not the list that is meant
            return []
        self._given += len(items)
        return items

    def finish(self, result: Result[Any]) -> list[T]:
        left: list[T] = result.value[self._given :]
        return left


class PartialsCut(Cut[Partial[T]]):
    """The object so far, after each piece that adds to it, and at last the object itself."""

    def __init__(self, output: OutputType[T]) -> None:
        self._begun = _Begun(output)
        self._last: Any = MISSING
        self._done: frozenset[str] = frozenset()

    def feed(self, piece: str) -> list[Partial[T]]:
        value = self._begun.feed(piece)
        if value is MISSING:
            return []
        done = frozenset(value) - {self._begun.open} if isinstance(value, dict) else frozenset()
        if value == self._last and done == self._done:  # blanks, or a name whose value has not begun
            return []
        self._last, self._done = _copied(value), done
        return [Partial(self._last, done)]

    def finish(self, result: Result[Any]) -> list[Partial[T]]:
        data = self._last if self._last is not MISSING else msgspec.json.decode(as_json(result.value))
        return [Partial(data, frozenset(data) if isinstance(data, dict) else frozenset(), result.value)]


def _copied(value: Any) -> Any:
    """A copy of JSON values: the parser writes on in its own."""
    if isinstance(value, dict):
        return {name: _copied(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_copied(item) for item in value]
    return value
