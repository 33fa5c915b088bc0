"""Objects and lists that are read while they are written."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import msgspec
from modelbus_broker.errors import ModelBusError, OutputError

from ..answer_types import ChatAnswer
from ..model_client import ModelClient
from ..structure import Climb, Reply, Result
from .continuing import ask

if TYPE_CHECKING:
    from .running import RenderedCall


async def answer_as_it_comes(call: RenderedCall, client: ModelClient, emit: Callable[[str], None]) -> Result[Any]:
    """Asks for an answer in its form, and gives out its text while it comes.

    The ladder is climbed as for answers that come whole, but for re-asking: its reader has seen the answer already.

    Raises:
        OutputError: the answer has not the form.
        ModelBusError: what asking raises.
    """
    ladder = msgspec.structs.replace(call.ladder, reasks=0)
    climb: Climb[Any] = Climb(call.messages, call.output, client.profile(call.model), ladder)
    came = False

    def show(text: str) -> None:
        nonlocal came
        came = True
        emit(text)

    while True:
        question = climb.ask
        fields = {**call.sampling, **question.fields}
        try:
            given = await ask(call, client, question.messages, fields, None if question.draft else show)
        except OutputError:
            raise
        except ModelBusError as error:
            if came or not climb.step_down(error):
                raise
            continue
        if climb.take(_reply(given)):
            return Result(
                value=climb.value, raw=given.text, usage=climb.usage, model=call.model, rung=climb.rung,
                attempts=climb.attempts, request_id=given.id, finish_reason=given.finish_reason,
                messages=climb.transcript,
            )  # fmt: skip


def _reply(given: ChatAnswer) -> Reply:
    return Reply(
        text=given.text, reasoning=given.reasoning, tool_calls=given.tool_calls, finish_reason=given.finish_reason,
        refusal=given.choices[0].refusal if given.choices else "", usage=given.usage,
    )  # fmt: skip
