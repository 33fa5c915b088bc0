"""Prompt functions whose model may call functions, or whose answer is the calls themselves."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import aclosing
from typing import TYPE_CHECKING, Any

from modelbus_broker.errors import OutputError

from ..model_client import ModelClient
from ..structure import Result
from ..tools import EndEvent, TextEvent, ToolRun, run_tools, tool_events

if TYPE_CHECKING:
    from .running import RenderedCall, ToolUse


async def answer_with_tools(
    call: RenderedCall, use: ToolUse, client: ModelClient, emit: Callable[[str], None] | None
) -> Result[Any]:
    """The answer when the model has called what it wanted; ``emit`` gets the pieces of its texts.

    Raises:
        OutputError: calls were wanted and it made none.
        ModelBusError: what the tool loop raises.
    """
    if use.only_calls:
        return await _calls(call, use, client)
    given: dict[str, Any] = {"sampling": call.sampling, "options": call.options, "ladder": call.ladder, **use.limits}
    if call.output.kind != "text":
        run = await run_tools(client, call.model, call.messages, use.tools, output=call.output, **given)
    elif emit is None:
        run = await run_tools(client, call.model, call.messages, use.tools, **given)
    else:
        events = tool_events(client, call.model, call.messages, use.tools, **given)
        async with aclosing(events):
            async for event in events:
                if isinstance(event, TextEvent) and event.text:
                    emit(event.text)
                elif isinstance(event, EndEvent):
                    run = event.run
    return _result(call, run, run.value)


async def _calls(call: RenderedCall, use: ToolUse, client: ModelClient) -> Result[Any]:
    limits = {"choice": "required", **use.limits}
    sampling = dict(call.sampling)
    if use.only_calls == "one":
        sampling["parallel_tool_calls"] = False
    run = await run_tools(
        client, call.model, call.messages, use.tools, execute=False,
        sampling=sampling, options=call.options, ladder=call.ladder, **limits,
    )  # fmt: skip
    if not run.pending and (use.only_calls == "one" or limits["choice"] != "auto"):
        raise OutputError("the model called no tool", raw=run.answer)
    return _result(call, run, run.pending[0] if use.only_calls == "one" else run.pending)


def _result(call: RenderedCall, run: ToolRun, value: Any) -> Result[Any]:
    return Result(
        value=value, raw=run.answer, usage=run.usage, model=call.model, rung=run.rung, attempts=run.rounds + 1,
        request_id=run.request_id, finish_reason=run.finish_reason, messages=run.messages[len(call.messages) :],
    )  # fmt: skip
