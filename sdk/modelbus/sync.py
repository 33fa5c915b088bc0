"""The blocking face of the SDK, in the shapes of byzerllm: ``connect_cluster``, ``LLM``, ``chat_oai``.

All objects share one connection on one background loop; they may be used from any thread.
"""

from __future__ import annotations

import atexit
import os
import threading
import time
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from modelbus_broker.errors import ConfigurationError, InvalidRequest, ModelBusError
from modelbus_broker.settings import BusSettings, bus_settings

from .background import BackgroundLoop
from .client import ChatAnswer, ChatStream, Client, Messages
from .deploying import DeployResult
from .spec import DeploySpec
from .stat import ModelStat

_background = BackgroundLoop()
_lock = threading.Lock()
_client: Client | None = None
_client_pid = 0
_settings: BusSettings | None = None


@dataclass(frozen=True)
class LLMResponse:
    """One answer.

    ``metadata`` has request_id, input_tokens_count, generated_tokens_count, time_cost and first_token_time (ms),
    speed (output tokens/s), prob, finish_reason and reasoning_content.
    """

    output: Any  #: text, or the vector of an embedding
    input: Any  #: the last user's turn, or the text that was embedded
    metadata: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class LLMRequest:
    """What to embed: a text or several."""

    instruction: str | list[str]
    embedding: bool = False


@dataclass(frozen=True)
class SingleOutputMeta:
    """What is known beside the text of a streamed answer so far."""

    input_tokens_count: int = 0
    generated_tokens_count: int = 0
    reasoning_content: str = ""
    finish_reason: str = ""
    first_token_time: float = 0.0  #: ms
    request_id: str = ""


def connect_cluster(address: str = "auto", creds: str = "") -> None:
    """Connects this process to the bus; everything in it shares the connection. Does nothing when connected there.

    Args:
        address: ``nats://HOST:PORT``; "auto" is MODELBUS_ADDRESS, else the bus of `modelbus start` on this host.
        creds: path of a credential file.

    Raises:
        BusUnavailable: nothing says where the bus is, or it does not answer.
        AuthenticationFailed: it refuses the credentials.
    """
    global _client, _client_pid, _settings
    settings = bus_settings(address, creds)
    with _lock:
        if _client is not None and _client_pid == os.getpid():
            if settings == _settings:
                return
            _background.run(_client.close())
            _client = None
        _client = _background.run(Client.open(settings))
        _client_pid, _settings = os.getpid(), settings


def disconnect() -> None:
    """Cancels what still runs, closes the connection and ends the background loop."""
    global _client
    with _lock:
        client, _client = _client, None
        if client is not None and _client_pid == os.getpid():
            with suppress(ModelBusError):
                _background.run(client.close())
            _background.stop()


atexit.register(disconnect)


def _connected() -> Client:
    if _client is None or _client_pid != os.getpid():
        connect_cluster()
    assert _client is not None
    return _client


class LLM:
    """Models behind the bus, for blocking callers.

    ``LLM("chat")`` asks the model ``chat`` wherever a call names none. The connection is made on first use.
    """

    def __init__(self, model: str = "") -> None:
        self.default_model_name = model
        self.default_emb_model_name = ""
        self._deploy: dict[str, Any] = {}
        self._infer_params: dict[str, str] = {}

    def __repr__(self) -> str:
        return f"LLM({self.default_model_name!r})"

    @classmethod
    def from_default_model(cls, model: str, auto_connect_cluster: bool = True) -> LLM:
        """A client of one model; with ``auto_connect_cluster`` it connects now and not on first use."""
        if auto_connect_cluster:
            _connected()
        return cls(model)

    def setup_default_model_name(self, model: str) -> LLM:
        self.default_model_name = model
        return self

    def setup_default_emb_model_name(self, model: str) -> LLM:
        self.default_emb_model_name = model
        return self

    # Asking

    def chat_oai(
        self,
        conversations: Messages,
        *,
        model: str | None = None,
        llm_config: Mapping[str, Any] | None = None,
        only_return_prompt: bool = False,
        extra_request_params: Mapping[str, Any] | None = None,
    ) -> list[LLMResponse]:
        """The whole answer to a conversation; one item per choice.

        Args:
            conversations: messages in the form of the OpenAI API; a string is one turn of the user.
            model: "" or None is the default.
            llm_config: ``temperature``, ``top_p``, ``max_length``, ``stop``, ... with or without ``gen.``.
            only_return_prompt: do not ask; the item has the input and no output.
            extra_request_params: more fields for the engine.

        Raises:
            ModelBusError: one of its subclasses, see ``modelbus.errors``.
        """
        name = self._model(model)
        said = _last_turn(conversations)
        if only_return_prompt:
            return [LLMResponse(output="", input=said)]
        stream = _connected().stream(name, conversations, **request_fields(llm_config, extra_request_params))
        answer = _background.run(_read_all(stream))
        return [
            LLMResponse(
                output=choice.text,
                input=said,
                metadata={
                    "request_id": answer.id,
                    "input_tokens_count": answer.usage.prompt_tokens,
                    "generated_tokens_count": answer.usage.completion_tokens,
                    "time_cost": answer.time_cost_ms,
                    "first_token_time": stream.first_token_ms,
                    "speed": answer.usage.completion_tokens / max(answer.time_cost_ms / 1000, 1e-6),
                    "prob": sum(logprob.logprob for logprob in choice.logprobs) if choice.logprobs else -1.0,
                    "finish_reason": choice.finish_reason,
                    "reasoning_content": choice.reasoning,
                },
            )
            for choice in answer.choices
        ]

    def stream_chat_oai(
        self,
        conversations: Messages,
        *,
        model: str | None = None,
        llm_config: Mapping[str, Any] | None = None,
        delta_mode: bool = False,
        extra_request_params: Mapping[str, Any] | None = None,
    ) -> Iterator[tuple[str, SingleOutputMeta]]:
        """The answer as it comes: the whole text so far each time, or with ``delta_mode`` what is new.

        The last item has the final counts. Closing the iterator early cancels the request.

        Raises:
            ModelBusError: one of its subclasses; also in the middle, when the answer breaks off.
        """
        reader = self._reader(conversations, model, llm_config, delta_mode, extra_request_params)
        return _blocking(reader)

    async def async_stream_chat_oai(
        self,
        conversations: Messages,
        *,
        model: str | None = None,
        llm_config: Mapping[str, Any] | None = None,
        delta_mode: bool = False,
        extra_request_params: Mapping[str, Any] | None = None,
    ) -> AsyncIterator[tuple[str, SingleOutputMeta]]:
        """As ``stream_chat_oai``, on the caller's event loop, over a connection of its own."""
        fields = request_fields(llm_config, extra_request_params)
        async with await Client.open(_settings or bus_settings()) as client:
            async for item in _items(client.stream(self._model(model), conversations, **fields), delta_mode):
                yield item

    def emb(self, model: str | None, request: LLMRequest | str | Sequence[LLMRequest | str]) -> list[LLMResponse]:
        """The vectors of texts, one item per text, all in one request.

        Raises:
            ModelBusError: one of its subclasses, see ``modelbus.errors``.
        """
        name = model or self.default_emb_model_name or self._model(None)
        items = [request] if isinstance(request, (LLMRequest, str)) else list(request)
        texts: list[str] = []
        for item in items:
            said = item.instruction if isinstance(item, LLMRequest) else item
            texts += [said] if isinstance(said, str) else said
        started = time.monotonic()
        answer = _background.run(_connected().embed(name, texts))
        metadata = {
            "request_id": answer.id,
            "input_tokens_count": answer.usage.prompt_tokens,
            "generated_tokens_count": 0,
            "time_cost": (time.monotonic() - started) * 1000,
        }
        return [
            LLMResponse(output=vector, input=text, metadata=dict(metadata))
            for text, vector in zip(texts, answer.vectors, strict=True)
        ]

    def emb_query(self, query: str, model: str | None = None) -> list[LLMResponse]:
        """The vector of one text."""
        return self.emb(model, query)

    # Deploying

    def setup_num_workers(self, num_workers: int) -> LLM:
        return self._set(num_workers=num_workers)

    def setup_worker_concurrency(self, worker_concurrency: int) -> LLM:
        return self._set(worker_concurrency=worker_concurrency)

    def setup_cpus_per_worker(self, cpus: float) -> LLM:
        return self._set(cpus_per_worker=cpus)

    def setup_gpus_per_worker(self, gpus: float) -> LLM:
        return self._set(gpus_per_worker=gpus)

    def setup_infer_backend(self, backend: str) -> LLM:
        return self._set(infer_backend=backend)

    def setup(self, name: str, value: Any) -> LLM:
        """One more parameter of the next deploy, such as ``resource.big``."""
        self._infer_params[name] = str(value)
        return self

    def setup_reset(self) -> LLM:
        """Forgets all deploy settings."""
        self._deploy.clear()
        self._infer_params.clear()
        return self

    def deploy(
        self,
        model_path: str = "",
        pretrained_model_type: str = "custom/auto",
        udf_name: str = "",
        infer_params: Mapping[str, Any] | None = None,
    ) -> DeployResult:
        """Brings a model up under the name ``udf_name`` and returns when it can answer.

        Raises:
            DeploymentFailed: it did not come up; everything is as before.
        """
        params = {**self._infer_params, **{name: str(value) for name, value in (infer_params or {}).items()}}
        spec = DeploySpec(
            model=udf_name or self._model(None),
            model_path=model_path,
            pretrained_model_type=pretrained_model_type,
            infer_params=params,
            **self._deploy,
        )
        return _background.run(_connected().deploy(spec))

    def undeploy(self, udf_name: str, force: bool = False) -> None:
        """Takes a model down; ``force`` drops requests that still wait.

        Raises:
            ModelNotFound: it is not deployed.
            UndeployRefused: requests wait.
        """
        _background.run(_connected().undeploy(udf_name, drop=force))

    def is_model_exist(self, udf_name: str) -> bool:
        return any(info.model == udf_name for info in _background.run(_connected().models()))

    def stat(self, model: str | None = None) -> ModelStat:
        """How busy the workers of a model are."""
        return _background.run(_connected().stat(self._model(model)))

    def _set(self, **fields: Any) -> LLM:
        self._deploy.update(fields)
        return self

    def _model(self, model: str | None) -> str:
        name = model or self.default_model_name
        if not name:
            raise ConfigurationError("no model is named: LLM('chat'), setup_default_model_name('chat') or model='chat'")
        return name

    def _reader(
        self,
        conversations: Messages,
        model: str | None,
        llm_config: Mapping[str, Any] | None,
        delta_mode: bool,
        extra: Mapping[str, Any] | None,
    ) -> AsyncIterator[tuple[str, SingleOutputMeta]]:
        fields = request_fields(llm_config, extra)
        return _items(_connected().stream(self._model(model), conversations, **fields), delta_mode)


#: The seed's name for the same thing.
ByzerLLM = LLM

#: Names that the seed and other libraries have for fields of the OpenAI API.
_FIELD_NAMES = {
    "max_length": "max_tokens",
    "max_new_tokens": "max_tokens",
    "max_output_length": "max_tokens",
    "max_completion_tokens": "max_tokens",
    "stopping_sequences": "stop",
}


def request_fields(llm_config: Mapping[str, Any] | None, extra: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The seed's ``llm_config`` as fields of a request: ``gen.`` and ``generation.`` are cut, old names translated.

    Raises:
        InvalidRequest: two of its keys mean the same field and differ.
    """
    fields: dict[str, Any] = {}
    for key, value in {**(llm_config or {}), **(extra or {})}.items():
        name = key.removeprefix("generation.").removeprefix("gen.")
        name = _FIELD_NAMES.get(name, name)
        if name in fields and fields[name] != value:
            raise InvalidRequest(f"llm_config gives {name} twice, once as {key}", param=name)
        fields[name] = value
    return fields


async def _read_all(stream: ChatStream) -> ChatAnswer:
    async with stream:
        async for _ in stream:
            pass
        return stream.answer


async def _items(stream: ChatStream, delta_mode: bool) -> AsyncIterator[tuple[str, SingleOutputMeta]]:
    """Of the first choice; the seed's stream has no more."""
    text = reasoning = finish = ""
    tokens = 0

    def meta(piece: str) -> SingleOutputMeta:
        return SingleOutputMeta(
            input_tokens_count=stream.usage.prompt_tokens,
            generated_tokens_count=max(stream.usage.completion_tokens, tokens),
            reasoning_content=piece,
            finish_reason=finish,
            first_token_time=stream.first_token_ms,
            request_id=stream.id,
        )

    async with stream:
        async for delta in stream:
            if delta.choice != 0:
                continue
            text += delta.text
            reasoning += delta.reasoning
            tokens = max(tokens, delta.position)
            finish = delta.finish_reason or finish
            if delta_mode:
                yield delta.text, meta(delta.reasoning)
            else:
                yield text, meta(reasoning)
        yield ("", meta("")) if delta_mode else (text, meta(reasoning))


def _blocking(reader: AsyncIterator[tuple[str, SingleOutputMeta]]) -> Iterator[tuple[str, SingleOutputMeta]]:
    async def following() -> tuple[str, SingleOutputMeta] | None:
        return await anext(reader, None)

    async def close() -> None:
        await reader.aclose()  # type: ignore[attr-defined]  # it is a generator of ours

    try:
        while (item := _background.run(following())) is not None:
            yield item
    finally:
        _background.run(close())


def _last_turn(conversations: Messages) -> str:
    if isinstance(conversations, str):
        return conversations
    for item in reversed(conversations):
        role = item.get("role") if isinstance(item, Mapping) else item.role
        if role == "user":
            content = item.get("content") if isinstance(item, Mapping) else item.text()
            return content if isinstance(content, str) else str(content or "")
    return ""
