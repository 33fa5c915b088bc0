"""A conversation with a model: it remembers what was said, may call tools, and can be saved and cut to size."""

from __future__ import annotations

import os
import threading
from collections.abc import AsyncGenerator, AsyncIterator, Coroutine, Iterator, Mapping
from contextlib import aclosing, contextmanager
from pathlib import Path
from typing import Any, Self, TypeVar

import msgspec
from modelbus_broker.asking import CallOptions
from modelbus_broker.errors import ConfigurationError, Conflict, InvalidRequest
from modelbus_broker.messages import ChatMessage, Ladder, Usage

from ..model_client import Messages, chat_task
from ..prompts.llm import Model, Target, Waiter, target_of
from ..structure import OutputType, output_type
from ..structure.replies import summed
from ..token_estimate import estimate_message
from ..tools import Approve, EndEvent, TextEvent, ToolEvent, ToolRun, Tools, ToolSet, tool_events
from ..tools.running import AtLimit
from .history import Count, exchanges, fitted

T = TypeVar("T")

#: One turn of the user: a text, a message, or one in the form of the OpenAI API.
Said = str | ChatMessage | Mapping[str, Any]


class SavedChat(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What is kept of a conversation in a file."""

    version: int = 1
    system: str = ""
    messages: list[ChatMessage] = []
    usage: Usage = Usage()


class Chat:
    """A conversation. ``Chat("chat").ask("Hello").answer``, or in asyncio programs ``(await chat.aio_ask("Hello")).answer``.

    A turn that fails leaves no trace: the conversation is as it was before.

    Attributes:
        system: the instructions that every request begins with.
        messages: all that was said, calls of tools and their results included, without the instructions.
        usage: of all requests.
        last: the run of the last turn, None before the first.
    """

    def __init__(
        self,
        llm: Model,
        *,
        model: str = "",
        system: str = "",
        messages: Messages = (),
        tools: Tools = (),
        history_tokens: int = 0,
        count: Count = estimate_message,
        max_rounds: int = 8,
        at_limit: AtLimit = "error",
        parallel: int = 4,
        approve: Approve | None = None,
        inject: Mapping[str, Any] | None = None,
        ladder: Ladder | None = None,
        options: CallOptions | None = None,
        **sampling: Any,
    ) -> None:
        """
        Args:
            llm: a model's name, an ``LLM``, or a client with ``model=`` beside it.
            messages: what was said before.
            tools: functions that the model may call; ``max_rounds``, ``at_limit``, ``parallel``, ``approve`` and ``inject`` are
                those of :func:`modelbus.tools.run_tools`.
            history_tokens: what is sent has at most so many tokens: the oldest exchanges are left out of the request, and
                stay in ``messages``. 0 is no limit.
            count: how many tokens a message has; the default estimates it.
            ladder, options, sampling: of each request; see :meth:`modelbus.Client.chat`.

        Raises:
            InvalidRequest: a tool or a message makes no sense.
            PromptError, ConfigurationError: no model is named.
        """
        target = target_of(llm, model, ())
        if target is None or not target.model:
            raise ConfigurationError("no model is named: Chat('chat')")
        self._target: Target = target
        self.system = system
        self.messages: list[ChatMessage] = chat_task(messages, {}).messages if messages else []
        self.usage = Usage()
        self.last: ToolRun | None = None
        self._tools = tools if isinstance(tools, ToolSet) else ToolSet(tools)
        self._history_tokens, self._count = history_tokens, count
        self._settings: dict[str, Any] = {
            "max_rounds": max_rounds, "at_limit": at_limit, "parallel": parallel, "approve": approve, "inject": inject,
            "ladder": ladder, "options": options,
        }  # fmt: skip
        self._sampling = sampling
        self._turn = threading.Lock()

    def __repr__(self) -> str:
        return f"<chat with {self._target.model}, {len(self.messages)} messages>"

    # Asking

    def ask(self, said: Said, *, output: type[T] | OutputType[Any] | Any = None, **sampling: Any) -> ToolRun:
        """Says something and waits for the answer: ``.answer`` is its text, ``.value`` what ``output`` makes of it.

        Args:
            output: the form of the answer: any type that a prompt function may return.
            sampling: for this turn only, and so is ``choice``, which tool is called first (see ``run_tools``).

        Raises:
            PromptError: an event loop runs in this thread: use ``aio_ask``.
            Conflict: another turn of this conversation waits for its answer.
            ContextLengthExceeded: the turn alone is more than ``history_tokens``.
            ModelBusError: what :func:`modelbus.tools.run_tools` raises.
        """
        return self._waiting(self.aio_ask(said, output=output, **sampling))

    async def aio_ask(self, said: Said, *, output: type[T] | OutputType[Any] | Any = None, **sampling: Any) -> ToolRun:
        """As :meth:`ask`, for asyncio programs."""
        events = self._events(said, output, sampling, stream=False)
        async with aclosing(events):
            async for event in events:
                if isinstance(event, EndEvent):
                    return event.run
        raise AssertionError("the last event is the end")

    def stream(self, said: Said, *, output: type[T] | OutputType[Any] | Any = None, **sampling: Any) -> Iterator[str]:
        """Says something and yields the pieces of the answer's text as they come; ``last`` has the run then. A stream that is
        left early leaves no trace."""
        texts = self.aio_stream(said, output=output, **sampling)
        try:
            while (piece := self._waiting(_next(texts))) is not None:
                yield piece
        finally:
            self._waiting(texts.aclose())

    async def aio_stream(
        self, said: Said, *, output: type[T] | OutputType[Any] | Any = None, **sampling: Any
    ) -> AsyncGenerator[str, None]:
        """As :meth:`stream`, for asyncio programs. Close it (``aclosing``) if you leave early."""
        events = self._events(said, output, sampling, stream=True)
        async with aclosing(events):
            async for event in events:
                if isinstance(event, TextEvent) and event.text:
                    yield event.text

    async def aio_events(
        self, said: Said, *, output: type[T] | OutputType[Any] | Any = None, **sampling: Any
    ) -> AsyncGenerator[ToolEvent, None]:
        """Says something and yields all that happens: texts, thoughts, calls of tools, their outcomes, the end."""
        events = self._events(said, output, sampling, stream=True)
        async with aclosing(events):
            async for event in events:
                yield event

    async def _events(
        self, said: Said, output: Any, sampling: Mapping[str, Any], *, stream: bool
    ) -> AsyncGenerator[ToolEvent, None]:
        (turn,) = chat_task(said if isinstance(said, str) else [said], {}).messages
        if turn.role != "user":
            raise InvalidRequest(f"a turn of the user is said here, not one of {turn.role}", param="messages")
        form = output if isinstance(output, OutputType) or output is None else output_type(output)
        with self._alone():
            sent = fitted([*self._instructions(), *self.messages, turn], self._history_tokens, self._count)
            client = await self._target.here()
            events = tool_events(
                client, self._target.model, sent, self._tools, stream=stream, output=form,
                **self._settings, **{**self._sampling, **sampling},
            )  # fmt: skip
            async with aclosing(events):
                async for event in events:
                    if isinstance(event, EndEvent):
                        self.messages += [turn, *event.run.messages[len(sent) :]]
                        self.usage = summed([self.usage, event.run.usage])
                        self.last = event.run
                    yield event

    def _instructions(self) -> list[ChatMessage]:
        return [ChatMessage(role="system", content=self.system)] if self.system else []

    @contextmanager
    def _alone(self) -> Iterator[None]:
        if not self._turn.acquire(blocking=False):
            raise Conflict("another turn of this conversation waits for its answer: fork() it, or wait")
        try:
            yield
        finally:
            self._turn.release()

    def _waiting(self, coroutine: Coroutine[Any, Any, T]) -> T:
        try:
            waiter = Waiter(self._target, "a turn of a Chat")
        except BaseException:
            coroutine.close()
            raise
        return waiter.run(coroutine)

    # History

    def undo(self) -> list[ChatMessage]:
        """Takes the last exchange back, and returns it; [] if there is none."""
        parts = exchanges(self.messages)
        if not parts:
            return []
        self.messages = [message for part in parts[:-1] for message in part]
        return parts[-1]

    def fork(self, **changes: Any) -> Chat:
        """A conversation that goes on from here on its own; ``changes`` are arguments of ``Chat``, such as ``system`` or ``tools``."""
        own: dict[str, Any] = {
            "llm": self._target.client if self._target.client is not None else self._target.model,
            "model": self._target.model, "system": self.system, "messages": self.messages, "tools": self._tools,
            "history_tokens": self._history_tokens, "count": self._count, **self._settings, **self._sampling,
        }  # fmt: skip
        if "llm" in changes and "model" not in changes:
            own.pop("model")
        return Chat(**{**own, **changes})

    def to_json(self) -> str:
        """Instructions, messages and usage; neither the model nor the tools."""
        saved = SavedChat(system=self.system, messages=self.messages, usage=self.usage)
        return msgspec.json.format(msgspec.json.encode(saved), indent=2).decode()

    def save(self, path: str | Path) -> None:
        """Writes :meth:`to_json` to a file, at once or not at all."""
        target = Path(path)
        made = target.with_name(f".{target.name}.{os.getpid()}.tmp")
        made.write_text(self.to_json(), encoding="utf-8")
        made.replace(target)

    @classmethod
    def load(cls, path: str | Path, llm: Model, **settings: Any) -> Self:
        """A conversation out of a file, to go on with; ``settings`` are arguments of ``Chat``.

        Raises:
            ConfigurationError: the file cannot be read, or has no conversation.
        """
        try:
            text = Path(path).read_bytes()
        except OSError as error:
            raise ConfigurationError(f"the conversation {str(path)!r} cannot be read: {error.strerror}") from error
        return cls.from_json(text, llm, **settings)

    @classmethod
    def from_json(cls, text: str | bytes, llm: Model, **settings: Any) -> Self:
        """As :meth:`load`, of a text."""
        try:
            saved = msgspec.json.decode(text, type=SavedChat)
        except msgspec.DecodeError as error:
            raise ConfigurationError(f"this is no conversation: {error}") from None
        if saved.version != 1:
            raise ConfigurationError(f"a conversation of version {saved.version} is newer than this modelbus")
        chat = cls(llm, **{"system": saved.system, "messages": saved.messages, **settings})
        chat.usage = saved.usage
        return chat


async def _next(texts: AsyncIterator[str]) -> str | None:
    return await anext(texts, None)
