"""Texts: with a beginning that is given, and gone on with when the limit on the output has cut them."""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Mapping
from typing import TYPE_CHECKING, Any

from modelbus_broker.errors import UnsupportedField
from modelbus_broker.messages import ChatMessage, Usage

from ..answer_types import ChatAnswer
from ..model_client import ModelClient
from ..structure import Result
from ..structure.replies import summed

if TYPE_CHECKING:
    from .running import RenderedCall

#: Said to a model that can only answer, not go on with a last message of its own.
CONTINUE = (
    "Your answer was cut off by a limit on its length. Go on exactly where it stopped, in the middle of a word if need "
    "be. Repeat nothing, and write nothing about this request."
)


async def answer_text(call: RenderedCall, client: ModelClient, emit: Callable[[str], None] | None) -> Result[str]:
    """Asks until the text is whole or ``max_turns`` requests were made; ``emit`` gets its pieces.

    Raises:
        UnsupportedField: the answer's beginning is given, and the model cannot go on from it.
        ModelBusError: what asking raises.
    """
    goes_on = bool(call.prefix or call.max_turns > 1) and client.profile(call.model).prefill
    if call.prefix and not goes_on:
        raise UnsupportedField(
            f"the model {call.model!r} cannot go on from a beginning of its answer", param="return_prefix"
        )
    if call.prefix and emit is not None:
        emit(call.prefix)
    said, asked = call.prefix, 0
    usages: list[Usage] = []
    while True:
        given = await ask(call, client, _messages(call, said, goes_on), call.sampling, emit)
        said += given.text
        usages.append(given.usage)
        asked += 1
        if given.finish_reason != "length" or asked == call.max_turns:
            break
    return Result(
        value=said, raw=said, usage=summed(usages), model=call.model, rung="text", attempts=asked, request_id=given.id,
        finish_reason=given.finish_reason,
    )  # fmt: skip


def _messages(call: RenderedCall, said: str, goes_on: bool) -> list[ChatMessage]:
    if not said:
        return call.messages
    turns = [*call.messages, ChatMessage(role="assistant", content=said)]
    return turns if goes_on else [*turns, ChatMessage(role="user", content=CONTINUE)]


def ask(
    call: RenderedCall,
    client: ModelClient,
    messages: list[ChatMessage],
    fields: Mapping[str, Any],
    emit: Callable[[str], None] | None,
) -> Coroutine[Any, Any, ChatAnswer]:
    """One request, to be awaited; ``emit`` gets the pieces of the first choice's text as they come."""
    if emit is None:
        return client.chat(call.model, messages, options=call.options, **fields)
    return _streamed(call, client, messages, fields, emit)


async def _streamed(
    call: RenderedCall,
    client: ModelClient,
    messages: list[ChatMessage],
    fields: Mapping[str, Any],
    emit: Callable[[str], None],
) -> ChatAnswer:
    async with client.stream(call.model, messages, options=call.options, **fields) as stream:
        async for delta in stream:
            if delta.choice == 0 and delta.text:
                emit(delta.text)
        return stream.answer
