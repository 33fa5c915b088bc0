"""A conversation with a model that may call tools, as far as it has come: each question to the model, in the model's own way."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from typing import Any

import msgspec
from modelbus_broker.asking import CallOptions
from modelbus_broker.errors import ModelBusError, OutputError
from modelbus_broker.messages import ChatMessage, FinishReason, Ladder, Rung, ToolCall, Usage

from ..answer_types import ChatAnswer
from ..model_client import ModelClient
from ..structure import OutputType, Result, answer, tool_calls
from ..structure.replies import Reply, summed
from ..structure.tool_calls import ToolCallsOutput
from ..structure.tool_prompts import as_texts
from .calling import ToolOutcome
from .events import TextEvent, ToolEvent, ToolRun
from .toolset import ToolSet


class Talk:
    """A conversation with a model.

    Attributes:
        messages: all that was said.
        wanted: the calls that the model asked for last; [] when it has answered.
    """

    def __init__(
        self,
        client: ModelClient,
        model: str,
        messages: list[ChatMessage],
        ladder: Ladder,
        options: CallOptions | None,
        fields: dict[str, Any],
    ) -> None:
        self._client, self._model, self._ladder = client, model, ladder
        self._options, self._fields = options, fields
        self._is_native = "native" in self._ladder.rungs and client.profile(model).native_tools
        self._got: ChatAnswer
        self.messages = list(messages)
        self.wanted: list[ToolCall] = []
        self._text = ""
        self._value: Any = None
        self._usages: list[Usage] = []
        self._rung: Rung = "text"
        self._request_id = ""
        self._finish: FinishReason = "stop"

    @property
    def usage(self) -> Usage:
        """Of all requests."""
        return summed(self._usages)

    def run(self, made: list[ToolOutcome], rounds: int) -> ToolRun:
        """So far."""
        return ToolRun(
            answer=self._text, value=self._value if self._value is not None else self._text, calls=list(made),
            messages=list(self.messages), pending=self.wanted, usage=self.usage, rounds=rounds, model=self._model,
            rung=self._rung, request_id=self._request_id, finish_reason=self._finish,
        )  # fmt: skip

    async def calls(
        self, tools: ToolSet, choice: str | Mapping[str, Any] | None, stream: bool
    ) -> AsyncGenerator[ToolEvent, None]:
        """Asks for calls or a text."""
        parallel = self._fields.get("parallel_tool_calls") is not False
        output = tool_calls(tools.specs(), choice=choice, parallel=parallel)
        if self._is_native and not output.must:
            asking = self._native_calls(output, stream)
            try:
                async with aclosing(asking):
                    async for event in asking:
                        yield event
                return
            except ModelBusError as error:
                if not _refuses_tools(error):
                    raise
                # Some providers take tools and some of their models do not.
                self._is_native = False
                self._ladder = msgspec.structs.replace(self._ladder, rungs=("grammar", "prompted"))
        result: Result[Any] = await answer(
            self._client, self._model, self.messages, output,
            sampling=self._own_fields(), options=self._options, ladder=self._ladder,
        )  # fmt: skip
        self._usages.append(result.usage)
        self._rung, self._request_id, self._finish = result.rung, result.request_id, result.finish_reason
        if isinstance(result.value, list):
            self._calls_said(result.value, result.raw if result.rung == "native" else "")
        else:
            self._said(result.value)
            if stream:
                yield TextEvent(text=result.value)

    async def _native_calls(self, output: ToolCallsOutput, stream: bool) -> AsyncGenerator[ToolEvent, None]:
        """Of a model that was made for tools. Whoever makes the calls tells it what is wrong with them, if anything is."""
        fields = {**self._own_fields(), **output.fields(self._ladder, native=True)}
        asking = self._asked(self.messages, fields, stream)
        async with aclosing(asking):
            async for event in asking:
                yield event
        got = self._got
        self._took(got, "native")
        reply = Reply(
            text=got.text, reasoning=got.reasoning, tool_calls=got.tool_calls, finish_reason=got.finish_reason,
            refusal=got.choices[0].refusal if got.choices else "", usage=got.usage,
        )  # fmt: skip
        value: list[ToolCall] | str
        try:
            value = output.read(reply)
        except OutputError:
            if reply.refusal:
                raise
            value = got.tool_calls or got.text
        if isinstance(value, list):
            self._calls_said(value, got.text if got.tool_calls else "")
        else:
            self._said(got.text)

    async def _asked(
        self, messages: list[ChatMessage], fields: dict[str, Any], stream: bool
    ) -> AsyncGenerator[ToolEvent, None]:
        """Asks once; the answer is in ``_got`` then."""
        if not stream:
            self._got = await self._client.chat(self._model, messages, options=self._options, **fields)
            return
        async with self._client.stream(self._model, messages, options=self._options, **fields) as streamed:
            async for delta in streamed:
                if delta.choice == 0 and (delta.text or delta.reasoning):
                    yield TextEvent(text=delta.text, reasoning=delta.reasoning)
            self._got = streamed.answer

    async def text(self, tools: ToolSet, stream: bool) -> AsyncGenerator[ToolEvent, None]:
        """Asks for a text: there are no tools, or none may be called any more."""
        messages, fields = self.messages, self._own_fields()
        if len(tools) and self._is_native:
            # Providers refuse a conversation with calls that comes without the tools.
            fields |= {"tools": tools.specs(), "tool_choice": "none"}
        else:
            messages = as_texts(messages)
        asking = self._asked(messages, fields, stream)
        async with aclosing(asking):
            async for event in asking:
                yield event
        self._took(self._got, "text")
        self._said(self._got.text)

    async def form(self, output: OutputType[Any]) -> None:
        """Gives the answer its form: as it stands, else by asking for it.

        Raises:
            OutputError: it cannot be had.
        """
        try:
            self._value = output.read(Reply(text=self._text))
            return
        except OutputError:
            pass
        question = ChatMessage(role="user", content="Now give that answer in the form that is asked for.")
        result: Result[Any] = await answer(
            self._client, self._model, as_texts([*self.messages, question]), output,
            sampling=self._own_fields(), options=self._options, ladder=self._ladder,
        )  # fmt: skip
        self._usages.append(result.usage)
        self._rung, self._request_id, self._finish = result.rung, result.request_id, result.finish_reason
        self._value = result.value

    def _own_fields(self) -> dict[str, Any]:
        return {name: value for name, value in self._fields.items() if name != "parallel_tool_calls"}

    def _took(self, got: ChatAnswer, rung: Rung) -> None:
        self._usages.append(got.usage)
        self._rung, self._request_id, self._finish = rung, got.id, got.finish_reason

    def _calls_said(self, calls: list[ToolCall], text: str) -> None:
        self.wanted, self._text = calls, text
        self.messages.append(ChatMessage(role="assistant", content=text or None, tool_calls=calls))

    def _said(self, text: str) -> None:
        self.wanted, self._text = [], text
        self.messages.append(ChatMessage(role="assistant", content=text))


def _refuses_tools(error: ModelBusError) -> bool:
    """A provider or an engine says that this model takes no tools."""
    if isinstance(error, OutputError) or error.status not in (400, 404, 422, 501):
        return False
    return error.param.startswith("tool") or "tool" in f"{error.message} {error.upstream}".lower()
