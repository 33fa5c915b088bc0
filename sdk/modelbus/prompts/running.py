"""One way through which every call of a prompt function goes, with whatever is laid around it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Coroutine, Mapping
from typing import Any, Literal

import msgspec
from modelbus_broker.asking import CallOptions
from modelbus_broker.errors import PromptError
from modelbus_broker.messages import ChatMessage, Ladder

from ..decisions.decision import asked
from ..decisions.output import DecisionType
from ..model_client import ModelClient
from ..structure import OutputType, Result, answer
from .caching import Caching
from .continuing import answer_text
from .objects import answer_as_it_comes
from .tooling import answer_with_tools

Emit = Callable[[str], None]


class ToolUse(msgspec.Struct, frozen=True, kw_only=True):
    """Functions that the model may call, and how; see :func:`modelbus.tools.run_tools`."""

    tools: tuple[Any, ...] = ()  #: functions, tools and tool sets
    only_calls: Literal["", "one", "some"] = ""  #: the answer is the calls themselves, and none is made
    limits: Mapping[str, Any] = {}  #: ``max_rounds``, ``parallel``, ``approve``, ``inject``, ``choice`` ...


class RenderedCall(msgspec.Struct, frozen=True, kw_only=True):
    """What one call asks, before any model is asked."""

    name: str  #: of the prompt function, with its module
    model: str
    messages: list[ChatMessage]
    output: OutputType[Any]
    sampling: Mapping[str, Any] = {}  #: fields of ``Sampling`` and of ``Chat``, as ``Client.chat`` takes them
    options: CallOptions = CallOptions()
    ladder: Ladder = Ladder()
    tools: ToolUse | None = None
    prefix: str = ""  #: how the answer begins
    max_turns: int = 1  #: a text that was cut by length is gone on with until so many requests have been made
    version: str = ""  #: of the prompt function
    caching: Caching | None = None  #: answers that were given before may do


Answering = Coroutine[Any, Any, Result[Any]]
Next = Callable[[RenderedCall], Awaitable[Result[Any]]]
Middleware = Callable[[RenderedCall, Next], Awaitable[Result[Any]]]

#: Laid around every call, the first one outermost. Each may change the call, answer it itself, or look at the result.
middleware: list[Middleware] = []


def run(call: RenderedCall, client: ModelClient, emit: Emit | None = None) -> Answering:
    """The answer to a call, to be awaited. What gives it is chosen at once, so that no coroutine waits for another one that
    does nothing more.

    Args:
        emit: is given the pieces of the text as they come.

    Raises:
        ModelBusError: one of its subclasses, see ``modelbus.errors``.
    """
    return _through_middleware(call, client, emit) if middleware else _ask(call, client, emit)


async def _through_middleware(call: RenderedCall, client: ModelClient, emit: Emit | None) -> Result[Any]:
    async def ask(call: RenderedCall) -> Result[Any]:
        return await _ask(call, client, emit)

    following: Next = ask
    for one in reversed(middleware):
        following = _around(one, following)
    return await following(call)


def _around(one: Middleware, following: Next) -> Next:
    async def step(call: RenderedCall) -> Result[Any]:
        return await one(call, following)

    return step


def _ask(call: RenderedCall, client: ModelClient, emit: Emit | None) -> Answering:
    if call.caching is not None:
        return call.caching.answer(call, client, emit, lambda: _answer(call, client, emit))
    return _answer(call, client, emit)


def _answer(call: RenderedCall, client: ModelClient, emit: Emit | None) -> Answering:
    if call.tools is not None:
        return answer_with_tools(call, call.tools, client, emit)
    if call.output.kind == "text":
        return answer_text(call, client, emit)
    if isinstance(call.output, DecisionType):
        return _decided(call, call.output, client)
    if call.prefix or call.max_turns > 1:
        raise PromptError(
            f"{call.name}: only a text can be given its beginning (with_return_prefix) or be gone on with (with_max_turns)"
        )
    if emit is not None:
        return answer_as_it_comes(call, client, emit)
    return answer(
        client, call.model, call.messages, call.output,
        sampling=call.sampling, options=call.options, ladder=call.ladder,
    )  # fmt: skip


async def _decided(call: RenderedCall, output: DecisionType, client: ModelClient) -> Result[Any]:
    messages = asked(call.messages, "", output.labels)
    decision = await client.decide_among(call.model, messages, output.labels, call.options)
    return Result(
        value=decision, raw="", usage=decision.usage, model=call.model, rung="native", request_id=decision.id,
    )  # fmt: skip
