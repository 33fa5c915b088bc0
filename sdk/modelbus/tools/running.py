"""The tool loop: a model asks for calls, gets their results, and so on until it answers."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from typing import Any, Literal

import msgspec
from modelbus_broker.asking import CallOptions
from modelbus_broker.errors import InvalidRequest, TooManyRounds
from modelbus_broker.messages import ChatMessage, Ladder, Sampling, ToolCall

from ..model_client import Messages, ModelClient, chat_task
from ..structure import OutputType
from .calling import Approve, Caller, ToolOutcome
from .events import CallsEvent, EndEvent, OutcomeEvent, RoundEvent, ToolEvent, ToolRun
from .functions import ToolContext
from .talk import Talk
from .toolset import ToolLike, ToolSet

Tools = ToolSet | Sequence[ToolLike | ToolSet]
#: What is done when the model wants another round than it may have.
AtLimit = Literal["error", "answer"]


async def run_tools(
    client: ModelClient,
    model: str,
    messages: Messages,
    tools: Tools,
    *,
    execute: bool = True,
    max_rounds: int = 8,
    at_limit: AtLimit = "error",
    parallel: int = 4,
    choice: str | Mapping[str, Any] | None = None,
    approve: Approve | None = None,
    inject: Mapping[str, Any] | None = None,
    propagate: tuple[type[Exception], ...] = (),
    output: OutputType[Any] | None = None,
    ladder: Ladder | None = None,
    sampling: Sampling | Mapping[str, Any] | None = None,
    options: CallOptions | None = None,
    **fields: Any,
) -> ToolRun:
    """Goes on with a conversation until the model answers, calling the tools that it asks for.

    A model that was made for tools gets them as they are; any other goes through the ladder (see ``modelbus.structure``),
    which shows it the tools and reads what it writes. What goes wrong with a call (a wrong name, wrong arguments, an
    exception, a timeout, a refusal) is told to the model in words, and it goes on.

    Args:
        messages: a text is one turn of the user.
        tools: functions, tools and tool sets.
        execute: False: the first calls are returned in ``pending`` and none is made.
        max_rounds: so many rounds of calls; each may have several.
        at_limit: ``error``: if the model wants another round then, ``TooManyRounds`` is raised, with the run so far in ``run``.
            ``answer``: the model is not shown the tools then and has to answer.
        parallel: so many calls at once; 1 makes them one after the other, in order.
        choice: of the first round: ``auto``, ``required`` or a tool's name.
        approve: is asked about each call; without it tools that need approval are refused.
        inject: values of the parameters that the model is not told of, by name.
        propagate: exceptions that end the run in place of being told to the model.
        output: the form of the answer; the model is asked for it once more where its text has not the form.
        ladder: how far calls, and the form of the answer, are sought.
        sampling: how tokens are chosen.
        options: budget, lane, tenant ... of each request.
        fields: further fields of the chat.

    Raises:
        TooManyRounds: see ``at_limit``.
        OutputError: the model's calls, or its answer, are not right even when it was told what is wrong.
        InvalidRequest: a tool makes no sense, or a parameter is to be injected and is not there.
        ModelBusError: what a request may end with.
    """
    events = tool_events(
        client, model, messages, tools, stream=False, execute=execute, max_rounds=max_rounds, at_limit=at_limit,
        parallel=parallel, choice=choice, approve=approve, inject=inject, propagate=propagate, output=output,
        ladder=ladder, sampling=sampling, options=options, **fields,
    )  # fmt: skip
    async with aclosing(events):
        async for event in events:
            if isinstance(event, EndEvent):
                return event.run
    raise AssertionError("the last event is the end")


async def tool_events(
    client: ModelClient,
    model: str,
    messages: Messages,
    tools: Tools,
    *,
    stream: bool = True,
    execute: bool = True,
    max_rounds: int = 8,
    at_limit: AtLimit = "error",
    parallel: int = 4,
    choice: str | Mapping[str, Any] | None = None,
    approve: Approve | None = None,
    inject: Mapping[str, Any] | None = None,
    propagate: tuple[type[Exception], ...] = (),
    output: OutputType[Any] | None = None,
    ladder: Ladder | None = None,
    sampling: Sampling | Mapping[str, Any] | None = None,
    options: CallOptions | None = None,
    **fields: Any,
) -> AsyncGenerator[ToolEvent, None]:
    """As :func:`run_tools`, event by event; the last is ``EndEvent``. Close it (``aclosing``) if you leave early.

    Args:
        stream: texts come in pieces, as the model writes them; where calls have to be told from text by the ladder, a text
            comes whole.
    """
    if max_rounds < 1:
        raise InvalidRequest(f"max_rounds must be at least 1, not {max_rounds}", param="max_rounds")
    toolset = tools if isinstance(tools, ToolSet) else ToolSet(tools)
    chosen = msgspec.to_builtins(sampling) if isinstance(sampling, Sampling) else dict(sampling or {})
    talk = Talk(client, model, chat_task(messages, {}).messages, ladder or Ladder(), options, {**chosen, **fields})
    # Checked in any case: who finds out in the middle of a run finds out late.
    caller = Caller(toolset, parallel=parallel, approve=approve, inject=inject, propagate=propagate)
    made: list[ToolOutcome] = []
    rounds = 0
    while True:
        left = max_rounds - rounds
        if not len(toolset) or (left <= 0 and at_limit == "answer"):
            asking = talk.text(toolset, stream)
        else:
            asking = talk.calls(toolset, choice if rounds == 0 else None, stream)
        async with aclosing(asking):
            async for event in asking:
                yield event
        if not talk.wanted:
            break
        if not execute:
            yield EndEvent(run=talk.run(made, rounds))
            return
        if left <= 0:
            raise TooManyRounds(
                f"the model has called tools {rounds} times and wants to go on; raise max_rounds, or let it answer with "
                "at_limit='answer'",
                rounds=rounds, run=talk.run(made, rounds),
            )  # fmt: skip
        rounds += 1
        calls, said = talk.wanted, list(talk.messages)
        yield CallsEvent(calls=calls)

        def context(call: ToolCall, said: list[ChatMessage] = said, number: int = rounds) -> ToolContext:
            return ToolContext(client=client, model=model, messages=said, call=call, round=number)

        outcomes = await caller.outcomes(calls, context)
        made += outcomes
        talk.messages += [outcome.message() for outcome in outcomes]
        for outcome in outcomes:
            yield OutcomeEvent(outcome=outcome)
        yield RoundEvent(number=rounds, messages=list(talk.messages), usage=talk.usage)
    if output is not None and output.kind != "text":
        await talk.form(output)
    yield EndEvent(run=talk.run(made, rounds))
