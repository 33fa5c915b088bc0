"""``@modelbus.prompt(...)``: a function with a docstring becomes a prompt function."""

from __future__ import annotations

import inspect
import sys
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar, overload

from modelbus_broker.errors import PromptError

from .base import Settings
from .declaration import Declaration
from .function import AsyncPromptFunction, AsyncStreamFunction, PromptFunction, StreamFunction
from .llm import Model

if TYPE_CHECKING:
    from ..tools import ToolLike, ToolSet

P = ParamSpec("P")
R = TypeVar("R")
T = TypeVar("T")


class Decorator:
    """What ``prompt(...)`` gives; it is put above one function."""

    def __init__(
        self, settings: Settings, tools: Sequence[Any], options: Mapping[str, Any], fields: Mapping[str, Any]
    ) -> None:
        self._settings, self._tools, self._options, self._fields = settings, tools, options, fields

    @overload
    def __call__(  # type: ignore[overload-overlap]  # the first that fits counts
        self, function: Callable[P, Coroutine[Any, Any, R]], /
    ) -> AsyncPromptFunction[P, R]: ...
    @overload
    def __call__(  # type: ignore[overload-overlap]  # the first that fits counts
        self, function: Callable[P, AsyncIterator[T]], /
    ) -> AsyncStreamFunction[P, T]: ...
    @overload
    def __call__(  # type: ignore[overload-overlap]  # the first that fits counts
        self, function: Callable[P, Iterator[T]], /
    ) -> StreamFunction[P, T]: ...
    @overload
    def __call__(self, function: Callable[P, R], /) -> PromptFunction[P, R]: ...
    def __call__(self, function: Callable[..., Any], /) -> Any:
        if not inspect.isfunction(function):
            raise PromptError("prompt functions are declared with @modelbus.prompt(llm='chat') above a `def`")
        scope = sys._getframe(1).f_locals if "<locals>" in function.__qualname__ else {}
        declaration = Declaration(function, scope)
        kind: type[Any] = AsyncPromptFunction if declaration.asynchronous else PromptFunction
        if declaration.asynchronous and declaration.iterates == "sync":
            raise PromptError(f"{declaration.name}: an `async def` returns an AsyncIterator and no Iterator")
        if not declaration.asynchronous and declaration.iterates:
            kind = StreamFunction if declaration.iterates == "sync" else AsyncStreamFunction
        made = kind(declaration, self._settings)
        made = made.with_tools(*self._tools) if self._tools else made
        return made.options(self._options).with_options(**self._fields)


def prompt(
    llm: Model | None = None,
    *,
    model: str = "",
    tools: Sequence[ToolLike | ToolSet] = (),
    options: Mapping[str, Any] | None = None,
    **fields: Any,
) -> Decorator:
    """Makes a prompt function: its docstring is the prompt, its return annotation decides what comes back.

    ::

        @modelbus.prompt(llm="chat", temperature=0)
        def capital(country: str) -> str:
            \"\"\"What is the capital of {{ country }}? Answer with its name alone.\"\"\"

        capital("France")

    Args:
        llm: a model's name, an ``LLM``, a client (with ``model=`` beside it), or for methods a function of ``self``
            that gives one of these. Without one the function has a prompt and no answer until ``with_llm``.
        model: a model's name, where ``llm`` is a client, or an ``LLM`` whose default it is not.
        tools: functions that the model may call before it answers, see ``Prompt.with_tools``.
        options: byzerllm's options, see ``Prompt.options``.
        fields: as of ``Prompt.with_options``: ``temperature``, ``max_tokens``, ``lane``, ...

    Raises:
        PromptError: the function has no docstring or no return annotation, or one of them cannot be read.
    """
    if inspect.isfunction(llm) and _is_prompt(llm):
        raise PromptError(f"write @modelbus.prompt() above {llm.__qualname__}, with parentheses")
    return Decorator(Settings(llm=llm, model=model), tools, options or {}, fields)


def _is_prompt(function: Callable[..., Any]) -> bool:
    """Whether this is rather a prompt function than one that gives a model, which has one parameter and no template."""
    return bool(function.__doc__) and (
        "{{" in str(function.__doc__) or len(inspect.signature(function).parameters) != 1
    )


def context(**values: Any) -> T:  # type: ignore[type-var]  # it is what the caller says to return
    """More names for the template, to be returned by the body of a prompt function.

    It is a mapping, and for type checkers whatever the function says to return.
    """
    return values  # type: ignore[return-value]
