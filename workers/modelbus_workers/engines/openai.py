"""The engine ``openai``: models of any provider or server that speaks the OpenAI protocol.

The pieces: ``presets`` (who is where), ``openai_bodies``, ``openai_wire`` and ``openai_lists`` (what is said),
``openai_client`` (how it is carried), ``openai_errors`` (what may go wrong). This file puts them together behind the port.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing, suppress
from functools import partial
from typing import Any, Literal
from urllib.parse import urlsplit

import msgspec
from modelbus.token_estimate import estimate_prompt
from modelbus_broker.errors import (
    ConfigurationError,
    DeploymentFailed,
    InvalidRequest,
    ModelBusError,
    StreamCut,
    UnsupportedField,
)
from modelbus_broker.messages import Capabilities, Chat, ChatMessage, Completion, Embedding, Sampling, Usage

from .base import Engine, EngineConfig, EngineOutput, Finished, Run, VectorBatch
from .openai_bodies import chat_body, completion_body, embedding_body
from .openai_client import Endpoint, Upstream, checked_url, shown_url
from .openai_errors import Secrets, TryAgain, failure_in_stream
from .openai_lists import EmbeddingAnswer, decode_embeddings
from .openai_probe import Served, probe
from .openai_spans import Try
from .openai_wire import AnswerReader, decode_chunk, pieces
from .params import read_params
from .presets import PRESETS, Preset, preset_for

_SLOTS = 64
_AZURE_VERSION = "2024-10-21"
#: Parts of the names of embedding models; ``saas.task`` says it where the name does not.
_EMBEDDING_NAMES = ("embed", "bge-", "bge_", "gte-", "m3e", "e5-", "minilm", "text2vec", "nomic")
#: After the last finish reason: how long the usage may take.
_USAGE_WAIT_S = 5.0
#: How long what comes after an answer is waited for.
_DRAIN_S = 0.1
_LISTED = 12


class OpenAISettings(msgspec.Struct, frozen=True, kw_only=True):
    """The parameters of an ``openai`` deployment; ``header.NAME`` and ``body.NAME`` come on top."""

    api_key: str = ""
    model: str = ""  #: the provider's name of it
    base_url: str = ""
    api_base: str = ""  #: the same
    task: Literal["", "chat", "completion", "embedding"] = ""  #: "": by the model's name
    api_type: str = ""  #: azure, or nothing
    api_version: str = ""
    azure_endpoint: str = ""
    azure_deployment: str = ""
    organization: str = ""
    project: str = ""
    timeout: float = 0.0  #: seconds for a whole call; 0: the request's own deadline
    first_byte_timeout_s: float = 120.0
    stall_timeout_s: float = 60.0
    max_retries: int = 3  #: before the first token
    proxies: str = ""  #: URL of an HTTP proxy
    local_address: str = ""  #: to connect from
    tls_ca: str = ""  #: PEM file of the provider's certificate authority
    slots: int = 0
    context_length: int = 0  #: tokens, told to clients
    embedding_batch: int = 0  #: most inputs per call; 0: the preset's
    trace_headers: bool = True  #: the provider's spans, if it makes some, belong to ours

    def __repr__(self) -> str:
        return f"OpenAISettings(model={self.model!r})"


class OpenAIEngine(Engine):
    """Passes requests on to a provider and its answers back, and never a truncated answer as a whole one."""

    name = "openai"
    counts_steps = True
    secrets = Engine.secrets | {"proxies"}

    def __init__(self, config: EngineConfig) -> None:
        super().__init__(config)
        plain, headers, extra = _split(config.params)
        self.settings = read_params(OpenAISettings, plain, engine=self.name, also=("header.NAME", "body.NAME"))
        self._preset = _preset(config.pretrained_model_type, self.settings)
        self._extra_body = extra
        endpoint = _endpoint(self.settings, self._preset, headers, self.slots)
        hidden = [value for name, value in config.params.items() if name in config.secret_params | self.secrets]
        proxy = urlsplit(self.settings.proxies)
        hidden += [*headers.values(), proxy.password or "", proxy.username or ""]
        self._upstream = Upstream(endpoint, Secrets(hidden))
        self._model = self.settings.azure_deployment or self.settings.model
        self._models: dict[str, int] = {}
        self._dimensions = 0
        self._served = Served()
        self._ticking: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Checks key and URL with the provider's list of models, where it has one; the self-test checks the rest.

        Raises:
            UpstreamFailed: the provider refuses or cannot be reached, in its own words.
            ConfigurationError: no model is named.
        """
        await self._upstream.open()
        try:
            if self._preset.lists_models:
                # Of a server of unknown make only the self-test can tell whether the rest of its URL is right.
                known = self._upstream.endpoint.base_url == self._preset.base_url
                self._models = await self._upstream.models(required=known)
            if not self._model and len(self._models) == 1:
                self._model = next(iter(self._models))
            if not self._model:
                raise ConfigurationError(f"parameter model is missing{self._listed()}")
            if self._preset.probes:
                self._served = await probe(self._upstream, self._model)
        except BaseException:
            await self._upstream.close()
            raise
        # A silent provider is limited by the silence limits; this engine hangs only when its event loop does.
        self._ticking = asyncio.create_task(self._tick(), name="openai engine steps")

    def capabilities(self) -> Capabilities:
        if self._task == "embedding":
            return Capabilities(tasks=["embedding"], dimensions=self._dimensions, token_prompts=True)
        tasks = [self._task]
        if self._task == "chat" and self._preset.completions:
            tasks.append("completion")
        tasks = self._served.tasks or tasks
        return Capabilities(
            tasks=tasks, vision=True, audio=True, files=True, tools=self._served.tools, native_tools=self._served.tools, json_object=True, json_schema=True,
            logprobs=True, n=self._preset.n, seed=True, penalties=True, logit_bias=True, token_prompts=True,
            context_length=self._context_length, extra_fields=["*"],
        )  # fmt: skip

    @property
    def slots(self) -> int:
        return self.config.slots or self.settings.slots or _SLOTS

    @property
    def _context_length(self) -> int:
        return self.settings.context_length or self._models.get(self._model, 0)

    async def self_test(self) -> None:
        try:
            await self._self_test()
        except ModelBusError as error:
            listed = self._listed() if self._model not in self._models else ""
            raise DeploymentFailed(f"{error}{listed}", upstream=error.upstream) from error

    async def _self_test(self) -> None:
        try:
            await super().self_test()
        except InvalidRequest as error:
            if "max_tokens" not in error.message or self._task == "embedding":
                raise
            # Some reasoning models take one token for an error.
            hello = Chat(messages=[ChatMessage(role="user", content="Hello")], sampling=Sampling(max_tokens=256))
            async for _ in self.chat(hello, Run(id="self-test")):
                pass

    async def chat(self, task: Chat, run: Run) -> AsyncGenerator[EngineOutput, None]:
        self._check(task.sampling, run)
        async with aclosing(self._answer("/chat/completions", task, run)) as outputs:
            async for output in outputs:
                yield output

    async def completion(self, task: Completion, run: Run) -> AsyncGenerator[EngineOutput, None]:
        self._check(task.sampling, run)
        async with aclosing(self._answer("/completions", task, run)) as outputs:
            async for output in outputs:
                yield output

    async def embedding(self, task: Embedding, run: Run) -> AsyncGenerator[EngineOutput, None]:
        batch = self.settings.embedding_batch or self._preset.embedding_batch
        tokens, estimated, model = 0, False, ""

        async def one_try(part: Embedding, body: Mapping[str, Any], number: int) -> EmbeddingAnswer:
            with self._try("embedding", run, number) as one:
                document = await self._upstream.post("/embeddings", body, headers=one.headers)
                if b'"error"' in document[:64]:
                    raise _error(failure_in_stream(document, self._upstream.secrets))
                answer = decode_embeddings(document, len(part.input), self._upstream.secrets.hide)
                one.answered(Usage(prompt_tokens=answer.prompt_tokens), answer.model)
                return answer

        for start in range(0, len(task.input), batch):
            part = msgspec.structs.replace(task, input=task.input[start : start + batch])
            while True:
                body = self._extra_body | embedding_body(part, self._model, self._preset)
                try:
                    answer = await self._upstream.retried(
                        partial(one_try, part, body), run.deadline, fail_fast=run.fail_fast
                    )
                    break
                except InvalidRequest as error:
                    if not self._learn(error, body):
                        raise
            self._dimensions = len(answer.vectors[0]) // 4
            model = answer.model
            estimated = estimated or not answer.prompt_tokens
            tokens += answer.prompt_tokens or estimate_prompt(part)
            yield VectorBatch(start=start, dimensions=self._dimensions, data=answer.vectors)
        yield Finished(usage=Usage(prompt_tokens=tokens, estimated=estimated), upstream_model=model)

    async def close(self) -> None:
        if self._ticking is not None:
            self._ticking.cancel()
            await asyncio.gather(self._ticking, return_exceptions=True)
        await self._upstream.close()

    async def _answer(self, path: str, task: Chat | Completion, run: Run) -> AsyncGenerator[EngineOutput, None]:
        """Tries until the first token has come; from then on a failure is the end."""
        tries, operation = 0, "chat" if isinstance(task, Chat) else "completion"
        while True:
            body = self._body(task)
            told = False
            try:
                with self._try(operation, run, tries, task.sampling) as one:
                    async with aclosing(self._one_try(path, body, task, one)) as outputs:
                        async for output in outputs:
                            told = True
                            yield output
                return
            except InvalidRequest as error:
                if told or not self._learn(error, body):
                    raise
            except TryAgain as again:
                if told:
                    raise again.error from None
                tries += 1
                await self._upstream.wait(again, tries, run.deadline, fail_fast=run.fail_fast)

    async def _one_try(
        self, path: str, body: Mapping[str, Any], task: Chat | Completion, one: Try
    ) -> AsyncGenerator[EngineOutput, None]:
        reader = AnswerReader(task, context_length=self._context_length)
        async with aclosing(self._upstream.documents(path, body, headers=one.headers)) as documents:
            try:
                while not reader.has_last_usage:
                    async with asyncio.timeout(_USAGE_WAIT_S if reader.complete else None):
                        document = await anext(documents, None)
                    if document is None:
                        break
                    chunk = decode_chunk(document, self._upstream.secrets.hide)
                    if chunk is None:
                        raise failure_in_stream(document, self._upstream.secrets)
                    for output in reader.take(chunk):
                        for piece in pieces(output):
                            yield piece
            except (TryAgain, ModelBusError, TimeoutError):
                # The answer is whole: what goes wrong after it is no loss.
                if not reader.complete:
                    raise
            if not reader.complete:
                raise TryAgain(StreamCut(f"the provider's answer is not complete: {reader.missing()}"))
            one.answered(reader.usage(), reader.upstream_model)
            yield Finished(
                usage=reader.usage(),
                upstream_model=reader.upstream_model,
                system_fingerprint=reader.system_fingerprint,
            )
            # Read to the end, so that the connection can be used again.
            with suppress(TryAgain, ModelBusError, TimeoutError):
                async with asyncio.timeout(_DRAIN_S):
                    async for _ in documents:
                        pass

    def _body(self, task: Chat | Completion) -> dict[str, Any]:
        if isinstance(task, Chat):
            return self._extra_body | chat_body(task, self._model, self._preset)
        return self._extra_body | completion_body(task, self._model, self._preset)

    def _learn(self, error: InvalidRequest, body: Mapping[str, Any]) -> bool:
        """Whether the provider refused a field that we chose; it will not get it again."""
        words = error.upstream
        change: dict[str, Any] = {}
        if "stream_options" in body and "stream_options" in words:
            change["usage_option"] = False
        elif "max_tokens" in body and "max_completion_tokens" in words:
            change["max_tokens_field"] = "max_completion_tokens"
        elif "max_completion_tokens" in body and "max_completion_tokens" in words and "max_tokens" not in body:
            change["max_tokens_field"] = "max_tokens"
        elif "encoding_format" in body and "encoding_format" in words:
            change["base64_vectors"] = False
        learned = msgspec.structs.replace(self._preset, **change)
        if learned == self._preset:
            return False
        self._preset = learned
        return True

    def _check(self, sampling: Sampling, run: Run) -> None:
        if sampling.n > 1 and not self._preset.n:
            raise UnsupportedField(f"saas/{self._preset.name} gives one choice per request", param="n")
        assert not any(run.output_token_ids), "this engine cannot go on from tokens"

    def _listed(self) -> str:
        if not self._models:
            return f" (at {shown_url(self._upstream.endpoint.base_url)})"
        names = sorted(self._models)
        more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
        return f" (models there: {', '.join(names[:_LISTED])}{more})"

    @property
    def _task(self) -> str:
        if self.settings.task:
            return self.settings.task
        if self._served.tasks:
            return self._served.tasks[0]
        name = self._model.lower().rpartition("/")[2]
        return "embedding" if any(sign in name for sign in _EMBEDDING_NAMES) else "chat"

    def _try(self, operation: str, run: Run, number: int, sampling: Sampling | None = None) -> Try:
        return Try(
            operation, self._model, run, preset=self._preset, base_url=self._upstream.endpoint.base_url,
            number=number, pass_on=self.settings.trace_headers, sampling=sampling,
        )  # fmt: skip

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(1.0)
            self.steps += 1


def _error(failed: ModelBusError | TryAgain) -> ModelBusError:
    return failed.error if isinstance(failed, TryAgain) else failed


def _split(params: Mapping[str, str]) -> tuple[dict[str, str], dict[str, str], dict[str, Any]]:
    """Plain parameters, extra headers, extra body fields."""
    plain: dict[str, str] = {}
    headers: dict[str, str] = {}
    body: dict[str, Any] = {}
    for name, value in params.items():
        if name.startswith("header."):
            headers[name.removeprefix("header.")] = value
        elif name.startswith("body."):
            try:
                body[name.removeprefix("body.")] = msgspec.json.decode(value)
            except msgspec.DecodeError:
                body[name.removeprefix("body.")] = value  # a bare word is a text
        else:
            plain[name] = value
    return plain, headers, body


def _preset(pretrained_model_type: str, settings: OpenAISettings) -> Preset:
    preset = preset_for(pretrained_model_type)
    base_url = settings.base_url or settings.api_base
    if preset.name == "openai":
        if settings.azure_endpoint or settings.api_type.startswith("azure"):
            return PRESETS["azure_openai"]
        if base_url and urlsplit(base_url).hostname != urlsplit(preset.base_url).hostname:
            return PRESETS["openai_compatible"]
    return preset


def _endpoint(settings: OpenAISettings, preset: Preset, headers: dict[str, str], slots: int) -> Endpoint:
    base_url = settings.base_url or settings.api_base or settings.azure_endpoint or preset.base_url
    if not base_url:
        missing = "azure_endpoint" if preset.azure else "base_url"
        raise ConfigurationError(f"saas/{preset.name} needs the parameter saas.{missing}=URL")
    if preset.needs_key and not settings.api_key:
        raise ConfigurationError(f"saas/{preset.name} needs the parameter saas.api_key")
    for name in ("timeout", "first_byte_timeout_s", "stall_timeout_s", "max_retries", "slots", "embedding_batch"):
        if getattr(settings, name) < 0:
            raise ConfigurationError(f"parameter {name} must not be negative")
    if urlsplit(base_url).username:
        raise ConfigurationError("base_url holds a user name: give saas.header.Authorization instead")
    query = {"api-version": settings.api_version} if settings.api_version else {}
    url = checked_url(base_url, "base_url")
    if preset.azure:
        deployment = settings.azure_deployment or settings.model
        if not deployment:
            raise ConfigurationError("saas/azure_openai needs the parameter saas.azure_deployment")
        if "/openai/" not in f"{url}/":
            url = f"{url}/openai/deployments/{deployment}"
        query.setdefault("api-version", _AZURE_VERSION)
        headers = {"api-key": settings.api_key, **headers}
    elif settings.api_key:
        headers = {"Authorization": f"Bearer {settings.api_key}", **headers}
    if settings.organization:
        headers = {"OpenAI-Organization": settings.organization, **headers}
    if settings.project:
        headers = {"OpenAI-Project": settings.project, **headers}
    if any("\n" in value or "\r" in value for value in headers.values()):
        raise ConfigurationError("the key or a header of the deployment contains a line break")
    return Endpoint(
        base_url=url, headers=headers, query=query, proxy=settings.proxies and checked_url(settings.proxies, "proxies"),
        local_address=settings.local_address, tls_ca=settings.tls_ca, connections=slots, timeout_s=settings.timeout,
        first_byte_timeout_s=settings.first_byte_timeout_s, stall_timeout_s=settings.stall_timeout_s,
        max_retries=settings.max_retries,
    )  # fmt: skip
