"""The engine ``echo``: an ordinary engine that needs nothing and repeats what it is told.

It serves tests and benchmarks: its answers are exact, its pace and its failures are parameters
(``docs/engines-saas.md`` lists them). What it answers is decided in ``modelbus.testing.echo``.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import time
from collections.abc import AsyncIterator, Sequence

import msgspec
from modelbus.testing.echo import (
    ECHO_LABELS,
    EchoAnswer,
    count_tokens,
    echo_answer,
    echo_classes,
    echo_label,
    echo_logprob,
    echo_score,
    echo_vector,
    token_id,
)
from modelbus.testing.faults import Turns, error_named
from modelbus_broker.errors import ConfigurationError
from modelbus_broker.messages import (
    Capabilities,
    Chat,
    ChatMessage,
    Classification,
    Completion,
    Decision,
    Embedding,
    Sampling,
    Score,
    TextPart,
    Usage,
)

from .base import Engine, EngineConfig, EngineOutput, Finished, Output, Prompt, Run, VectorBatch
from .limits import check_fits
from .params import read_params

#: Waits are rounded up to this grid, so that many paced streams wake in one turn of the event loop.
_GRID_S = 0.001
#: Long waits count as engine steps this often: a slow engine is not a hung one.
_STEP_S = 1.0
#: Before the process dies or stands still: no engine does so in the turn of the event loop in which it gets a request,
#: and what was said until then, `started` at least, has reached the bus.
_LAST_FRAMES_S = 0.05


class EchoSettings(msgspec.Struct, frozen=True, kw_only=True):
    """The parameters of an ``echo`` deployment."""

    delay_ms: float = 0.0  #: before the first token
    interval_ms: float = 0.0  #: between tokens
    chunk: int = 0  #: tokens per output; 0: all of them, or 1 when there is an interval
    tokens: int = 0  #: length of every answer; 0: as long as the text
    text: str = ""  #: answer this instead of what was said
    slots: int = 1024
    dimensions: int = 64  #: of embeddings
    context_length: int = 0  #: tokens; 0: no limit
    adapters: bool = False  #: requests may name adapters; an answer with one begins with its name in brackets
    start_delay_ms: float = 0.0
    start_error: str = ""  #: the start fails with these words
    fail: str = "never"  #: never, always, first:N, every:N (requests)
    fail_after: int = 0  #: tokens that still come before a failure, a crash or a hang
    fail_code: str = "engine_failed"  #: a code of modelbus_broker.errors
    fail_text: str = "the echo engine was told to fail"
    crash_on: str = ""  #: the process dies when the prompt contains this
    hang_on: str = ""  #: the engine stands still when the prompt contains this
    block_on: str = ""  #: the whole process stands still when the prompt contains this


class EchoEngine(Engine):
    """Says what it was told, at the pace and with the failures that its parameters ask for."""

    name = "echo"
    counts_steps = True
    adapters_need = ": it needs adapters=true"

    def __init__(self, config: EngineConfig) -> None:
        super().__init__(config)
        self.settings = read_params(EchoSettings, config.params, engine=self.name)
        _check(self.settings)
        self._failures = Turns("fail", self.settings.fail)
        self._clock = _Clock()

    async def start(self) -> None:
        if self.settings.start_delay_ms:
            await asyncio.sleep(self.settings.start_delay_ms / 1000)
        if self.settings.start_error:
            raise ConfigurationError(self.settings.start_error)

    def capabilities(self) -> Capabilities:
        return Capabilities(
            tasks=["chat", "completion", "embedding", "score", "classification", "decision"], can_continue=True, prefill=True, adapters=self.settings.adapters, vision=True, audio=True, files=True,
            logprobs=True, n=True, seed=True, token_prompts=True, context_length=self.settings.context_length,
            dimensions=self.settings.dimensions, extra_fields=["*"],
        )  # fmt: skip

    @property
    def slots(self) -> int:
        return self.config.slots or self.settings.slots

    def compat(self) -> str:
        said = f"{self.settings.tokens} {self.settings.text}"
        return "echo" + hashlib.sha256(said.encode()).hexdigest()[:12]

    def metrics(self) -> str:
        return (
            "# HELP echo_steps_total Steps of the engine.\n# TYPE echo_steps_total counter\n"
            f"echo_steps_total {self.steps}\n"
        )

    def chat(self, task: Chat, run: Run) -> AsyncIterator[EngineOutput]:
        said = next((_said(message) for message in reversed(task.messages) if message.role == "user"), "")
        prompt_tokens = sum(count_tokens(_said(message)) for message in task.messages)
        text = _adapted(run, self.settings.text or said)
        if task.messages and task.messages[-1].role == "assistant":  # it is gone on with, not answered
            text = text.removeprefix(_said(task.messages[-1]))
        return self._answer([text], said, prompt_tokens, task.sampling, run)

    def completion(self, task: Completion, run: Run) -> AsyncIterator[EngineOutput]:
        prompts = [p if isinstance(p, str) else " ".join(map(str, p)) for p in task.prompt]
        texts = [_adapted(run, self.settings.text or prompt) for prompt in prompts]
        prompt_tokens = sum(map(count_tokens, prompts))
        prefixes = prompts if task.echo else ()
        return self._answer(texts, "\n".join(prompts), prompt_tokens, task.sampling, run, prefixes)

    async def embedding(self, task: Embedding, run: Run) -> AsyncIterator[EngineOutput]:
        await self._wait_or_fail("\n".join(text for text in task.input if isinstance(text, str)), run)
        dimensions = task.dimensions or self.settings.dimensions
        yield VectorBatch(start=0, dimensions=dimensions, data=[echo_vector(text, dimensions) for text in task.input])
        tokens = sum(count_tokens(text) if isinstance(text, str) else len(text) for text in task.input)
        yield Finished(usage=Usage(prompt_tokens=tokens))

    async def score(self, task: Score, run: Run) -> AsyncIterator[EngineOutput]:
        queries = task.queries if len(task.queries) > 1 else task.queries * len(task.documents)
        pairs = list(zip(queries, task.documents, strict=True))
        await self._wait_or_fail("\n".join(task.documents), run)
        yield VectorBatch(start=0, dimensions=1, data=[echo_score(*pair) for pair in pairs])
        tokens = sum(count_tokens(query) + count_tokens(document) for query, document in pairs)
        yield Finished(usage=Usage(prompt_tokens=tokens))

    async def decision(self, task: Decision, run: Run) -> AsyncIterator[EngineOutput]:
        said = _said(task.messages[-1]) if task.messages else ""
        await self._wait_or_fail(said, run)
        for index, label in enumerate(task.labels):
            yield Output(choice=index, tokens=0, finish_reason="stop", logprobs=echo_label(label, said))
        yield Finished(usage=Usage(prompt_tokens=sum(count_tokens(_said(message)) for message in task.messages)))

    async def classification(self, task: Classification, run: Run) -> AsyncIterator[EngineOutput]:
        await self._wait_or_fail("\n".join(text for text in task.input if isinstance(text, str)), run)
        data = [echo_classes(text) for text in task.input]
        yield VectorBatch(start=0, dimensions=len(ECHO_LABELS), data=data, labels=ECHO_LABELS)
        tokens = sum(count_tokens(text) if isinstance(text, str) else len(text) for text in task.input)
        yield Finished(usage=Usage(prompt_tokens=tokens))

    async def _wait_or_fail(self, said: str, run: Run) -> None:
        """What comes before results that come all at once."""
        fails = self._fails(run)
        await self._pause(asyncio.get_running_loop().time() + self.settings.delay_ms / 1000)
        await self._misbehave(said, fails)
        self.steps += 1

    async def _answer(
        self,
        texts: Sequence[str],
        said: str,
        prompt_tokens: int,
        sampling: Sampling,
        run: Run,
        prefixes: Sequence[str] = (),
    ) -> AsyncIterator[EngineOutput]:
        """Yields the choices of all texts side by side, token by token or at once."""
        settings = self.settings
        fails = self._fails(run)
        now = asyncio.get_running_loop().time
        began = now()
        if settings.context_length:
            check_fits(prompt_tokens, sampling.max_tokens, settings.context_length)
        prompt_tokens = run.prompt_tokens or prompt_tokens
        yield Prompt(prompt_tokens)
        choices = [
            _Choice(
                index * sampling.n + i,
                echo_answer(text, sampling, tokens=settings.tokens, choice=i),
                prefix=prefixes[index] if prefixes else "",
                alternatives=sampling.logprobs,
                run=run,
            )
            for index, text in enumerate(texts)
            for i in range(sampling.n)
        ]
        misbehaves = fails or (settings.crash_on and settings.crash_on in said)
        misbehaves = misbehaves or (settings.hang_on and settings.hang_on in said)
        misbehaves = misbehaves or (settings.block_on and settings.block_on in said)
        chunk = settings.chunk or (1 if settings.interval_ms else 1 << 30)
        due = began + settings.delay_ms / 1000
        done = 0
        open_choices = [choice for choice in choices if not choice.ended]
        while open_choices:
            if due > now():
                await self._pause(due)
            elif done:
                await asyncio.sleep(0)  # a long answer must not keep the event loop from others
            if misbehaves and done >= settings.fail_after:
                await self._misbehave(said, fails)
            count = min(chunk, settings.fail_after - done) if misbehaves else chunk
            for choice in open_choices:
                self.steps += 1
                yield choice.next(count)
            open_choices = [choice for choice in open_choices if not choice.ended]
            done += count
            due += settings.interval_ms / 1000 * count
        if misbehaves:
            await self._misbehave(said, fails)
        usage = Usage(prompt_tokens=prompt_tokens, completion_tokens=sum(choice.total for choice in choices))
        yield Finished(usage=usage)

    def _fails(self, run: Run) -> bool:
        """Counts the request and says whether its turn to fail has come."""
        return run.id != "self-test" and self._failures.next()

    async def _misbehave(self, said: str, fails: bool) -> None:
        if self.settings.hang_on and self.settings.hang_on in said:
            await asyncio.get_running_loop().create_future()
        if self.settings.block_on and self.settings.block_on in said:
            await asyncio.sleep(_LAST_FRAMES_S)
            while True:
                time.sleep(3600)  # noqa: ASYNC251  # that is the fault
        if self.settings.crash_on and self.settings.crash_on in said:
            await asyncio.sleep(_LAST_FRAMES_S)
            os._exit(86)
        if fails:
            raise error_named(self.settings.fail_code, self.settings.fail_text)

    async def _pause(self, until: float) -> None:
        """Waits until this event-loop time; a time that has passed costs nothing."""
        now = asyncio.get_running_loop().time
        while (left := until - now()) > 0:
            await self._clock.at(until if left <= _STEP_S else until - left + _STEP_S)
            self.steps += 1


class _Choice:
    """One choice on its way out: knows what was said and what is left."""

    def __init__(self, index: int, answer: EchoAnswer, *, prefix: str, alternatives: int | None, run: Run) -> None:
        self.index = index
        self.total = len(answer.pieces)
        self._answer = answer
        self._alternatives = alternatives
        self._visible = prefix + answer.text
        earlier = run.output_token_ids[index] if index < len(run.output_token_ids) else []
        self._position = min(len(earlier), self.total)
        #: Characters that the tokens up to the position have, stop string included.
        self._reached = len(prefix) + sum(len(piece) for piece in answer.pieces[: self._position])
        self._emitted = run.emitted_chars[index] if index < len(run.emitted_chars) else 0
        #: An earlier run has said all of it, the finish reason with the last token.
        self.ended = 0 < self._position == self.total and self._emitted >= len(self._visible)

    def next(self, count: int) -> Output:
        new = self._answer.pieces[self._position : self._position + count]
        self._position += len(new)
        self._reached += sum(map(len, new))
        self.ended = self._position >= self.total
        visible = self._visible[self._emitted : self._reached]
        self._emitted = max(self._emitted, min(self._reached, len(self._visible)))
        logprobs = [] if self._alternatives is None else [echo_logprob(piece, self._alternatives) for piece in new]
        return Output(
            choice=self.index,
            text=visible,
            token_ids=[token_id(piece) for piece in new],
            finish_reason=self._answer.finish_reason if self.ended else "",
            logprobs=logprobs,
        )


class _Clock:
    """Sleeps that share timers: all that wake in the same millisecond wake in one turn of the event loop."""

    def __init__(self) -> None:
        self._sleepers: dict[int, list[asyncio.Future[None]]] = {}

    def at(self, when: float) -> asyncio.Future[None]:
        """A future that is done at this event-loop time, at most a millisecond later."""
        loop = asyncio.get_running_loop()
        slot = int(when / _GRID_S) + 1
        sleeper = loop.create_future()
        sleepers = self._sleepers.get(slot)
        if sleepers is None:
            self._sleepers[slot] = [sleeper]
            loop.call_at(slot * _GRID_S, self._wake, slot)
        else:
            sleepers.append(sleeper)
        return sleeper

    def _wake(self, slot: int) -> None:
        for sleeper in self._sleepers.pop(slot):
            if not sleeper.done():
                sleeper.set_result(None)


def _adapted(run: Run, text: str) -> str:
    return text if run.adapter is None else f"[{run.adapter.name}] {text}"


def _said(message: ChatMessage) -> str:
    """The text of a message; a part that is no text leaves its type in brackets."""
    if isinstance(message.content, list):
        return "".join(
            part.text if isinstance(part, TextPart) else f" [{msgspec.to_builtins(part)['type']}]"
            for part in message.content
        )
    return message.content or ""


def _check(settings: EchoSettings) -> None:
    error_named(settings.fail_code, settings.fail_text)
    for name in ("delay_ms", "interval_ms", "chunk", "tokens", "start_delay_ms", "fail_after", "context_length"):
        if getattr(settings, name) < 0:
            raise ConfigurationError(f"parameter {name} must not be negative")
    for name in ("slots", "dimensions"):
        if getattr(settings, name) < 1:
            raise ConfigurationError(f"parameter {name} must be at least 1")
