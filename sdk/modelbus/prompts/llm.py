"""Which model a prompt function asks, and over which connection: what ``llm=`` may be."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, NamedTuple, TypeVar

from modelbus_broker.errors import ConfigurationError, PromptError

from ..background import wait_for
from ..model_client import ModelClient
from ..shared import asked, background, shared_client
from ..sync import LLM

T = TypeVar("T")

#: A model's name; an ``LLM``; a client, with ``model=`` beside it; or a function of ``self`` that gives one of these.
Model = str | LLM | ModelClient | Callable[..., "str | LLM | ModelClient"]


class Target(NamedTuple):
    """Where a call goes."""

    client: ModelClient | None  #: None: the connection that the process shares
    model: str

    async def here(self) -> ModelClient:
        """The client for the event loop that runs now."""
        return self.client if self.client is not None else await shared_client()


def target_of(llm: Model | None, model: str, args: tuple[Any, ...]) -> Target | None:
    """What ``llm=`` and ``model=`` mean for a call with these arguments; None: nobody is named.

    Raises:
        PromptError: it is a function of self and there is no self, or it is something else altogether.
        ConfigurationError: a client, or an LLM without a default model, and no ``model=`` beside it.
    """
    if isinstance(llm, str):
        return Target(None, model or llm)
    if llm is None:
        return Target(None, model) if model else None
    if isinstance(llm, LLM):
        return Target(None, _named(model or llm.default_model_name))
    if isinstance(llm, ModelClient):
        return Target(llm, _named(model))
    if callable(llm):
        if not args:
            raise PromptError("llm= is a function of self, and this call has no self")
        given = llm(args[0])
        if given is None or not callable(given):
            return target_of(given, model, ())
    raise PromptError(f"llm= is a model's name, an LLM or a client, not a {type(llm).__name__}")


def name_of(llm: Model | None, model: str) -> str:
    """The model that ``llm=`` and ``model=`` name together; "" where only a call can tell."""
    if model or llm is None:
        return model
    return llm if isinstance(llm, str) else llm.default_model_name if isinstance(llm, LLM) else ""


class Waiter:
    """Waits for coroutines on the loop of a target's connection, from a thread without a running loop.

    Raises:
        PromptError: an event loop runs in this thread: it would stand still, and so would what it serves.
    """

    def __init__(self, target: Target, name: str) -> None:
        refuse_in_loop(name)
        self._name = name
        self.client: ModelClient = asked() if target.client is None else target.client
        # A client on the bus is bound to the loop that opened it; one in this process to none.
        self._loop: asyncio.AbstractEventLoop | None = getattr(self.client.publisher, "loop", None)
        if self._loop is not None and not self._loop.is_running():
            raise PromptError(
                f"{name}: the event loop of its client does not run; modelbus.LLM('...') has one of its own"
            )

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """The coroutine's result. Raises what it raises."""
        refuse_in_loop(self._name, coroutine)
        return background.run(coroutine) if self._loop is None else wait_for(self._loop, coroutine)


def refuse_in_loop(name: str, coroutine: Coroutine[Any, Any, Any] | None = None) -> None:
    """Raises in a thread whose event loop runs, where nobody may wait for the coroutine."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return
    if coroutine is not None:
        coroutine.close()
    raise PromptError(
        f"{name} was called while an event loop runs in this thread, which would stand still until the answer is "
        "there: write `await ....aio(...)`, or declare the function with `async def` (notebooks run an event loop too)"
    )


def _named(model: str) -> str:
    if not model:
        raise ConfigurationError("no model is named: prompt(llm=client, model='chat')")
    return model
