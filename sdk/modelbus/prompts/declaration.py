"""What a prompt function declares: its parameters, its template, and what its return annotation asks for."""

from __future__ import annotations

import inspect
import re
import typing
from collections.abc import Callable, Coroutine, Mapping
from typing import Any, Literal, TypeVar

from modelbus_broker.errors import PromptError
from modelbus_broker.messages import ChatMessage

from .replies import Reply, reply_of
from .templates import Template, template_of

T = TypeVar("T")


class Declaration:
    """One function with a docstring, read."""

    def __init__(self, function: Callable[..., Any], scope: Mapping[str, Any]) -> None:
        """``scope``: the local names where it was written, for annotations that are texts.

        Raises:
            PromptError: it has no docstring or no return annotation, or one of them cannot be read.
        """
        self.function = function
        self.name = f"{function.__module__}.{function.__qualname__}"
        self.asynchronous = inspect.iscoroutinefunction(function)
        if not function.__doc__:
            raise PromptError(f"{self.name} has no docstring: it is the prompt (python -OO takes docstrings away)")
        if inspect.isgeneratorfunction(function) or inspect.isasyncgenfunction(function):
            raise PromptError(f"{self.name} yields: its body returns None or a mapping, its annotation says Iterator")
        self.template: Template = self._named(template_of, function.__doc__)
        self.signature = inspect.signature(function)
        parameters = self.signature.parameters.values()
        self._defaults = {one.name: one.default for one in parameters if one.default is not one.empty}
        variable = any(one.kind in (one.VAR_POSITIONAL, one.VAR_KEYWORD, one.POSITIONAL_ONLY) for one in parameters)
        #: Of the parameters, where no other way of binding is needed than to lay them side by side.
        self._names = None if variable else tuple(self.signature.parameters)
        self._reply: Reply | None = None
        try:
            self._reply = self._named(reply_of, self._annotation(scope))
        except NameError:
            pass  # it names what is defined later: read when it is first needed

    @property
    def reply(self) -> Reply:
        """What the return annotation asks for.

        Raises:
            PromptError: it names what there is not.
        """
        if self._reply is None:
            try:
                self._reply = self._named(reply_of, self._annotation({}))
            except NameError as error:
                raise PromptError(f"{self.name}: its return annotation cannot be read: {error}") from error
        return self._reply

    @property
    def iterates(self) -> Literal["", "sync", "async"]:
        """Whether it returns an iterator; known even while the annotation cannot be read."""
        if self._reply is None:
            text = str(self.function.__annotations__["return"])
            found = re.match(r"(?:[\w.]+\.)?(Async)?(?:Iterator|Iterable|Generator)\[", text)
            return "" if found is None else "async" if found[1] else "sync"
        return "" if self._reply.shape == "whole" else "async" if self._reply.asynchronous else "sync"

    def context(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], more: object) -> dict[str, Any]:
        """The names of the template: the arguments that the body was called with, and over them what it has returned.

        Raises:
            PromptError: the body has returned neither None nor a mapping.
        """
        if self._names is None:
            bound = self.signature.bind(*args, **kwargs)
            bound.apply_defaults()
            given = bound.arguments
        else:  # the body was called with them: they fit
            given = {**self._defaults, **dict(zip(self._names, args, strict=False)), **kwargs}
        if more is None:
            return given
        if isinstance(more, Mapping):
            return {**given, **more}
        raise PromptError(
            f"the body of {self.name} returned a {type(more).__name__}: it returns None, or a mapping of more names "
            "for the template; the answer comes from the model"
        )

    def messages(self, context: Mapping[str, Any]) -> list[ChatMessage]:
        """The rendered template.

        Raises:
            PromptError: see ``Template.messages``.
        """
        try:
            return self.template.messages(context)
        except PromptError as error:
            raise PromptError(f"{self.name}: {error.message}") from error.__cause__

    def body(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> object:
        """What the body returns, without awaiting: that of an ``async def`` must not need it.

        Raises:
            PromptError: it does.
        """
        returned = self.function(*args, **kwargs)
        if not self.asynchronous:
            return returned
        coroutine: Coroutine[Any, Any, object] = returned
        try:
            coroutine.send(None)
        except StopIteration as ended:
            return ended.value
        coroutine.close()
        raise PromptError(f"the body of {self.name} awaits something: render it with `await ....aio_render(...)`")

    def _annotation(self, scope: Mapping[str, Any]) -> Any:
        annotation = self.function.__annotations__.get("return", inspect.Signature.empty)
        if annotation is inspect.Signature.empty:
            raise PromptError(f"{self.name} has no return annotation, which says what the model gives: `-> str`")
        # Only this one is read: annotations of parameters may name what there is for type checkers alone.
        only = type("Only", (), {"__annotations__": {"return": annotation}, "__module__": self.function.__module__})
        known = getattr(self.function, "__globals__", {})
        return typing.get_type_hints(only, dict(known), dict(scope), include_extras=True)["return"]

    def _named(self, read: Callable[[Any], T], given: Any) -> T:
        try:
            return read(given)
        except PromptError as error:
            raise PromptError(f"{self.name}: {error.message}") from error.__cause__
