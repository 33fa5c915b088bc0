"""Answers with a form, from any engine: ``response_format`` and ``tools`` by the ladder, beside the engine.

What the engine does itself passes through. For the rest the engine is asked in other words, and perhaps again, within
the one run of the one request: its id, its cancelling, its Idempotency-Key and its place in a stream are those of any
request. An answer that is sought like this goes out when it is found to be right, and not before: nothing that was
shown has to be taken back.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from typing import Any

import msgspec
from modelbus.structure.climbing import Ask, Climb, fitted
from modelbus.structure.likely_tools import likeliest
from modelbus.structure.output_types import OutputType
from modelbus.structure.profiles import Profile, profile_of
from modelbus.structure.replies import Reply, summed
from modelbus.structure.schema_output import asked_schema
from modelbus.structure.tool_calls import ToolCallsOutput
from modelbus.structure.tool_prompts import as_texts
from modelbus_broker.errors import ModelBusError, OutputError, UnsupportedField, UnsupportedHere
from modelbus_broker.messages import (
    Chat,
    ChatMessage,
    Decision,
    FunctionCall,
    Ladder,
    Rung,
    Task,
    ToolCall,
    ToolCallDelta,
    Usage,
)

from .engines.base import Attempted, Engine, EngineOutput, Finished, Output, Run


class Forms:
    """An engine whose chats can be asked for any form."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def answer(self, task: Task, run: Run) -> AsyncIterator[EngineOutput]:
        """The answer to any task. Raises what the engine raises, and OutputError."""
        if not isinstance(task, Chat):
            return self._engine.answer(task, run)
        tools = bool(task.tools) and task.tool_choice != "none"
        if not tools and (task.response_format or {}).get("type", "text") == "text":
            return self._engine.answer(self._without_tools(task), run)
        return self._formed(msgspec.structs.replace(task, ladder=None), run, fitted(task.ladder, task.sampling), tools)

    def _without_tools(self, task: Chat) -> Chat:
        """A chat that calls no tools, for an engine that knows none: earlier calls and results in it are texts."""
        if not (task.tools or any(turn.tool_calls or turn.role == "tool" for turn in task.messages)):
            return task
        if self._engine.capabilities().tools:
            return task
        return msgspec.structs.replace(
            task, messages=as_texts(task.messages), tools=None, tool_choice=None, parallel_tool_calls=None
        )

    async def _formed(self, task: Chat, run: Run, ladder: Ladder, tools: bool) -> AsyncIterator[EngineOutput]:
        output = _output(task, run, tools)
        profile = self._profile(task)
        earlier = bool(run.output_token_ids) or any(run.emitted_chars)
        chosen = Usage()
        try:
            direct = self._direct(profile, ladder, tools)
            if isinstance(output, ToolCallsOutput) and not earlier and profile.chooses_tool(ladder):
                output, chosen = await self._likeliest(output, task, run)
            climb: Climb[Any] = Climb(task.messages, output, profile, ladder, used=chosen)
        except UnsupportedField as error:
            raise UnsupportedHere(error.message, param=error.param) from error
        if direct is not None:
            held: list[Output] | None = [] if _may_ask_again(task, run, direct) and not earlier else None
            shown = False
            finished: Finished | None = None
            try:
                async with aclosing(_stream(self._engine, task, run)) as outputs:
                    async for made in outputs:
                        if isinstance(made, Finished):
                            finished = made
                        elif isinstance(made, Output) and held is not None:
                            held.append(made)
                        else:
                            shown |= isinstance(made, Output)
                            yield made
            except ModelBusError as error:
                # The provider has not this way, or no grammar can say what the schema says.
                if shown or earlier or not climb.step_down(error):
                    raise
            else:
                if finished is None:
                    return
                if held is None:
                    yield msgspec.structs.replace(finished, rung=direct, attempts=1)
                    return
                reply = _reply(held, finished.usage)
                yield Attempted(usage=finished.usage)
                if reply.finish_reason == "length" or climb.take(reply):
                    for made in held:
                        yield made
                    yield msgspec.structs.replace(finished, rung=direct, attempts=1)
                    return
        elif earlier:
            # An earlier run said all of it at once, and was lost before it could say that this is all.
            tokens = sum(map(len, run.output_token_ids))
            yield Finished(usage=Usage(prompt_tokens=run.prompt_tokens, completion_tokens=tokens, estimated=True))
            return
        async with aclosing(self._sought(task, run, climb, output, profile, ladder)) as sought:
            async for made in sought:
                yield made

    async def _likeliest(self, output: ToolCallsOutput, task: Chat, run: Run) -> tuple[ToolCallsOutput, Usage]:
        """The tool that is meant alone, and what it took to choose it."""

        async def likelihood(messages: list[ChatMessage], text: str) -> tuple[float, Usage]:
            asked = Decision(messages=messages, labels=[text], chat_template_kwargs=task.chat_template_kwargs)
            likely, usage = 0.0, Usage()
            async with aclosing(_stream(self._engine, asked, _inner(run))) as outputs:
                async for made in outputs:
                    if isinstance(made, Output):
                        likely += sum(token.logprob for token in made.logprobs)
                    elif isinstance(made, Finished):
                        usage = made.usage
            return likely, usage

        return await likeliest(output, task.messages, likelihood)

    async def _sought(
        self, task: Chat, run: Run, climb: Climb[Any], output: OutputType[Any], profile: Profile, ladder: Ladder
    ) -> AsyncGenerator[EngineOutput]:
        """Climbs the ladder, for each choice of its own, and gives out all answers together when the last is right."""
        if task.sampling.logprobs is not None:
            raise UnsupportedHere(
                "log probabilities cannot be had of an answer that this model is asked for in words", param="logprobs"
            )
        answers: list[Output] = []
        usages: list[Usage] = []
        rung: Rung = "text"
        attempts = 0
        last = Finished(usage=Usage())
        for choice in range(task.sampling.n):
            if choice:
                climb = Climb(task.messages, output, profile, ladder)
            while True:
                held: list[Output] = []
                asked = _asked(task, climb.ask, choice)
                try:
                    async with aclosing(_stream(self._engine, asked, _inner(run))) as outputs:
                        async for made in outputs:
                            if isinstance(made, Finished):
                                last = made
                            elif isinstance(made, Output):
                                held.append(made)
                                yield Attempted(usage=_so_far([*usages, climb.usage], held))
                except ModelBusError as error:
                    if climb.step_down(error):
                        continue
                    raise
                reply = _reply(held, last.usage)
                try:
                    done = climb.take(reply)
                except OutputError:
                    if reply.finish_reason != "length":
                        yield Attempted(usage=summed([*usages, climb.usage]))
                        raise
                    # The client's own limit, in the words of the OpenAI API.
                    answers.append(_cut(choice, reply, output))
                    break
                yield Attempted(usage=summed([*usages, climb.usage]))
                if done:
                    answers.append(_answer(choice, climb.value, reply, held, output))
                    break
            usages.append(climb.usage)
            rung, attempts = climb.rung, attempts + climb.attempts
        for answer in answers:  # in one turn of the event loop: all of it reaches the publisher, or none
            yield answer
        yield msgspec.structs.replace(last, usage=summed(usages), rung=rung, attempts=attempts)

    def _profile(self, task: Chat) -> Profile:
        """What the engine can do for this task."""
        capabilities = self._engine.capabilities()
        if (task.response_format or {}).get("type") == "json_object":
            capabilities = msgspec.structs.replace(capabilities, json_schema=capabilities.json_object)
        return profile_of(capabilities)

    def _direct(self, profile: Profile, ladder: Ladder, tools: bool) -> Rung | None:
        """The rung on which the engine itself does what the task asks for; None: it is to be asked in other words.

        Raises:
            UnsupportedField: the ladder allows none of its ways.
        """
        rung = profile.rung(ladder, tools=tools)
        if rung == "prompted" or (tools and rung != "native"):
            return None
        return None if ladder.reason_first else rung


def _output(task: Chat, run: Run, tools: bool) -> OutputType[Any]:
    """The form that a task asks for. Raises InvalidRequest."""
    schema = asked_schema(task.response_format)
    if not tools:
        assert schema is not None
        return schema
    return ToolCallsOutput(
        task.tools or [],
        task.tool_choice,
        task.parallel_tool_calls is not False,
        lambda index: "call_" + hashlib.sha256(f"{run.id}:{index}".encode()).hexdigest()[:24],
        answer=schema,
    )


def _may_ask_again(task: Chat, run: Run, rung: Rung) -> bool:
    """Whether an answer is held back until it is known to be right: where nobody reads as it comes, and nothing but the
    model's good will stands for the form."""
    return rung == "native" and not run.stream and task.sampling.n == 1 and task.sampling.logprobs is None


def _stream(engine: Engine, task: Task, run: Run) -> AsyncGenerator[EngineOutput]:
    return engine.answer(task, run)  # type: ignore[return-value]  # an engine's methods are async generators


def _inner(run: Run) -> Run:
    """One attempt of many: it begins at its beginning, and its output goes to nobody yet."""
    return msgspec.structs.replace(run, output_token_ids=[], emitted_chars=[], prompt_tokens=0, stream=False)


def _asked(task: Chat, ask: Ask, choice: int) -> Chat:
    """The task in the ladder's words."""
    sampling = msgspec.structs.replace(task.sampling, n=1)
    if ask.temperature is not None:
        sampling = msgspec.structs.replace(sampling, temperature=ask.temperature)
    if choice and sampling.seed is not None:
        sampling = msgspec.structs.replace(sampling, seed=sampling.seed + choice)
    return msgspec.structs.replace(
        task,
        messages=ask.messages,
        sampling=sampling,
        tools=ask.fields.get("tools"),
        tool_choice=ask.fields.get("tool_choice"),
        parallel_tool_calls=ask.fields.get("parallel_tool_calls"),
        response_format=ask.fields.get("response_format"),
    )


def _reply(outputs: list[Output], usage: Usage) -> Reply:
    """One choice's outputs, put together."""
    calls: dict[int, ToolCall] = {}
    for output in outputs:
        for piece in output.tool_calls:
            call = calls.get(piece.index, ToolCall())
            function = FunctionCall(
                name=call.function.name or piece.name, arguments=call.function.arguments + piece.arguments
            )
            calls[piece.index] = ToolCall(id=call.id or piece.id, function=function)
    return Reply(
        text="".join(output.text for output in outputs),
        reasoning="".join(output.reasoning for output in outputs),
        tool_calls=[calls[index] for index in sorted(calls)],
        finish_reason=next((output.finish_reason for output in reversed(outputs) if output.finish_reason), "stop"),
        refusal="".join(output.refusal for output in outputs),
        usage=usage,
    )


def _so_far(usages: list[Usage], outputs: list[Output]) -> Usage:
    """With the tokens of an attempt that still runs."""
    total = summed(usages)
    running = sum(len(output.token_ids) if output.tokens < 0 else output.tokens for output in outputs)
    return msgspec.structs.replace(total, completion_tokens=total.completion_tokens + running)


def _answer(choice: int, value: Any, reply: Reply, held: list[Output], output: OutputType[Any]) -> Output:
    """The output that shows a value."""
    tokens = [token for output in held for token in output.token_ids]
    shown = Output(choice=choice, token_ids=tokens, reasoning=reply.reasoning, finish_reason="stop")
    if not output.about_tools:
        return msgspec.structs.replace(shown, text=_text(value, reply))
    if isinstance(value, str):  # of no tool
        reason = "length" if reply.finish_reason == "length" else "stop"
        return msgspec.structs.replace(shown, text=value, finish_reason=reason)
    calls = [
        ToolCallDelta(index=index, id=call.id, name=call.function.name, arguments=call.function.arguments)
        for index, call in enumerate(value)
    ]
    return msgspec.structs.replace(shown, tool_calls=calls, finish_reason="tool_calls")


def _text(value: Any, reply: Reply) -> str:
    """JSON: as the model wrote it, if it wrote nothing else."""
    written = reply.text.strip()
    try:
        if msgspec.json.decode(written) == value:
            return written
    except (msgspec.DecodeError, UnicodeError, RecursionError):
        pass
    return json.dumps(value, ensure_ascii=False)


def _cut(choice: int, reply: Reply, output: OutputType[Any]) -> Output:
    """What there is of an answer that the client's token limit ended. Half a call is not shown."""
    text = "" if output.about_tools else reply.text
    return Output(choice=choice, text=text, reasoning=reply.reasoning, tokens=0, finish_reason="length")
