"""The engine ``scripted``: a model that says what a script says, or what a request's schema asks for, on a real bus.

What it answers is decided in ``modelbus.testing``, where the same model is a client in one's own process.
"""

from __future__ import annotations

from collections.abc import AsyncIterator

import msgspec
from modelbus.testing.echo import count_tokens
from modelbus.testing.recording import Recordings
from modelbus.testing.script import Behaviour, Script, read_script
from modelbus.testing.scripted import Scripted, ScriptedFrame
from modelbus_broker.errors import ConfigurationError
from modelbus_broker.messages import (
    Capabilities,
    Chat,
    Classification,
    Completion,
    Delta,
    Done,
    Embedding,
    Score,
    Started,
    Task,
    Vectors,
)

from .base import Engine, EngineConfig, EngineOutput, Finished, Output, Prompt, Run, VectorBatch
from .limits import check_fits
from .params import read_params


class ScriptedSettings(Behaviour, frozen=True, kw_only=True):
    """The parameters of a ``scripted`` deployment: those of a script's behaviour, which win over the script's own, and these."""

    script: str = ""  #: path of a JSON file on the node, or the JSON itself
    replay: str = ""  #: path of a file of recorded requests and answers: these are given, and nothing else
    slots: int = 64
    context_length: int = 0  #: tokens; 0: no limit


class ScriptedEngine(Engine):
    """Follows a script; each worker counts its own requests."""

    name = "scripted"

    def __init__(self, config: EngineConfig) -> None:
        super().__init__(config)
        settings = self.settings = read_params(ScriptedSettings, config.params, engine=self.name)
        if settings.slots < 1 or settings.context_length < 0:
            raise ConfigurationError("parameter slots is at least 1, parameter context_length at least 0")
        if settings.script and settings.replay:
            raise ConfigurationError("parameters script and replay exclude each other")
        script = read_script(settings.script) if settings.script else Script()
        given = {name: getattr(settings, name) for name in config.params if name in Behaviour.__struct_fields__}
        self._scripted = Scripted(msgspec.structs.replace(script, **given))
        self._recordings: Recordings | None = None

    async def start(self) -> None:
        """
        Raises:
            ConfigurationError: the recordings cannot be read.
        """
        if self.settings.replay:
            self._recordings = Recordings.read(self.settings.replay)

    def capabilities(self) -> Capabilities:
        return msgspec.structs.replace(self._scripted.capabilities(), context_length=self.settings.context_length)

    @property
    def slots(self) -> int:
        return self.config.slots or self.settings.slots

    async def self_test(self) -> None:
        """Nothing: an answer of the script, or its turn to fail, must not be spent on it."""

    def chat(self, task: Chat, run: Run) -> AsyncIterator[EngineOutput]:
        prompt_tokens = sum(count_tokens(message.text()) for message in task.messages)
        return self._outputs(task, run, prompt_tokens, task.sampling.max_tokens)

    def completion(self, task: Completion, run: Run) -> AsyncIterator[EngineOutput]:
        prompt_tokens = sum(count_tokens(prompt) if isinstance(prompt, str) else len(prompt) for prompt in task.prompt)
        return self._outputs(task, run, prompt_tokens, task.sampling.max_tokens)

    def embedding(self, task: Embedding, run: Run) -> AsyncIterator[EngineOutput]:
        return self._outputs(task, run)

    def score(self, task: Score, run: Run) -> AsyncIterator[EngineOutput]:
        return self._outputs(task, run)

    def classification(self, task: Classification, run: Run) -> AsyncIterator[EngineOutput]:
        return self._outputs(task, run)

    async def _outputs(
        self, task: Task, run: Run, prompt_tokens: int = 0, max_tokens: int | None = None
    ) -> AsyncIterator[EngineOutput]:
        if self.settings.context_length:
            check_fits(prompt_tokens, max_tokens, self.settings.context_length)
        async for frame in self._frames(task):
            self.steps += 1
            match frame:
                case Started():
                    yield Prompt(run.prompt_tokens or frame.prompt_tokens)
                case Delta():
                    yield Output(
                        choice=frame.choice, text=frame.text, token_ids=frame.token_ids, reasoning=frame.reasoning,
                        finish_reason=frame.finish_reason, tool_calls=frame.tool_calls, logprobs=frame.logprobs,
                        refusal=frame.refusal,
                    )  # fmt: skip
                case Vectors():
                    yield VectorBatch(
                        start=frame.start, dimensions=frame.dimensions, data=frame.data, labels=frame.labels
                    )
                case Done():
                    yield Finished(usage=frame.usage)

    def _frames(self, task: Task) -> AsyncIterator[ScriptedFrame]:
        if self._recordings is not None:
            return self._recordings.frames(self.config.model, task)
        return self._scripted.frames(task)
