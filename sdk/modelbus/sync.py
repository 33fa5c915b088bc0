"""The blocking face of the SDK, in the shapes of byzerllm: ``connect_cluster``, ``LLM``, ``chat_oai``.

All objects share one connection on one background loop; they may be used from any thread.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, TypeVar, cast, overload

from modelbus_broker.errors import ConfigurationError, InvalidRequest
from modelbus_broker.jobs import KEPT_S
from modelbus_broker.messages import AdapterRecord, Ladder

from .answer_types import ChatAnswer
from .deploying import DeployResult
from .jobs import Progress, Row
from .jobs.blocking import BlockingJob, job
from .llm_config import request_fields
from .model_client import Messages
from .responses import (
    LLMClassResponse,
    LLMFunctionCallResponse,
    LLMRequest,
    LLMResponse,
    SingleOutputMeta,
    call_response,
    class_response,
    last_turn,
    metadata_of,
)
from .shared import asked, background, connected, shared_client
from .spec import DeploySpec
from .stat import ModelStat
from .streams import ChatStream

if TYPE_CHECKING:
    from .tools import ToolLike, ToolSet

T = TypeVar("T")

#: A query and a document.
Pair = tuple[str, str]


class LLM:
    """Models behind the bus, for blocking callers.

    ``LLM("chat")`` asks the model ``chat`` wherever a call names none. The connection is made on first use.
    """

    def __init__(self, model: str = "") -> None:
        self.default_model_name = model
        self.default_emb_model_name = ""
        self.default_re_rank_model_name = ""
        self._deploy: dict[str, Any] = {}
        self._infer_params: dict[str, str] = {}

    def __repr__(self) -> str:
        return f"LLM({self.default_model_name!r})"

    @classmethod
    def from_default_model(cls, model: str, auto_connect_cluster: bool = True) -> LLM:
        """A client of one model; with ``auto_connect_cluster`` it connects now and not on first use."""
        if auto_connect_cluster:
            asked()
        return cls(model)

    def setup_default_model_name(self, model: str) -> LLM:
        self.default_model_name = model
        return self

    def setup_default_emb_model_name(self, model: str) -> LLM:
        self.default_emb_model_name = model
        return self

    def setup_default_re_rank_model_name(self, model: str) -> LLM:
        self.default_re_rank_model_name = model
        return self

    # Asking

    @overload
    def chat_oai(
        self, conversations: Messages, *, response_class: type[T], model: str | None = None,
        llm_config: Mapping[str, Any] | None = None, response_after_chat: bool = False,
        only_return_prompt: Literal[False] = False, extra_request_params: Mapping[str, Any] | None = None,
    ) -> list[LLMClassResponse[T]]: ...  # fmt: skip
    @overload
    def chat_oai(
        self, conversations: Messages, *, tools: Sequence[ToolLike | ToolSet], tool_choice: ToolLike | str | None = None,
        execute_tool: bool = False, func_params: Mapping[str, Any] | None = None, model: str | None = None,
        llm_config: Mapping[str, Any] | None = None, only_return_prompt: Literal[False] = False,
        extra_request_params: Mapping[str, Any] | None = None,
    ) -> list[LLMFunctionCallResponse]: ...  # fmt: skip
    @overload
    def chat_oai(
        self, conversations: Messages, *, model: str | None = None, llm_config: Mapping[str, Any] | None = None,
        only_return_prompt: bool = False, extra_request_params: Mapping[str, Any] | None = None,
    ) -> list[LLMResponse]: ...  # fmt: skip
    def chat_oai(
        self,
        conversations: Messages,
        *,
        model: str | None = None,
        llm_config: Mapping[str, Any] | None = None,
        response_class: type[T] | None = None,
        response_after_chat: bool = False,
        tools: Sequence[ToolLike | ToolSet] = (),
        tool_choice: ToolLike | str | None = None,
        execute_tool: bool = False,
        func_params: Mapping[str, Any] | None = None,
        only_return_prompt: bool = False,
        extra_request_params: Mapping[str, Any] | None = None,
    ) -> list[LLMResponse] | list[LLMClassResponse[T]] | list[LLMFunctionCallResponse]:
        """The whole answer to a conversation; one item per choice.

        Args:
            conversations: messages in the form of the OpenAI API; a string is one turn of the user.
            model: "" or None is the default.
            llm_config: ``temperature``, ``top_p``, ``max_length``, ``stop``, ... with or without ``gen.``.
            response_class: the answer becomes an object of this class, in ``value``; any type of a prompt function's
                return annotation will do.
            response_after_chat: with ``response_class``: the model writes freely first.
            tools: functions that the model may call; see ``modelbus.tools``.
            tool_choice: one of them, or its name: that one is called; ``required``: one of them is.
            execute_tool: they are called, and ``values`` has what they return; an exception that one raises is raised
                here. Without it ``calls`` has what the model wants to be called.
            func_params: values of the functions' parameters that the model is not told of (``Injected``).
            only_return_prompt: do not ask; the item has the input and no output.
            extra_request_params: more fields for the engine.

        Raises:
            InvalidRequest: ``response_class`` and ``tools`` are given both.
            OutputError: the answer does not become an object of the class, or a call; it carries the model's words.
            ModelBusError: one of its subclasses, see ``modelbus.errors``.
        """
        name = self._model(model)
        said = last_turn(conversations)
        fields = request_fields(llm_config, extra_request_params)
        if response_class is not None and tools:
            raise InvalidRequest("chat_oai takes response_class or tools, not both", param="tools")
        if only_return_prompt:
            return [LLMResponse(output="", input=said)]
        if tools:
            from .tools import ToolSet

            choice = tool_choice
            if choice is not None and not isinstance(choice, str):
                (choice,) = ToolSet(choice).names
            calling = call_response(
                asked(), name, conversations, tools,
                choice=choice, execute=execute_tool, inject=func_params, fields=fields,
            )  # fmt: skip
            return [background.run(calling)]
        if response_class is not None:
            ladder = Ladder(reason_first=response_after_chat)
            return [background.run(class_response(asked(), name, conversations, response_class, fields, ladder))]
        stream = asked().stream(name, conversations, **fields)
        answer = background.run(stream.read())
        return [
            LLMResponse(
                output=choice.text,
                input=said,
                metadata={
                    **metadata_of(
                        answer.id, answer.usage, answer.time_cost_ms, stream.first_token_ms, choice.finish_reason
                    ),
                    "prob": sum(logprob.logprob for logprob in choice.logprobs) if choice.logprobs else -1.0,
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
        """As ``stream_chat_oai``, on the caller's event loop."""
        fields = request_fields(llm_config, extra_request_params)
        client = await shared_client()
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
        answer = background.run(asked().embed(name, texts))
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

    @overload
    def emb_rerank(self, model: str | None, sentence_pairs: Pair) -> tuple[Pair, float]: ...
    @overload
    def emb_rerank(self, *, sentence_pairs: Pair) -> tuple[Pair, float]: ...
    @overload
    def emb_rerank(self, model: str | None = None, sentence_pairs: Sequence[Pair] = ()) -> list[tuple[Pair, float]]: ...
    def emb_rerank(
        self, model: str | None = None, sentence_pairs: Pair | Sequence[Pair] = ()
    ) -> tuple[Pair, float] | list[tuple[Pair, float]]:
        """How well a document answers a query: of one pair ``(query, document)``, or of a list of them, the best first.

        Raises:
            ModelBusError: one of its subclasses, see ``modelbus.errors``.
        """
        name = model or self.default_re_rank_model_name or self._model(None)
        alone = isinstance(sentence_pairs, tuple) and len(sentence_pairs) == 2 and isinstance(sentence_pairs[0], str)
        pairs = cast("Sequence[Pair]", [sentence_pairs] if alone else sentence_pairs)
        ranking = background.run(asked().score(name, pairs))
        scored = [(pairs[document.index], document.score) for document in ranking.documents]
        return scored[0] if alone else scored

    # Durable work: see ``modelbus.jobs``

    def submit(
        self,
        conversations: Messages,
        *,
        model: str | None = None,
        llm_config: Mapping[str, Any] | None = None,
        kept_s: int = KEPT_S,
        name: str = "",
    ) -> BlockingJob[ChatAnswer]:
        """Asks durably: from the return of this call on the answer needs neither this program nor any one worker.

        ``modelbus.job(id).result()`` gives it, here or in any other program; see :meth:`Client.submit`.
        """
        fields = request_fields(llm_config)
        asking = connected().submit(self._model(model), conversations, kept_s=kept_s, name=name, **fields)
        return job(background.run(asking).id)

    def map(
        self,
        rows: Iterable[Messages],
        *,
        model: str | None = None,
        llm_config: Mapping[str, Any] | None = None,
        concurrency: int = 64,
        progress: Callable[[Progress], None] | None = None,
        name: str = "",
    ) -> list[Row[ChatAnswer]]:
        """Asks all rows and returns what became of each, in order; see :meth:`Client.map`.

        ``progress`` is called on modelbus' own thread.
        """
        asking = connected().map(
            self._model(model),
            rows,
            concurrency=concurrency,
            progress=progress,
            name=name,
            **request_fields(llm_config),
        )
        return background.run(asking)

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
        return background.run(connected().deploy(spec))

    def undeploy(self, udf_name: str, force: bool = False) -> None:
        """Takes a model down; ``force`` drops requests that still wait.

        Raises:
            ModelNotFound: it is not deployed.
            UndeployRefused: requests wait.
        """
        background.run(connected().undeploy(udf_name, drop=force))

    def is_model_exist(self, udf_name: str) -> bool:
        return any(info.model == udf_name for info in background.run(connected().models()))

    def adapters(self, model: str = "") -> list[AdapterRecord]:
        """The adapters of a model, or of all: each is asked for as ``model:name``."""
        return background.run(connected().adapters(model))

    def add_adapter(self, model: str, name: str, path: str, *, replace: bool = False) -> AdapterRecord:
        """Makes the adapter in a folder of the workers' hosts known as ``model:name``; see ``Client.add_adapter``."""
        return background.run(connected().add_adapter(model, name, path, replace=replace))

    def remove_adapter(self, model: str, name: str) -> None:
        """Takes an adapter's name away; requests that run with it end with it."""
        background.run(connected().remove_adapter(model, name))

    def stat(self, model: str | None = None) -> ModelStat:
        """How busy the workers of a model are."""
        return background.run(connected().stat(self._model(model)))

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
        return _items(asked().stream(self._model(model), conversations, **fields), delta_mode)


#: The seed's name for the same thing.
ByzerLLM = LLM


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
        while (item := background.run(following())) is not None:
            yield item
    finally:
        background.run(close())
