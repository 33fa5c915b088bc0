"""Prompt functions: what ``@modelbus.prompt(...)`` makes of a function."""

from __future__ import annotations

from typing import Any, Concatenate, Generic, ParamSpec, Self, TypeVar, cast, overload

from modelbus_broker.errors import PromptError

from ..model_client import ModelClient
from ..structure import Result
from .base import Prompt
from .llm import Waiter
from .replies import Reply, reply_of
from .running import RenderedCall
from .streaming import AsyncStream, Stream
from .submitting import AsyncSubmitting, Submitting

P = ParamSpec("P")
Q = ParamSpec("Q")
R = TypeVar("R")
T = TypeVar("T")


class PromptFunction(Submitting[P, R]):
    """Of a ``def``: a call waits for the answer."""

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        """Asks the model. A function that returns a text and names no model gives its prompt, as byzerllm's do.

        Raises:
            PromptError: the template cannot be rendered; or an event loop runs here: use ``aio``.
            OutputError: the model's answer has not the form that the annotation asks for.
            ModelBusError: what asking raises.
        """
        settings, reply = self._settings, self._reply
        if settings.llm is None and not settings.model and reply.annotation is str:
            return cast("R", self.prompt(*args, **kwargs))
        result = self._wait(args, kwargs)
        return cast("R", result if reply.result else result.value)

    run = __call__  #: byzerllm's name for it

    async def aio(self, *args: P.args, **kwargs: P.kwargs) -> R:
        """The same for a caller with an event loop."""
        value: R = await self._value(args, kwargs)
        return value

    def result(self, *args: P.args, **kwargs: P.kwargs) -> Result[R]:
        """The answer with its usage, the model, the rung that gave it its form, and more."""
        return self._wait(args, kwargs)

    async def aio_result(self, *args: P.args, **kwargs: P.kwargs) -> Result[R]:
        """The same for a caller with an event loop."""
        return await self._answer(args, kwargs)

    @overload
    def with_return_type(self, annotation: type[T]) -> PromptFunction[P, T]: ...
    @overload
    def with_return_type(self, annotation: Any) -> PromptFunction[P, Any]: ...
    def with_return_type(self, annotation: Any) -> PromptFunction[P, Any]:
        """Gives something else than the return annotation says; no iterator."""
        return self._with(reply=_whole(annotation))

    @overload
    def __get__(self, owner: None, cls: type[Any], /) -> Self: ...
    @overload
    def __get__(
        self: PromptFunction[Concatenate[Any, Q], R], owner: object, cls: type[Any] | None = None, /
    ) -> PromptFunction[Q, R]: ...
    def __get__(self, owner: Any, cls: type[Any] | None = None, /) -> Any:
        return self if owner is None else self._bound(owner)


class AsyncPromptFunction(AsyncSubmitting[P, R]):
    """Of an ``async def``: a call is awaited."""

    async def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        """Asks the model; see ``PromptFunction``."""
        value: R = await self._value(args, kwargs)
        return value

    run = aio = __call__

    async def result(self, *args: P.args, **kwargs: P.kwargs) -> Result[R]:
        """See ``PromptFunction.result``."""
        return await self._answer(args, kwargs)

    aio_result = result

    @overload
    def with_return_type(self, annotation: type[T]) -> AsyncPromptFunction[P, T]: ...
    @overload
    def with_return_type(self, annotation: Any) -> AsyncPromptFunction[P, Any]: ...
    def with_return_type(self, annotation: Any) -> AsyncPromptFunction[P, Any]:
        """Gives something else than the return annotation says; no iterator."""
        return self._with(reply=_whole(annotation))

    @overload
    def __get__(self, owner: None, cls: type[Any], /) -> Self: ...
    @overload
    def __get__(
        self: AsyncPromptFunction[Concatenate[Any, Q], R], owner: object, cls: type[Any] | None = None, /
    ) -> AsyncPromptFunction[Q, R]: ...
    def __get__(self, owner: Any, cls: type[Any] | None = None, /) -> Any:
        return self if owner is None else self._bound(owner)


class StreamFunction(Prompt[P], Generic[P, T]):
    """Of a ``def`` that returns an ``Iterator``: a call gives a stream that is read while the model writes."""

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> Stream[T]:
        """Renders the prompt; the model is asked when the stream is read."""
        target = self._target(args)
        waiter = Waiter(target, self._declaration.name)
        call = self._rendered(target, self._messages(args, kwargs, self._declaration.body(self._owner + args, kwargs)))

        async def start() -> tuple[RenderedCall, ModelClient]:
            return call, waiter.client

        return Stream(AsyncStream(start, self._cut()), waiter.run)

    run = __call__

    def aio(self, *args: P.args, **kwargs: P.kwargs) -> AsyncStream[T]:
        """The same for a caller with an event loop."""
        return self._stream(args, kwargs)

    @overload
    def __get__(self, owner: None, cls: type[Any], /) -> Self: ...
    @overload
    def __get__(
        self: StreamFunction[Concatenate[Any, Q], T], owner: object, cls: type[Any] | None = None, /
    ) -> StreamFunction[Q, T]: ...
    def __get__(self, owner: Any, cls: type[Any] | None = None, /) -> Any:
        return self if owner is None else self._bound(owner)


class AsyncStreamFunction(Prompt[P], Generic[P, T]):
    """Of a ``def`` that returns an ``AsyncIterator``."""

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> AsyncStream[T]:
        """The model is asked when the stream is read."""
        return self._stream(args, kwargs)

    run = aio = __call__

    @overload
    def __get__(self, owner: None, cls: type[Any], /) -> Self: ...
    @overload
    def __get__(
        self: AsyncStreamFunction[Concatenate[Any, Q], T], owner: object, cls: type[Any] | None = None, /
    ) -> AsyncStreamFunction[Q, T]: ...
    def __get__(self, owner: Any, cls: type[Any] | None = None, /) -> Any:
        return self if owner is None else self._bound(owner)


def _whole(annotation: Any) -> Reply:
    reply = reply_of(annotation)
    if reply.shape != "whole":
        raise PromptError("with_return_type takes no iterator: declare a function that returns one")
    return reply
