"""The port of an engine: the one thing to write when a new kind of model shall run behind the bus.

An engine is made with an ``EngineConfig``, started once, and then asked for answers by methods named after the
task (``chat``, ``completion``, ``embedding``, ``score``, ``classification``, ``decision``, ``storage``), each an async generator of typed outputs. The worker cancels the
task that iterates a generator to abort it: an engine must stop its work when its generator is closed.
"""

from __future__ import annotations

import asyncio
import difflib
import importlib.util
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Mapping
from contextlib import aclosing
from importlib.metadata import entry_points
from typing import Any, ClassVar, Literal

import msgspec
from modelbus_broker.asking import smallest_task
from modelbus_broker.errors import ConfigurationError, MissingExtra, UnsupportedField, UnsupportedHere
from modelbus_broker.messages import (
    Adapter,
    Capabilities,
    Chat,
    Classification,
    Completion,
    Decision,
    Embedding,
    FinishReason,
    Grounding,
    Rung,
    Sampling,
    Score,
    Storage,
    Task,
    TokenLogprob,
    ToolCallDelta,
    Usage,
)
from modelbus_broker.settings import BusSettings

from .adapters import AdapterReader
from .limits import check_sampling


class EngineConfig(msgspec.Struct, frozen=True, kw_only=True):
    """What a deployment says to its engine."""

    model: str
    params: Mapping[str, str] = {}  #: prefix cut, secrets resolved; see ``secret_params``
    secret_params: frozenset[str] = frozenset()  #: names whose values must never be shown
    model_path: str = ""
    pretrained_model_type: str = ""
    slots: int = 0  #: 0: the engine's own number
    gpus: tuple[int, ...] = ()
    cpus: float = 0.0
    bus: BusSettings | None = None  #: that the worker is on, for engines that ask other models

    def __repr__(self) -> str:
        shown = {k: "***" if k in self.secret_params else v for k, v in self.params.items()}
        return f"EngineConfig(model={self.model!r}, model_path={self.model_path!r}, params={shown!r})"


class Run(msgspec.Struct, frozen=True, kw_only=True):
    """What an engine may know of the request beyond its task."""

    id: str
    deadline: float = float("inf")  #: event-loop time
    output_token_ids: list[list[int]] = []  #: per choice: go on after these
    emitted_chars: list[int] = []  #: per choice: characters the client has; output starts after them
    prompt_tokens: int = 0  #: of the first attempt, 0 if this is it
    stream: bool = True
    traceparent: str = ""  #: of the run's span, or of who asked where the worker traces nothing
    tracestate: str = ""
    adapter: Adapter | None = None  #: only for engines whose capabilities have ``adapters``
    fail_fast: bool = False  #: other workers may do it: further tries of what can be retried are left to them


class Prompt(msgspec.Struct, frozen=True):
    """Optional first output: the prompt has been read."""

    tokens: int


class Output(msgspec.Struct, frozen=True, kw_only=True):
    """New output of one choice. ``finish_reason`` is set in the last one of each choice."""

    choice: int = 0
    text: str = ""
    token_ids: list[int] = []
    tokens: int = -1  #: how many tokens this is when the ids are not known; -1 = len(token_ids)
    finish_reason: FinishReason = ""
    reasoning: str = ""
    tool_calls: list[ToolCallDelta] = []
    logprobs: list[TokenLogprob] = []
    refusal: str = ""
    prompt_logprobs: list[
        TokenLogprob | None
    ] = []  #: one per prompt token, None for the first; in the choice's first output


class VectorBatch(msgspec.Struct, frozen=True, kw_only=True):
    """Results of inputs ``start``, ``start + 1``, ...; each ``dimensions`` little-endian float32.

    A vector per text for embeddings, one number per document for scores, a probability per class for classifications.
    """

    start: int
    dimensions: int
    data: list[bytes]
    labels: list[str] = []  #: of the dimensions, for classifications


class Encoded(msgspec.Struct, frozen=True):
    """An answer that is one encoded document, such as the reply of a search service."""

    data: bytes


class Finished(msgspec.Struct, frozen=True, kw_only=True):
    """The last output of every answer."""

    usage: Usage
    upstream_model: str = ""
    system_fingerprint: str = ""
    rung: Rung | Literal[""] = ""  #: how a form that was asked for was come by; "": none was asked for
    attempts: int = 0  #: how often the model was asked for it
    grounding: Grounding | None = None  #: what an answer out of documents was made of


class Attempted(msgspec.Struct, frozen=True, kw_only=True):
    """What attempts have used whose output nobody is shown; it takes the place of what was said of it before."""

    usage: Usage


EngineOutput = Prompt | Output | VectorBatch | Encoded | Finished | Attempted


class Engine(ABC):
    """The port. Subclasses override the tasks they serve and name them in their capabilities."""

    #: The name that deployments use.
    name: ClassVar[str]
    #: Modules that must be importable on a node that offers this engine, and the extra that brings them.
    needs: ClassVar[tuple[str, ...]] = ()
    extra: ClassVar[str] = ""
    #: Whether ``steps`` grows all the time while requests run, whatever they wait for. An engine that says so and then
    #: makes no step for ``engine_stall_s`` hangs, and its worker ends itself so that another is started.
    counts_steps: ClassVar[bool] = False
    #: What a deployment must say so that requests may name adapters, for the error text: ": it needs ...".
    adapters_need: ClassVar[str] = ""
    #: Names of parameters whose values are secrets: sealed on the bus, masked wherever they are shown.
    secrets: ClassVar[frozenset[str]] = frozenset({"api_key", "token", "secret_key", "access_token", "password"})

    def __init__(self, config: EngineConfig) -> None:
        self.config = config
        #: Counts engine steps; see ``counts_steps``.
        self.steps = 0
        self._adapter_reader = AdapterReader(config.model)
        self._one_reads = asyncio.Lock()

    @classmethod
    def missing(cls) -> str:
        """Why this engine cannot run here, in words for the user; "" if it can."""
        absent = [module for module in cls.needs if importlib.util.find_spec(module) is None]
        if not absent:
            return ""
        return f"engine {cls.name!r} needs {', '.join(absent)}: pip install 'modelbus[{cls.extra or cls.name}]'"

    @abstractmethod
    async def start(self) -> None:
        """Loads the model or checks the provider. Raises with words that help when it cannot."""

    @abstractmethod
    def capabilities(self) -> Capabilities:
        """What it can do with this model; known after ``start``."""

    @property
    @abstractmethod
    def slots(self) -> int:
        """How many requests it runs at once; known after ``start``."""

    @property
    def broken(self) -> str:
        """Why it can serve nothing any more, in words; "" while it can. Its worker ends then, and another is started."""
        return ""

    def compat(self) -> str:
        """What must be equal for another worker to go on from this one's tokens; "" if none can."""
        return ""

    async def self_test(self) -> None:
        """Makes one token (or one vector) for real. Raises in the engine's own words when that fails."""
        task = smallest_task(self.capabilities().tasks)
        assert task is not None, "an engine serves at least one task"
        async for _ in self.answer(task, Run(id="self-test", stream=False)):
            pass

    async def check_adapter(self, adapter: Adapter) -> str:
        """The fingerprint of an adapter's files, if it can be laid over the model; only with ``adapters``.

        Raises:
            AdapterUnavailable: why it cannot, and on which host; or its files are not those that it names.
        """
        async with self._one_reads:
            return await asyncio.to_thread(self._adapter_reader.fingerprint, adapter)

    def answer(self, task: Task, run: Run) -> AsyncIterator[EngineOutput]:
        """The answer to any task, by the method of its kind. An adapter that it names is checked first.

        Raises:
            InvalidRequest: a sampling field has a value that it cannot have.
            UnsupportedField: the request names an adapter and the engine takes none.
            UnsupportedHere: the request has a field that is not among the engine's ``extra_fields``.
        """
        if not isinstance(task, (Embedding, Decision, Storage)) and task.extra:
            self._check_extra(task.extra)
        if isinstance(task, (Chat, Completion)):
            check_sampling(task.sampling)
        if run.adapter is None:
            return self._by_kind(task, run)
        if not self.capabilities().adapters:
            raise UnsupportedField(
                f"model {self.config.model!r} takes no adapters{self.adapters_need}", param="adapter"
            )
        return self._with_adapter(task, run, run.adapter)

    def _check_extra(self, extra: Mapping[str, Any]) -> None:
        known = self.capabilities().extra_fields
        for field, value in extra.items():
            if value is not None and field not in known and "*" not in known:
                like = difflib.get_close_matches(field, {*Sampling.__struct_fields__, *known}, n=1)
                hint = f"; did you mean {like[0]!r}?" if like else ""
                raise UnsupportedHere(f"engine {self.name!r} does not know the field {field!r}{hint}", param=field)

    async def _with_adapter(self, task: Task, run: Run, adapter: Adapter) -> AsyncIterator[EngineOutput]:
        await self.check_adapter(adapter)
        async with aclosing(self._by_kind(task, run)) as outputs:  # type: ignore[type-var]  # all are async generators
            async for output in outputs:
                yield output

    def _by_kind(self, task: Task, run: Run) -> AsyncIterator[EngineOutput]:
        match task:
            case Chat():
                return self.chat(task, run)
            case Completion():
                return self.completion(task, run)
            case Embedding():
                return self.embedding(task, run)
            case Score():
                return self.score(task, run)
            case Classification():
                return self.classification(task, run)
            case Decision():
                return self.decision(task, run)
            case Storage():
                return self.storage(task, run)

    def chat(self, task: Chat, run: Run) -> AsyncIterator[EngineOutput]:
        raise UnsupportedField(f"model {self.config.model!r} does not serve chat", param="model")

    def completion(self, task: Completion, run: Run) -> AsyncIterator[EngineOutput]:
        raise UnsupportedField(f"model {self.config.model!r} does not serve text completion", param="model")

    def embedding(self, task: Embedding, run: Run) -> AsyncIterator[EngineOutput]:
        raise UnsupportedField(f"model {self.config.model!r} does not serve embeddings", param="model")

    def score(self, task: Score, run: Run) -> AsyncIterator[EngineOutput]:
        raise UnsupportedField(f"model {self.config.model!r} does not score documents", param="model")

    def classification(self, task: Classification, run: Run) -> AsyncIterator[EngineOutput]:
        raise UnsupportedField(f"model {self.config.model!r} does not classify texts", param="model")

    def storage(self, task: Storage, run: Run) -> AsyncIterator[EngineOutput]:
        raise UnsupportedField(f"model {self.config.model!r} is no search service", param="model")

    def decision(self, task: Decision, run: Run) -> AsyncIterator[EngineOutput]:
        raise UnsupportedField(
            f"model {self.config.model!r} gives no log probabilities of labels, which decisions are made of",
            param="model",
        )

    def metrics(self) -> str:
        """What the engine counts itself, in Prometheus's text format; called in the event loop now and then."""
        return ""

    async def close(self) -> None:  # noqa: B027  # most engines have nothing to let go of
        """Lets go of everything; no generator is open any more."""


def engine_class(name: str) -> type[Engine]:
    """The engine of this name, from the ``modelbus.engines`` entry points; its heavy imports happen in ``start``.

    Raises:
        ConfigurationError: there is no engine of this name.
        MissingExtra: its module cannot be imported here.
    """
    found = {point.name: point for point in entry_points(group="modelbus.engines")}
    if name not in found:
        raise ConfigurationError(f"there is no engine {name!r}; installed are: {', '.join(sorted(found))}")
    try:
        loaded = found[name].load()
    except ImportError as error:
        raise MissingExtra(f"engine {name!r} cannot be imported here: {error}") from error
    assert isinstance(loaded, type) and issubclass(loaded, Engine)
    return loaded


def engine_names() -> list[str]:
    return sorted({point.name for point in entry_points(group="modelbus.engines")})
