"""A scripted model's answers as frames, the way they come from a worker; the same in a process and on the bus."""

from __future__ import annotations

import asyncio
import inspect
import json
import math
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence

import msgspec
from modelbus_broker.errors import EngineFailed, UnsupportedField
from modelbus_broker.messages import (
    Capabilities,
    Chat,
    ChatMessage,
    Classification,
    Completion,
    Delta,
    Done,
    Embedding,
    FinishReason,
    Sampling,
    Score,
    Started,
    Task,
    TokenLogprob,
    ToolCallDelta,
    TopLogprob,
    Usage,
    Vectors,
)

from .driven import calls_so_far, driven_answer, spoilt
from .echo import (
    ECHO_LABELS,
    count_tokens,
    echo_answer,
    echo_classes,
    echo_logprob,
    echo_score,
    echo_vector,
    pieces,
    token_id,
)
from .faults import Turns, error_named
from .script import Script, ScriptedAnswer, check_script

#: Answers a request in place of a script.
Respond = Callable[[Chat], ScriptedAnswer | Awaitable[ScriptedAnswer]]
ScriptedFrame = Started | Delta | Vectors | Done


class Scripted:
    """One model that follows a script. It counts requests, so each has its turn."""

    def __init__(self, script: Script, respond: Respond | None = None) -> None:
        """
        Raises:
            ConfigurationError: the script makes no sense.
        """
        check_script(script)
        self.script = script
        self._respond = respond
        self._given = 0  # of the answers
        self._fail, self._cut, self._malform = (
            Turns(name, when)
            for name, when in (("fail", script.fail), ("cut", script.cut), ("malform", script.malform))
        )

    def capabilities(self) -> Capabilities:
        script = self.script
        return Capabilities(
            tasks=["chat", "completion", "embedding", "score", "classification"], vision=True, audio=True, files=True,
            tools=script.tools, native_tools=script.tools, json_object=script.json_schema, json_schema=script.json_schema, logprobs=True, n=True, seed=True,
            token_prompts=True, dimensions=script.dimensions, extra_fields=["*"],
        )  # fmt: skip

    async def frames(self, task: Task, id: str = "") -> AsyncIterator[ScriptedFrame]:
        """All frames of an answer; the last is ``Done``.

        Raises:
            ModelBusError: what the script says; ``EngineFailed`` when it has nothing more to say.
        """
        match task:
            case Chat():
                answer = await self._chosen(task)
                async for frame in self._said([(task, answer)], id):
                    yield frame
            case Completion():
                prompts = [prompt if isinstance(prompt, str) else " ".join(map(str, prompt)) for prompt in task.prompt]
                asked = [
                    Chat(messages=[ChatMessage(role="user", content=text)], sampling=task.sampling) for text in prompts
                ]
                answers = [(chat, await self._chosen(chat)) for chat in asked]
                if task.echo:
                    answers = [
                        (chat, msgspec.structs.replace(answer, text=text + answer.text))
                        for text, (chat, answer) in zip(prompts, answers, strict=True)
                    ]
                async for frame in self._said(answers, id):
                    yield frame
            case Embedding():
                wide = task.dimensions or self.script.dimensions
                texts = task.input
                async for frame in self._vectors(id, wide, [echo_vector(text, wide) for text in texts], texts):
                    yield frame
            case Score():
                queries = task.queries * (len(task.documents) if len(task.queries) == 1 else 1)
                pairs = zip(queries, task.documents, strict=True)
                scores = [echo_score(query, document) for query, document in pairs]
                async for frame in self._vectors(id, 1, scores, [*queries, *task.documents]):
                    yield frame
            case Classification():
                classes = [echo_classes(text) for text in task.input]
                async for frame in self._vectors(id, len(ECHO_LABELS), classes, task.input, ECHO_LABELS):
                    yield frame

    async def _chosen(self, task: Chat) -> ScriptedAnswer:
        script = self.script
        if task.tools and not script.tools:
            raise UnsupportedField("this scripted model takes no tools", param="tools")
        if (task.response_format or {}).get("type", "text") != "text" and not script.json_schema:
            raise UnsupportedField("this scripted model takes no response_format", param="response_format")
        if self._respond is not None:
            said = self._respond(task)
            return await said if inspect.isawaitable(said) else said
        last = task.messages[-1].text()
        for rule in script.rules:
            if re.search(rule.pattern, last):
                return as_answer(rule.answer)
        if self._given < len(script.answers):
            self._given += 1
            return as_answer(script.answers[self._given - 1])
        fails = script.otherwise == "fail" or (not script.otherwise and (script.rules or script.answers))
        if fails:
            given = f"{len(script.answers)} answers, all given," if script.answers else "no answer"
            raise EngineFailed(f"the script has {given} and no rule for {last[:200]!r}")
        return driven_answer(task, script.text)

    async def _said(self, answers: Sequence[tuple[Chat, ScriptedAnswer]], id: str) -> AsyncIterator[ScriptedFrame]:
        script = self.script
        fails, cuts, spoils = self._fail.next(), self._cut.next(), self._malform.next()
        prompt_tokens = sum(count_tokens(message.text()) for chat, _ in answers for message in chat.messages)
        yield Started(id=id, run="", seq=0, prompt_tokens=prompt_tokens)
        choices: list[_Choice] = []
        for chat, answer in answers:
            limit = script.cut_after if cuts else None
            if spoils:
                answer = _spoilt(answer, script)
            for _ in range(chat.sampling.n):
                choices.append(_Choice(len(choices), chat, answer, limit))
        await asyncio.sleep((script.delay_ms + answers[0][1].delay_ms) / 1000)
        error, after = None, 0
        if fails:
            error, after = error_named(script.fail_code, script.fail_text), script.fail_after
        elif answers[0][1].error:
            error, after = error_named(answers[0][1].error, answers[0][1].error_text), answers[0][1].after_tokens
        open_choices = [choice for choice in choices if error is None or after]
        while open_choices:
            for choice in open_choices:
                if error is not None and choice.position >= after:
                    raise error
                size = choice.size(script.chunks)
                yield choice.next(id, size if error is None else min(size, after - choice.position))
            open_choices = [choice for choice in open_choices if not choice.ended]
            if open_choices:
                await asyncio.sleep(script.interval_ms / 1000)
        if error is not None:
            raise error
        usage = Usage(
            prompt_tokens=prompt_tokens,
            completion_tokens=sum(choice.total for choice in choices),
            reasoning_tokens=sum(choice.reasoning_tokens for choice in choices),
        )
        yield Done(id=id, run="", seq=0, usage=usage)

    async def _vectors(
        self, id: str, dimensions: int, data: list[bytes], texts: Sequence[str | list[int]], labels: Sequence[str] = ()
    ) -> AsyncIterator[ScriptedFrame]:
        """What comes all at once."""
        await asyncio.sleep(self.script.delay_ms / 1000)
        if self._fail.next():
            raise error_named(self.script.fail_code, self.script.fail_text)
        tokens = sum(count_tokens(text) if isinstance(text, str) else len(text) for text in texts)
        yield Vectors(id=id, run="", seq=0, start=0, dimensions=dimensions, data=data, labels=list(labels))
        yield Done(id=id, run="", seq=0, usage=Usage(prompt_tokens=tokens))


def as_answer(said: str | ScriptedAnswer) -> ScriptedAnswer:
    return ScriptedAnswer(text=said) if isinstance(said, str) else said


class _Unit(msgspec.Struct, frozen=True):
    """A token of an answer, and where it goes."""

    piece: str  #: "": a token of the end, which shows nothing
    kind: str  #: text, reasoning, or call
    call: int = 0
    visible: str = ""


class _Choice:
    """One choice on its way out."""

    def __init__(self, index: int, chat: Chat, answer: ScriptedAnswer, limit: int | None) -> None:
        sampling = chat.sampling
        if limit is not None and (sampling.max_tokens is None or limit < sampling.max_tokens):
            sampling = msgspec.structs.replace(sampling, max_tokens=limit)
        self.index = index
        self.position = 0
        self._answer = answer
        self._alternatives = sampling.logprobs
        self._number = len(calls_so_far(chat))
        self._units, self._reason = _units(answer, sampling)
        self.total = len(self._units)
        self.reasoning_tokens = sum(unit.kind == "reasoning" for unit in self._units)
        self.ended = False
        self._begun: set[int] = set()

    def size(self, chunks: int) -> int:
        return max(1, math.ceil(self.total / chunks)) if chunks else 1

    def next(self, id: str, count: int) -> Delta:
        units = self._units[self.position : self.position + count]
        self.position += len(units)
        self.ended = self.position >= self.total
        shown = [unit for unit in units if unit.kind == "text"]
        first = self.position == len(units)
        return Delta(
            id=id, run="", seq=0, choice=self.index,
            text="".join(unit.visible for unit in shown),
            reasoning="".join(unit.visible for unit in units if unit.kind == "reasoning"),
            refusal=self._answer.refusal if first else "",
            tool_calls=self._calls([unit for unit in units if unit.kind == "call"]),
            token_ids=[token_id(unit.piece) for unit in units],
            position=self.position,
            finish_reason=self._reason if self.ended else "",
            logprobs=[] if self._alternatives is None else [
                self._logprob(unit.piece, self._alternatives, first and at == 0) for at, unit in enumerate(shown)
            ],
        )  # fmt: skip

    def _calls(self, units: Sequence[_Unit]) -> list[ToolCallDelta]:
        """What the tokens add to each call; the first of a call brings its name."""
        deltas = []
        for call in sorted({unit.call for unit in units}):
            arguments = "".join(unit.visible for unit in units if unit.call == call)
            if call in self._begun:
                deltas.append(ToolCallDelta(index=call, arguments=arguments))
            else:
                self._begun.add(call)
                name, number = self._answer.tool_calls[call].name, self._number + call + 1
                deltas.append(ToolCallDelta(index=call, id=f"call_{number}", name=name, arguments=arguments))
        return deltas

    def _logprob(self, piece: str, alternatives: int, first: bool) -> TokenLogprob:
        said = self._answer.probabilities
        if not first or not said:
            return echo_logprob(piece, alternatives)
        ranked = sorted(said.items(), key=lambda item: -item[1])
        top = [TopLogprob(token=token, logprob=_log(chance)) for token, chance in ranked[:alternatives]]
        return TokenLogprob(token=piece, logprob=_log(said.get(piece, 0.0)), top=top, token_id=token_id(piece))


def _units(answer: ScriptedAnswer, sampling: Sampling) -> tuple[list[_Unit], FinishReason]:
    """The tokens of an answer, thoughts first and calls last, and why it ends."""
    limit = sampling.max_tokens
    units = [_Unit(piece, "reasoning", visible=piece) for piece in pieces(answer.reasoning)]
    if limit is not None and len(units) >= limit and (answer.text or answer.tool_calls or len(units) > limit):
        return units[:limit], "length"
    left = sampling if limit is None else msgspec.structs.replace(sampling, max_tokens=limit - len(units))
    if answer.text or not answer.tool_calls:
        said = echo_answer(answer.text, left) if answer.text or left.min_tokens or left.ignore_eos else None
        reason: FinishReason = said.finish_reason if said else "stop"
        room = len(said.text) if said else 0
        for piece in said.pieces if said else ():
            units.append(_Unit(piece, "text", visible=piece[:room]))
            room = max(0, room - len(piece))
        if reason == "length":
            return units, reason
    for index, call in enumerate(answer.tool_calls):
        arguments = call.arguments
        text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
        units += [_Unit(piece, "call", index, piece) for piece in pieces(text) or [""]]
    if limit is not None and len(units) > limit:
        return units[:limit], "length"
    return units, answer.finish_reason or ("tool_calls" if answer.tool_calls else "stop")


def _spoilt(answer: ScriptedAnswer, script: Script) -> ScriptedAnswer:
    calls = []
    for call in answer.tool_calls:
        text = call.arguments if isinstance(call.arguments, str) else json.dumps(call.arguments, ensure_ascii=False)
        calls.append(msgspec.structs.replace(call, arguments=spoilt(text, script.malform_as)))
    return msgspec.structs.replace(answer, text=spoilt(answer.text, script.malform_as), tool_calls=calls)


def _log(chance: float) -> float:
    return math.log(chance) if chance > 0 else -9999.0
