"""Calling tools for a model: arguments are checked, consent is asked for, time is limited, and what fails becomes words."""

from __future__ import annotations

import asyncio
import contextvars
import inspect
import threading
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, Literal

import msgspec
from modelbus_broker.messages import ChatMessage, ToolCall

from ..structure.nodes.base import Retry
from .functions import Tool, ToolContext
from .toolset import ToolSet

Failure = Literal["", "unknown_tool", "bad_arguments", "refused", "timeout", "failed"]


class PendingCall(msgspec.Struct, frozen=True, kw_only=True):
    """A call that waits for consent."""

    tool: Tool[..., Any]
    call: ToolCall
    arguments: Mapping[str, Any]  #: as the function will get them


#: Whether a call may be made: True, or False, or a text that tells the model why not.
Approve = Callable[[PendingCall], bool | str | Awaitable[bool | str]]


class ToolOutcome(msgspec.Struct, frozen=True, kw_only=True):
    """What came of a call."""

    call: ToolCall
    value: Any = None  #: what the function returned
    text: str = ""  #: what the model is told
    failure: Failure = ""
    error: Exception | None = None  #: that the function raised
    took_s: float = 0.0

    @property
    def name(self) -> str:
        return self.call.function.name

    @property
    def ok(self) -> bool:
        return not self.failure

    def message(self) -> ChatMessage:
        """The turn that tells the model."""
        return ChatMessage(role="tool", tool_call_id=self.call.id, content=self.text)


class Caller:
    """Calls the tools of one run."""

    def __init__(
        self,
        tools: ToolSet,
        *,
        parallel: int = 4,
        approve: Approve | None = None,
        inject: Mapping[str, Any] | None = None,
        propagate: tuple[type[Exception], ...] = (),
    ) -> None:
        """
        Args:
            parallel: so many calls at once.
            approve: is asked about each call; without it tools that need approval are refused.
            inject: values of the parameters that the model is not told of, by name.
            propagate: exceptions that end the run in place of being told to the model.

        Raises:
            InvalidRequest: a parameter is to be injected and is not there.
        """
        if parallel < 1:
            raise ValueError(f"parallel must be at least 1, not {parallel}")
        self._tools = tools
        self._parallel = parallel
        self._approve = approve
        self._inject = dict(inject or {})
        self._propagate = propagate
        tools.check_injection(self._inject)

    async def outcomes(
        self, calls: Sequence[ToolCall], context: Callable[[ToolCall], ToolContext]
    ) -> list[ToolOutcome]:
        """What came of the calls, in their order. Cancelling it cancels those that run.

        Raises:
            Exception: one of ``propagate``.
        """
        room = asyncio.Semaphore(self._parallel)

        async def one(call: ToolCall) -> ToolOutcome:
            async with room:
                return await self._outcome(call, context(call))

        try:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(one(call), name=f"tool {call.function.name}") for call in calls]
        except BaseExceptionGroup as errors:
            raise errors.exceptions[0] from None
        return [task.result() for task in tasks]

    async def _outcome(self, call: ToolCall, context: ToolContext) -> ToolOutcome:
        tool = self._tools.get(call.function.name)
        if tool is None:
            words = f"there is no tool {call.function.name!r}; the tools are: {', '.join(self._tools.names)}"
            return _failed(call, "unknown_tool", words)
        try:
            arguments = msgspec.json.decode(call.function.arguments or "{}")
        except msgspec.DecodeError as error:
            return _failed(call, "bad_arguments", f"the arguments of {tool.name} are no JSON: {error}")
        values, problems = tool.read(arguments)
        if problems:
            return _failed(call, "bad_arguments", f"the arguments of {tool.name} are wrong: {'; '.join(problems)}")
        refused = await self._refusal(PendingCall(tool=tool, call=call, arguments=values))
        if refused:
            return _failed(call, "refused", refused)
        injected = {name: self._inject[name] for name in tool.injected if name in self._inject}
        for name, wanted in tool.injected.items():
            if wanted is ToolContext:
                injected.setdefault(name, context)
        began = time.monotonic()
        try:
            async with asyncio.timeout(tool.timeout_s) as limit:
                value = await _called(tool, {**values, **injected})
        except TimeoutError as error:
            if not limit.expired():
                return self._raised(call, error, began)
            return _failed(call, "timeout", f"{tool.name} gave no result within {tool.timeout_s:g} s")
        except Exception as error:  # whatever a function raises, the model hears of it
            return self._raised(call, error, began)
        return ToolOutcome(call=call, value=value, text=as_text(value), took_s=time.monotonic() - began)

    async def _refusal(self, pending: PendingCall) -> str:
        """Why a call may not be made; "" if it may."""
        if self._approve is None:
            if not pending.tool.needs_approval:
                return ""
            return f"{pending.tool.name} needs approval, and nobody is there to give it"
        verdict = self._approve(pending)
        if inspect.isawaitable(verdict):
            verdict = await verdict
        if verdict is True:
            return ""
        return verdict if isinstance(verdict, str) and verdict else f"the call of {pending.tool.name} was not approved"

    def _raised(self, call: ToolCall, error: Exception, began: float) -> ToolOutcome:
        if isinstance(error, self._propagate):
            raise error
        words = str(error) if isinstance(error, Retry) else f"{type(error).__name__}: {error}"
        outcome = _failed(call, "failed", words)
        return msgspec.structs.replace(outcome, error=error, took_s=time.monotonic() - began)


async def _called(tool: Tool[..., Any], values: Mapping[str, Any]) -> Any:
    call = tool.bound(values)
    if tool.is_async:
        return await call()
    value = await _in_thread(call)
    return await value if inspect.isawaitable(value) else value


async def _in_thread(call: Callable[[], Any]) -> Any:
    """Runs it on a thread of its own, which dies with the program: a call that is given up must not keep it alive."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[Any] = loop.create_future()
    context = contextvars.copy_context()

    def settle(value: Any, error: BaseException | None) -> None:
        if future.done():  # given up
            return
        if error is None:
            future.set_result(value)
        elif isinstance(error, StopIteration):
            future.set_exception(RuntimeError("the tool raised StopIteration"))  # a future cannot carry it
        else:
            future.set_exception(error)

    def run() -> None:
        value, error = None, None
        try:
            value = context.run(call)
        except BaseException as raised:  # it belongs to whoever waits
            error = raised if isinstance(raised, Exception) else RuntimeError(f"the tool ended with {raised!r}")
        if not loop.is_closed():
            loop.call_soon_threadsafe(settle, value, error)

    threading.Thread(target=run, name="modelbus-tool", daemon=True).start()
    return await future


def as_text(value: Any) -> str:
    """A result as a model is told of it: a text as it is, else JSON, else what ``str`` says."""
    if isinstance(value, str):
        return value
    try:
        return msgspec.json.encode(value, enc_hook=_plain).decode()
    except (TypeError, ValueError, msgspec.MsgspecError):
        return str(value)


def _plain(value: Any) -> Any:
    if hasattr(value, "model_dump"):
        return value.model_dump(mode="json")
    return str(value)


def _failed(call: ToolCall, failure: Failure, words: str) -> ToolOutcome:
    return ToolOutcome(call=call, text=f"Error: {words}", failure=failure)
