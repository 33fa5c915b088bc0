"""The asyncio client: models behind the bus as typed calls.

``async with modelbus.connect() as client`` opens one connection; everything is asked over it. Cancelling the task
that waits for an answer cancels the request on the bus.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Generator, Mapping, Sequence
from types import TracebackType
from typing import Any, Self

import msgspec
from modelbus_broker.asking import CallOptions
from modelbus_broker.calls import Call
from modelbus_broker.cancelling import cancel
from modelbus_broker.connection import Bus
from modelbus_broker.errors import BusUnavailable, InvalidRequest
from modelbus_broker.messages import (
    Cancelled,
    Chat,
    ChatMessage,
    Classification,
    Delta,
    Embedding,
    FinishReason,
    Sampling,
    Score,
    Task,
    TokenLogprob,
    ToolCall,
    ToolCallDelta,
    Usage,
)
from modelbus_broker.names import model_token
from modelbus_broker.publisher import Publisher
from modelbus_broker.registry import Registry
from modelbus_broker.settings import BusSettings, bus_settings
from modelbus_broker.topology import declare_bus, depths

from . import deploying
from .answers import AnswerBuilder, ChoiceAnswer, collect, floats
from .spec import DeploySpec
from .stat import ModelInfo, ModelStat, model_info, stat_of

#: A conversation: one user's text, typed messages, or mappings in the form of the OpenAI API.
Messages = str | Sequence[ChatMessage | Mapping[str, Any]]


class ChatAnswer(msgspec.Struct, frozen=True, kw_only=True):
    """A whole answer to a conversation."""

    id: str
    model: str
    choices: list[ChoiceAnswer]
    usage: Usage
    time_cost_ms: float = 0.0  #: from the call to the last token

    @property
    def text(self) -> str:
        """Of the first choice."""
        return self.choices[0].text if self.choices else ""

    @property
    def reasoning(self) -> str:
        return self.choices[0].reasoning if self.choices else ""

    @property
    def finish_reason(self) -> FinishReason:
        return self.choices[0].finish_reason if self.choices else ""

    @property
    def tool_calls(self) -> list[ToolCall]:
        return self.choices[0].tool_calls if self.choices else []


class ChatDelta(msgspec.Struct, frozen=True, kw_only=True):
    """New output of one choice of a streamed answer."""

    choice: int = 0
    text: str = ""
    position: int = 0  #: output tokens of this choice so far; 0 = not known
    reasoning: str = ""
    tool_calls: list[ToolCallDelta] = []
    finish_reason: FinishReason = ""  #: set in the last delta of a choice
    logprobs: list[TokenLogprob] = []
    refusal: str = ""


class EmbeddingAnswer(msgspec.Struct, frozen=True, kw_only=True):
    """Vectors, in the order of the texts."""

    id: str
    model: str
    vectors: list[list[float]]
    dimensions: int
    usage: Usage


class RankedDocument(msgspec.Struct, frozen=True, kw_only=True):
    """A document, and how well it answers the query."""

    index: int  #: among the documents that were given
    score: float
    text: str


class Ranking(msgspec.Struct, frozen=True, kw_only=True):
    """Documents, the best first."""

    id: str
    model: str
    documents: list[RankedDocument]
    usage: Usage


class ClassifiedText(msgspec.Struct, frozen=True, kw_only=True):
    """One text's class, and the probability of each."""

    label: str
    probabilities: dict[str, float]


class ClassificationAnswer(msgspec.Struct, frozen=True, kw_only=True):
    """Classes, in the order of the texts."""

    id: str
    model: str
    texts: list[ClassifiedText]
    usage: Usage


class ChatStream:
    """A streamed answer: iterate it for its deltas.

    Inside ``async with`` leaving early cancels the request at once; so does cancelling the task. ``usage`` and
    ``answer`` are complete when the iteration has ended.
    """

    def __init__(self, publisher: Publisher, model: str, task: Chat, options: CallOptions) -> None:
        self.model = model
        self._publisher = publisher
        self._task = task
        self._options = options
        self._call: Call | None = None
        self._builder = AnswerBuilder()
        self._started = time.monotonic()
        self._deltas: AsyncIterator[ChatDelta] | None = None
        self.first_token_ms = 0.0  #: from the call to the first output

    @property
    def id(self) -> str:
        """Of the request; "" before it is queued."""
        return self._call.id if self._call else ""

    @property
    def usage(self) -> Usage:
        return self._builder.usage

    @property
    def answer(self) -> ChatAnswer:
        """What has come so far, put together."""
        elapsed_ms = (time.monotonic() - self._started) * 1000
        return ChatAnswer(
            id=self.id, model=self.model, choices=self._builder.choices, usage=self.usage, time_cost_ms=elapsed_ms
        )

    async def start(self) -> None:
        """Queues the request; iterating does it too.

        Raises:
            ModelNotFound, ModelUnavailable, QueueFull, BusUnavailable: see the errors.
        """
        if self._call is None:
            self._call = await self._publisher.submit(self.model, self._task, self._options)

    async def aclose(self) -> None:
        """Ends the request if it still runs."""
        if self._call is not None:
            await self._call.cancel()

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> ChatDelta:
        if self._deltas is None:
            self._deltas = self._read()
        return await anext(self._deltas)

    async def _read(self) -> AsyncIterator[ChatDelta]:
        await self.start()
        assert self._call is not None
        async with self._call as call:
            async for batch in call.batches():
                for frame in batch:
                    self._builder.add(frame)
                    if isinstance(frame, Delta):
                        if not self.first_token_ms:
                            self.first_token_ms = (time.monotonic() - self._started) * 1000
                        yield _chat_delta(frame)


class Client:
    """An open connection to the bus. Made by :func:`connect`."""

    def __init__(self, bus: Bus, registry: Registry, publisher: Publisher) -> None:
        self.bus = bus
        self.registry = registry
        self.publisher = publisher

    @classmethod
    async def open(cls, settings: BusSettings, *, declare: bool = False) -> Client:
        """Connects; with ``declare`` it makes the streams and buckets that a fresh bus lacks.

        Raises:
            BusUnavailable: no bus answers there, or it has never been declared.
            AuthenticationFailed: it refuses the credentials.
        """
        bus = await Bus.connect(settings, name="modelbus-sdk")
        try:
            if declare:
                await declare_bus(bus)
            registry = Registry(bus)
            await registry.start()
            publisher = Publisher(bus, registry, kind="sdk")
            await publisher.start()
        except BaseException:
            await bus.close()
            raise
        return cls(bus, registry, publisher)

    async def close(self) -> None:
        """Cancels what still runs and disconnects."""
        await self.publisher.close()
        await self.registry.close()
        await self.bus.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def chat(
        self, model: str, messages: Messages, *, options: CallOptions | None = None, **fields: Any
    ) -> ChatAnswer:
        """The whole answer to a conversation.

        Args:
            model: its name on the bus.
            messages: a text is one turn of the user.
            options: budget, lane, tenant, ...
            fields: fields of ``Sampling`` (``temperature=0``, ``max_tokens=10``) and of ``Chat``
                (``tools=``, ``response_format=``); others go to the engine, which refuses what it does not know.

        Raises:
            ModelBusError: one of its subclasses, see ``modelbus.errors``.
        """
        started = time.monotonic()
        task = chat_task(messages, fields)
        call = await self.publisher.publish(model, task, _plain(options))
        builder = await collect(call)
        return ChatAnswer(
            id=call.id,
            model=model,
            choices=builder.choices,
            usage=builder.usage,
            time_cost_ms=(time.monotonic() - started) * 1000,
        )

    def stream(
        self, model: str, messages: Messages, *, options: CallOptions | None = None, **fields: Any
    ) -> ChatStream:
        """An answer as it comes; see ``chat`` for the arguments and :class:`ChatStream` for its use."""
        return ChatStream(self.publisher, model, chat_task(messages, fields), options or CallOptions())

    async def embed(
        self,
        model: str,
        texts: str | Sequence[str],
        *,
        dimensions: int | None = None,
        options: CallOptions | None = None,
    ) -> EmbeddingAnswer:
        """The vectors of texts.

        Raises:
            ModelBusError: one of its subclasses, see ``modelbus.errors``.
        """
        inputs: list[str | list[int]] = [texts] if isinstance(texts, str) else list(texts)
        if not inputs:
            raise InvalidRequest("there is no text to embed", param="input")
        task: Task = Embedding(input=inputs, dimensions=dimensions)
        call = await self.publisher.publish(model, task, _plain(options))
        builder = await collect(call)
        return EmbeddingAnswer(
            id=call.id,
            model=model,
            vectors=[floats(vector) for vector in builder.vectors],
            dimensions=builder.dimensions,
            usage=builder.usage,
        )

    async def rerank(
        self,
        model: str,
        query: str,
        documents: Sequence[str],
        *,
        top_n: int | None = None,
        options: CallOptions | None = None,
    ) -> Ranking:
        """The documents, those that answer the query best first.

        Args:
            top_n: only so many of them; None: all.

        Raises:
            ModelBusError: one of its subclasses, see ``modelbus.errors``.
        """
        if not documents:
            raise InvalidRequest("there is no document to rank", param="documents")
        if top_n is not None and top_n < 1:
            raise InvalidRequest(f"top_n must be at least 1, not {top_n}", param="top_n")
        task = Score(queries=[query], documents=list(documents))
        call = await self.publisher.publish(model, task, _plain(options))
        builder = await collect(call)
        scores = [floats(vector)[0] for vector in builder.vectors]
        order = sorted(range(len(scores)), key=lambda index: -scores[index])[:top_n]
        ranked = [RankedDocument(index=index, score=scores[index], text=documents[index]) for index in order]
        return Ranking(id=call.id, model=model, documents=ranked, usage=builder.usage)

    async def classify(
        self, model: str, texts: str | Sequence[str], *, options: CallOptions | None = None
    ) -> ClassificationAnswer:
        """The classes of texts.

        Raises:
            ModelBusError: one of its subclasses, see ``modelbus.errors``.
        """
        inputs: list[str | list[int]] = [texts] if isinstance(texts, str) else list(texts)
        if not inputs:
            raise InvalidRequest("there is no text to classify", param="input")
        call = await self.publisher.publish(model, Classification(input=inputs), _plain(options))
        builder = await collect(call)
        classified = []
        for vector in builder.vectors:
            probabilities = dict(zip(builder.labels, floats(vector), strict=True))
            label = max(probabilities, key=lambda name: probabilities[name])
            classified.append(ClassifiedText(label=label, probabilities=probabilities))
        return ClassificationAnswer(id=call.id, model=model, texts=classified, usage=builder.usage)

    async def cancel(self, request_id: str) -> Cancelled:
        """Cancels a request of anybody by its id; says what had become of it until then.

        Raises:
            InvalidRequest: the text is no request id.
            BusUnavailable: the bus does not answer.
        """
        return await cancel(self.bus, request_id)

    async def models(self) -> list[ModelInfo]:
        """What is deployed, by name, with how busy it is."""
        await self.registry.refresh()
        try:
            waiting = await depths(self.bus)
        except BusUnavailable:
            waiting = {}
        found = []
        for model in self.registry.models():
            workers = self.registry.workers_of(model)
            busy = sum(worker.busy for worker in workers)
            # The streams hold what runs as well.
            queued = max(waiting.get(model_token(model), 0) - busy, 0)
            found.append(model_info(model, self.registry.deployments_of(model), workers, queued=queued))
        return found

    async def stat(self, model: str) -> ModelStat:
        """How busy the workers of a model are.

        Raises:
            ModelNotFound: it is not deployed.
        """
        await self.registry.refresh()
        return stat_of(self.registry, model)

    async def deploy(
        self, spec: DeploySpec, on_progress: deploying.Progress = deploying.no_progress
    ) -> deploying.DeployResult:
        """See :func:`modelbus.deploying.deploy`."""
        return await deploying.deploy(self.bus, self.registry, self.publisher, spec, on_progress)

    async def undeploy(
        self,
        model: str,
        *,
        drain: bool = False,
        drop: bool = False,
        timeout_s: float = 600.0,
        on_progress: deploying.Progress = deploying.no_progress,
    ) -> deploying.UndeployResult:
        """See :func:`modelbus.deploying.undeploy`."""
        return await deploying.undeploy(
            self.bus, self.registry, model, drain=drain, drop=drop, timeout_s=timeout_s, on_progress=on_progress
        )


class Connecting:
    """What :func:`connect` gives: await it for a client, or open it with ``async with``."""

    def __init__(self, settings: BusSettings) -> None:
        self._settings = settings
        self._client: Client | None = None

    def __await__(self) -> Generator[Any, None, Client]:
        return Client.open(self._settings).__await__()

    async def __aenter__(self) -> Client:
        self._client = await Client.open(self._settings)
        return self._client

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._client is not None:
            await self._client.close()


def connect(
    address: str = "", creds: str = "", *, tls_ca: str = "", tls_cert: str = "", tls_key: str = ""
) -> Connecting:
    """A client of the bus: ``client = await connect()``, or ``async with connect() as client``.

    Args:
        address: ``nats://HOST:PORT``; "" or "auto" is MODELBUS_ADDRESS, else the bus of `modelbus start` on this host.
        creds: path of a credential file; "" is MODELBUS_CREDS, else that of this host's bus.

    Raises:
        BusUnavailable: nothing says where the bus is.
    """
    return Connecting(bus_settings(address, creds, tls_ca=tls_ca, tls_cert=tls_cert, tls_key=tls_key))


def chat_task(messages: Messages, fields: Mapping[str, Any]) -> Chat:
    """A typed task of messages in any accepted form and of fields by name.

    Raises:
        InvalidRequest: a message or a field has the wrong type; ``param`` names it.
    """
    sampling = {name: value for name, value in fields.items() if name in _SAMPLING_FIELDS}
    chat = {name: value for name, value in fields.items() if name in _CHAT_FIELDS}
    extra = {name: value for name, value in fields.items() if name not in _SAMPLING_FIELDS | _CHAT_FIELDS}
    if isinstance(sampling.get("stop"), str):
        sampling["stop"] = [sampling["stop"]]
    if extra:
        chat["extra"] = {**chat.get("extra", {}), **extra}
    given: dict[str, Any] = {"type": "chat", "messages": _plain_messages(messages), "sampling": sampling, **chat}
    try:
        task = msgspec.convert(given, Chat)
    except msgspec.ValidationError as error:
        words, _, path = str(error).partition(" - at `$.")
        raise InvalidRequest(str(error), param=path.rstrip("`").removeprefix("sampling.")) from error
    if not task.messages:
        raise InvalidRequest("the conversation is empty", param="messages")
    return task


def _plain(options: CallOptions | None) -> CallOptions:
    """For a caller who gets the answer as a whole, which can therefore begin anew."""
    return _PLAIN if options is None else msgspec.structs.replace(options, stream=False)


_PLAIN = CallOptions(stream=False)
_SAMPLING_FIELDS = frozenset(Sampling.__struct_fields__)
_CHAT_FIELDS = frozenset(Chat.__struct_fields__) - {"messages", "sampling"}


def _plain_messages(messages: Messages) -> list[Any]:
    if isinstance(messages, str):
        return [{"role": "user", "content": messages}]
    return [msgspec.to_builtins(item) if isinstance(item, ChatMessage) else dict(item) for item in messages]


def _chat_delta(frame: Delta) -> ChatDelta:
    return ChatDelta(
        choice=frame.choice,
        text=frame.text,
        position=frame.position,
        reasoning=frame.reasoning,
        tool_calls=frame.tool_calls,
        finish_reason=frame.finish_reason,
        logprobs=frame.logprobs,
        refusal=frame.refusal,
    )
