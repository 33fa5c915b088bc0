"""Answers to conversations that are read as they come."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from types import TracebackType
from typing import Self

from modelbus_broker.asking import CallOptions
from modelbus_broker.errors import InvalidRequest
from modelbus_broker.messages import Chat, Delta, ToolCallDelta, Usage

from .answer_types import ChatAnswer, ChatDelta
from .answers import AnswerBuilder, ChoiceAnswer
from .hooks import ChatCall, around, hooked
from .port import Answering, Publishing
from .tracing import Asking


class ChatStream:
    """A streamed answer: iterate it for its deltas.

    Inside ``async with`` leaving early cancels the request at once; so does cancelling the task. ``usage`` and
    ``answer`` are complete when the iteration has ended.
    """

    def __init__(self, publisher: Publishing, model: str, task: Chat, options: CallOptions) -> None:
        self.model = model
        self._publisher = publisher
        self._asked = ChatCall(model=model, task=task, options=options)
        self._call: Answering | None = None
        self._asking: Asking | None = None
        self._builder = AnswerBuilder()
        self._started = time.monotonic()
        self._deltas: AsyncIterator[ChatDelta] | None = None
        self._hooks: _Hooks | None = None
        self._given: ChatAnswer | None = None  #: by the hooks
        self.first_token_ms = 0.0  #: from the call to the first output

    @property
    def id(self) -> str:
        """Of the request; "" before it is queued."""
        return self._call.id if self._call else ""

    @property
    def usage(self) -> Usage:
        return self._given.usage if self._given else self._builder.usage

    @property
    def answer(self) -> ChatAnswer:
        """What has come so far, put together."""
        if self._given is not None:
            return self._given
        elapsed_ms = (time.monotonic() - self._started) * 1000
        return ChatAnswer(
            id=self.id,
            model=self.model,
            choices=self._builder.choices,
            usage=self.usage,
            time_cost_ms=elapsed_ms,
            grounding=self._builder.done.grounding if self._builder.done else None,
        )

    async def start(self) -> None:
        """Queues the request, with the hooks around it (see ``modelbus.hooks``); iterating does it too.

        Raises:
            ModelNotFound, ModelUnavailable, QueueFull, BusUnavailable: see the errors.
        """
        if self._call is not None or self._given is not None:
            return
        if hooked(ChatCall):
            self._hooks = _Hooks(self._asked, self._submit)
            self._given = await self._hooks.begin()
        else:
            await self._submit(self._asked)

    async def _submit(self, call: ChatCall) -> None:
        if self._call is not None:
            raise InvalidRequest("a hook asked twice for a stream: what has been shown cannot be taken back")
        self.model = call.model
        self._asking = Asking("chat", call.model, call.options, call.task.sampling)
        try:
            self._call = await self._publisher.submit(call.model, call.task, self._asking.options)
        except BaseException as error:
            self._asking.end(error)
            raise

    async def aclose(self) -> None:
        """Ends the request if it still runs."""
        if self._call is not None:
            await self._call.cancel()
        if self._asking is not None:
            self._asking.end()
        if self._hooks is not None:
            await self._hooks.cancel()

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    async def read(self) -> ChatAnswer:
        """The whole answer at once; raises as iterating does."""
        async with self:
            async for _ in self:
                pass
            return self.answer

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> ChatDelta:
        if self._deltas is None:
            self._deltas = self._read()
        return await anext(self._deltas)

    async def _read(self) -> AsyncIterator[ChatDelta]:
        await self.start()
        if self._given is not None:
            for choice in self._given.choices:
                yield _whole(choice)
            return
        assert self._call is not None and self._asking is not None
        try:
            with self._asking as asking:
                async with self._call as call:
                    async for batch in call.batches():
                        for frame in batch:
                            self._builder.add(frame)
                            if isinstance(frame, Delta):
                                if not self.first_token_ms:
                                    self.first_token_ms = (time.monotonic() - self._started) * 1000
                                yield _chat_delta(frame)
                reasons = [choice.finish_reason for choice in self._builder.choices]
                asking.answered(self._builder.usage, id=self.id, finish_reasons=reasons)
        except Exception as error:
            if self._hooks is not None:
                await self._hooks.failed(error)
            raise
        if self._hooks is not None:
            self._given = await self._hooks.ended(self.answer)


class _Hooks:
    """The hooks around one stream, in a task of their own: those outside of the request wait in it while its pieces go out."""

    def __init__(self, call: ChatCall, submit: Callable[[ChatCall], Awaitable[None]]) -> None:
        loop = asyncio.get_running_loop()
        self._submit = submit
        self._queued: asyncio.Future[None] = loop.create_future()  #: or there is nothing to wait for
        self._answer: asyncio.Future[ChatAnswer] = loop.create_future()
        self._task = loop.create_task(
            around(call, self._ask, ChatAnswer), name=f"hooks around a stream of {call.model}"
        )
        self._task.add_done_callback(lambda _: self._go_on())

    async def begin(self) -> ChatAnswer | None:
        """Returns when the request is queued, or with the answer that a hook gave in its place. Raises what they raise."""
        try:
            await self._queued
        except asyncio.CancelledError:
            await self.cancel()
            raise
        return self._task.result() if self._task.done() else None

    async def ended(self, answer: ChatAnswer) -> ChatAnswer:
        """All has been read: what the hooks make of it. Raises what they raise."""
        if not self._answer.done():
            self._answer.set_result(answer)
        return await self._task

    async def failed(self, error: Exception) -> None:
        """The hooks hear of an error. They may raise another one; an answer cannot take its place any more."""
        if not self._answer.done():
            self._answer.set_exception(error)
            self._answer.exception()  # heard, even if no hook waits
        await self._task

    async def cancel(self) -> None:
        """Nobody reads any more."""
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)

    async def _ask(self, call: ChatCall) -> ChatAnswer:
        await self._submit(call)
        self._go_on()
        return await self._answer

    def _go_on(self) -> None:
        if not self._queued.done():
            self._queued.set_result(None)


def _whole(choice: ChoiceAnswer) -> ChatDelta:
    """A choice as one piece."""
    calls = [
        ToolCallDelta(index=index, id=call.id, name=call.function.name, arguments=call.function.arguments)
        for index, call in enumerate(choice.tool_calls)
    ]
    return ChatDelta(
        choice=choice.index,
        text=choice.text,
        reasoning=choice.reasoning,
        tool_calls=calls,
        finish_reason=choice.finish_reason or "stop",
        logprobs=choice.logprobs,
        refusal=choice.refusal,
    )


def _chat_delta(frame: Delta) -> ChatDelta:
    return ChatDelta(
        choice=frame.choice,
        text=frame.text,
        position=frame.position,
        reasoning=frame.reasoning,
        tool_calls=frame.tool_calls,
        finish_reason=frame.finish_reason,
        logprobs=frame.logprobs,
        refusal=frame.refusal,
    )
