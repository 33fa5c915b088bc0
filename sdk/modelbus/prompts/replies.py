"""What a return annotation asks for: a whole answer, or one that comes piece by piece."""

from __future__ import annotations

import collections.abc
from typing import Any, Generic, Literal, TypeVar, get_args, get_origin

import msgspec
from modelbus_broker.errors import PromptError
from modelbus_broker.messages import ToolCall

from ..structure import Result

T = TypeVar("T")

#: How the answer reaches the caller: whole; or as pieces of text, items of a list or an object that grows, as they come.
Shape = Literal["whole", "text", "items", "partials"]

_ITERATORS = (collections.abc.Iterator, collections.abc.Iterable, collections.abc.Generator)
_ASYNC_ITERATORS = (
    collections.abc.AsyncIterator, collections.abc.AsyncIterable, collections.abc.AsyncGenerator,
)  # fmt: skip


class Partial(Generic[T]):
    """An object while it is being written; iterate a prompt function that returns ``Iterator[Partial[Story]]``.

    Attributes:
        data: what has come of it, as JSON values. Texts and lists grow, members are added, nothing is taken back.
        done: names of the members that are whole.
        value: the object itself, checked; ``None`` before the last one.
    """

    __slots__ = ("data", "done", "value")

    def __init__(self, data: Any, done: frozenset[str] = frozenset(), value: T | None = None) -> None:
        self.data = data
        self.done = done
        self.value = value

    def __repr__(self) -> str:
        return f"Partial({self.data!r}, done={sorted(self.done)}, value={self.value!r})"


class Reply(msgspec.Struct, frozen=True, kw_only=True):
    """What a return annotation asks for."""

    shape: Shape
    annotation: Any  #: of the whole answer, or of one item
    asynchronous: bool = False  #: an ``AsyncIterator``
    result: bool = False  #: it is a ``Result``: with usage, model and all that
    calls: Literal["", "one", "some"] = ""  #: it is the calls of tools that the model wants made


def reply_of(annotation: Any) -> Reply:
    """The reading of a return annotation.

    Raises:
        PromptError: there is none, or it is one that no answer can have.
    """
    origin, arguments = get_origin(annotation), get_args(annotation)
    if annotation in _ITERATORS + _ASYNC_ITERATORS:
        raise PromptError(f"say what it iterates over: {annotation.__name__}[str]")
    if origin in _ITERATORS + _ASYNC_ITERATORS:
        asynchronous = origin in _ASYNC_ITERATORS
        item = arguments[0]
        if item is str:
            return Reply(shape="text", annotation=str, asynchronous=asynchronous)
        if get_origin(item) is Partial:
            return Reply(shape="partials", annotation=get_args(item)[0], asynchronous=asynchronous)
        return Reply(shape="items", annotation=item, asynchronous=asynchronous)
    if annotation is Result or annotation is Partial:
        raise PromptError(f"say what is in it: {annotation.__name__}[str]")
    if origin is Result:
        return msgspec.structs.replace(reply_of(arguments[0]), result=True)
    if annotation is ToolCall or annotation == list[ToolCall]:
        return Reply(shape="whole", annotation=annotation, calls="one" if annotation is ToolCall else "some")
    if annotation is None or annotation is type(None):
        raise PromptError("a model always answers something: a prompt function cannot return None")
    return Reply(shape="whole", annotation=annotation)
