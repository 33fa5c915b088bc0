"""The engine ``vllm``: language models on vLLM, many requests at once, with vLLM's engine core as a child process."""

from __future__ import annotations

import asyncio
import functools
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from typing import TYPE_CHECKING, Any, ClassVar, ParamSpec, TypeVar

import msgspec
from modelbus_broker.errors import UnsupportedField
from modelbus_broker.messages import (
    Adapter,
    Capabilities,
    Chat,
    Classification,
    Completion,
    Decision,
    Embedding,
    Sampling,
    Score,
    Usage,
)

from .base import Engine, EngineConfig, EngineOutput, Finished, Output, Prompt, Run
from .limits import check_fits

if TYPE_CHECKING:
    from prometheus_client import Metric

    from .torch_model.answer_form import AnswerForm
    from .vllm_model.loading import Loaded
    from .vllm_model.pooling import Pooler
    from .vllm_model.reading import ReaderFactory, VllmReader
    from .vllm_model.requests import Extra

log = logging.getLogger(__name__)

P = ParamSpec("P")
T = TypeVar("T")


class VllmEngine(Engine):
    """Chat and completion, or embeddings, scores or classes, from a folder with safetensors."""

    name: ClassVar[str] = "vllm"
    needs: ClassVar[tuple[str, ...]] = ("vllm", "torch", "transformers")
    extra: ClassVar[str] = "vllm"
    counts_steps: ClassVar[bool] = True
    adapters_need: ClassVar[str] = ": it needs enable_lora"
    secrets: ClassVar[frozenset[str]] = Engine.secrets | {"hf_token"}

    def __init__(self, config: EngineConfig) -> None:
        super().__init__(config)
        #: Prompts are made here, in one thread: a tokenizer is not for two at once.
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="texts")
        self._loaded: Loaded | None = None
        self._pooler: Pooler | None = None

    async def start(self) -> None:
        """Starts vLLM in a thread.

        Raises:
            ConfigurationError: a parameter or the model path is wrong.
            DeploymentFailed: vLLM cannot run the model; the message has its words.
        """
        from .vllm_model.loading import pooling_model, start, text_model

        starting = asyncio.get_running_loop().run_in_executor(self._executor, start, self.config, self._count_step)
        while not (await asyncio.wait({starting}, timeout=10))[0]:
            log.info("still loading %s", self.config.model_path)
        started = await starting
        try:
            if started.pools:
                self._pooler = pooling_model(started, await started.engine.get_supported_tasks())
            else:
                self._loaded = await self._in_thread(text_model, started)
        except BaseException:
            started.engine.shutdown()
            raise

    def _count_step(self) -> None:
        self.steps += 1

    @property
    def _running(self) -> Loaded:
        assert self._loaded is not None, "start comes first"
        return self._loaded

    def capabilities(self) -> Capabilities:
        from .vllm_model.requests import EXTRA

        if self._pooler is not None:
            return self._pooler.capabilities()
        loaded = self._running
        return Capabilities(
            tasks=["chat", "completion", "decision"] if loaded.text.template else ["completion"],
            can_continue=True,
            prefill=True,
            adapters=loaded.adapters is not None,
            tools=loaded.text.calls is not None or bool(loaded.readers.names.calls),
            json_object=True,
            json_schema=True,
            grammar=True,
            vision=loaded.text.processor is not None,
            native_tools=loaded.text.native_tools,
            logprobs=True,
            n=True,
            seed=True,
            penalties=True,
            logit_bias=True,
            token_prompts=True,
            context_length=loaded.text.context_length,
            extra_fields=[
                "top_k", "min_p", "min_tokens", "repetition_penalty", "stop_token_ids", "ignore_eos",
                "chat_template_kwargs", "echo", "parallel_tool_calls", *EXTRA,
            ],
        )  # fmt: skip

    @property
    def slots(self) -> int:
        return self.config.slots or (self._pooler or self._running).slots

    @property
    def broken(self) -> str:
        model = self._pooler or self._loaded
        return "vLLM's engine core has died" if model is not None and model.engine.errored else ""

    def compat(self) -> str:
        return self._pooler.compat if self._pooler is not None else self._running.text.compat

    def chat(self, task: Chat, run: Run) -> AsyncIterator[EngineOutput]:
        served = self._loaded is not None and self._loaded.text.template
        return self._chat(task, run) if served else super().chat(task, run)

    def completion(self, task: Completion, run: Run) -> AsyncIterator[EngineOutput]:
        return super().completion(task, run) if self._loaded is None else self._completion(task, run)

    def decision(self, task: Decision, run: Run) -> AsyncIterator[EngineOutput]:
        served = self._loaded is not None and self._loaded.text.template
        return self._decide(task, run) if served else super().decision(task, run)

    def embedding(self, task: Embedding, run: Run) -> AsyncIterator[EngineOutput]:
        pooler = self._serving("embedding")
        return super().embedding(task, run) if pooler is None else self._pool(pooler, task, run)

    def score(self, task: Score, run: Run) -> AsyncIterator[EngineOutput]:
        pooler = self._serving("score")
        return super().score(task, run) if pooler is None else self._pool(pooler, task, run)

    def classification(self, task: Classification, run: Run) -> AsyncIterator[EngineOutput]:
        pooler = self._serving("classification")
        return super().classification(task, run) if pooler is None else self._pool(pooler, task, run)

    def _serving(self, task: str) -> Pooler | None:
        return self._pooler if self._pooler is not None and task in self._pooler.capabilities().tasks else None

    async def _pool(
        self, pooler: Pooler, task: Embedding | Score | Classification, run: Run
    ) -> AsyncIterator[EngineOutput]:
        rows = await self._in_thread(pooler.prepare, task)
        tokens = sum(len(row.ids) for row in rows)
        lora = await self._lora(run.adapter)
        yield Prompt(tokens)
        async with aclosing(pooler.batches(task, rows, run.id, lora)) as batches:
            async for batch in batches:
                yield batch
        yield Finished(usage=Usage(prompt_tokens=tokens), system_fingerprint=f"fp_{pooler.compat}")

    async def _chat(self, task: Chat, run: Run) -> AsyncIterator[EngineOutput]:
        from .torch_model.prompts import chat_prompt

        loaded = self._running
        # The form first: a schema that is wrong is told before the messages are read.
        form, factory = self._form(task)
        features: Mapping[str, Any] = {}
        if loaded.text.processor is None:
            prompt = await self._in_thread(chat_prompt, loaded.text, task)
        else:
            from .torch_model.images import image_bytes
            from .vllm_model.images import filled_prompt, unfilled_prompt

            files = await image_bytes(task, loaded.own)
            features = await self._in_thread(unfilled_prompt, loaded, task, files)
            prompt = await filled_prompt(loaded, features)
        made = self._generate(
            [prompt], task.sampling, run, self._extra(task), form=form, factory=factory, features=features
        )
        async with aclosing(made) as outputs:
            async for output in outputs:
                yield output

    def _form(self, task: Chat) -> tuple[AnswerForm, ReaderFactory | None]:
        """What form the answer has, and which of vLLM's parsers reads it, if one does.

        Raises:
            InvalidRequest: ``tools``, ``tool_choice`` or ``response_format`` make no sense.
            UnsupportedField: calls of this model cannot be read.
        """
        from .torch_model.answer_form import answer_form
        from .torch_model.call_formats import HERMES

        text, readers = self._running.text, self._running.readers
        offered = bool(task.tools) and task.tool_choice != "none"
        if text.calls is not None or not readers.names.calls or not offered:
            return answer_form(task, text.calls, text.call_tokens), readers.for_task(task, calls=False)
        # A form that only vLLM reads has no grammar here: calls that must come are written in one that has.
        form = answer_form(task, HERMES, {})
        if form.forced:
            return form, readers.for_task(task, calls=False)
        if form.rules:
            raise UnsupportedField(
                "this model's calls cannot be combined with a form of the answer", param="response_format"
            )
        return msgspec.structs.replace(form, calls=None), readers.for_task(task, calls=True)

    async def _decide(self, task: Decision, run: Run) -> AsyncIterator[EngineOutput]:
        from .torch_model.labels import label_prompt
        from .vllm_model.labels import label_scores

        loaded = self._running
        prompt, labels = await self._in_thread(label_prompt, loaded.text, task)
        check_fits(len(prompt) + max(map(len, labels)), 1, loaded.text.context_length)
        lora = await self._lora(run.adapter)
        yield Prompt(len(prompt))
        for index, scores in enumerate(await label_scores(loaded, prompt, labels, run.id, lora)):
            yield Output(choice=index, tokens=0, finish_reason="stop", logprobs=scores)
        yield Finished(usage=Usage(prompt_tokens=len(prompt)), system_fingerprint=f"fp_{loaded.text.compat}")

    async def _completion(self, task: Completion, run: Run) -> AsyncIterator[EngineOutput]:
        from .torch_model.prompts import completion_prompts, prompt_texts

        text = self._running.text
        prompts = await self._in_thread(completion_prompts, text, task)
        echo = await self._in_thread(prompt_texts, text, task) if task.echo else []
        async with aclosing(self._generate(prompts, task.sampling, run, self._extra(task), echo=echo)) as outputs:
            async for output in outputs:
                yield output

    def _extra(self, task: Chat | Completion) -> Extra:
        from .vllm_model.requests import read_extra

        return read_extra(task.extra, self._running.max_logprobs, self._running.text.vocabulary)

    async def _generate(
        self,
        prompts: list[list[int]],
        sampling: Sampling,
        run: Run,
        extra: Extra,
        *,
        echo: Sequence[str] = (),
        form: AnswerForm | None = None,
        factory: ReaderFactory | None = None,
        features: Mapping[str, Any] | None = None,
    ) -> AsyncGenerator[EngineOutput]:
        from .torch_model.answer_form import AnswerForm
        from .torch_model.plan import make_plan
        from .torch_model.work import Work
        from .vllm_model.generation import Tally, outputs
        from .vllm_model.requests import check_goes_on, check_logprobs, structured_outputs

        loaded = self._running
        text = loaded.text
        check_logprobs(sampling.logprobs, loaded.max_logprobs, "logprobs")
        kept = {token: word for word, token in text.call_tokens.items()} if form and form.calls else {}
        kept |= factory.kept() if factory is not None else {}
        work = Work(
            prompts=prompts,
            max_tokens=[check_fits(len(prompt), sampling.max_tokens, text.context_length) for prompt in prompts],
            plan=make_plan(sampling, text),
            n=sampling.n,
            echo=list(echo),
            output_token_ids=run.output_token_ids,
            emitted_chars=run.emitted_chars,
            form=form or AnswerForm(),
            call_tokens=kept,
            features=features if features and "data" in features else {},
            reader=functools.partial(_reader, factory, prompts, run.id) if factory is not None else None,
            request_id=run.id,
        )
        structured_outputs(work.form, extra)
        check_goes_on(work, extra, grammars=loaded.grammars_go_on, biases=loaded.obeys_biases)
        prompt_tokens = run.prompt_tokens or sum(map(len, prompts))
        completion_tokens = sum(map(len, run.output_token_ids))
        lora = await self._lora(run.adapter)
        yield Prompt(prompt_tokens)
        tally = Tally()
        async with aclosing(outputs(loaded, work, extra, lora, tally)) as made:
            async for output in made:
                completion_tokens += len(output.token_ids)
                yield output
        usage = Usage(
            prompt_tokens=prompt_tokens, completion_tokens=completion_tokens, reasoning_tokens=tally.reasoning_tokens
        )
        yield Finished(usage=usage, system_fingerprint=f"fp_{text.compat}")

    async def check_adapter(self, adapter: Adapter) -> str:
        """As the port says, and vLLM has loaded it."""
        from .vllm_model.adapters import CannotLoad

        fingerprint = await super().check_adapter(adapter)
        adapters = (self._pooler or self._running).adapters
        assert adapters is not None, "the port asks for the capability first"
        try:
            await adapters.request(adapter, fingerprint)
        except CannotLoad as error:
            raise self._adapter_reader.refuse(adapter, str(error)) from error
        return fingerprint

    async def _lora(self, adapter: Adapter | None) -> Any:
        """vLLM's word for a request's adapter, which has been checked; None if it names none."""
        adapters = (self._pooler or self._running).adapters
        if adapter is None or adapters is None:
            return None
        return await adapters.request(adapter, await super().check_adapter(adapter))

    async def _in_thread(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        call = functools.partial(function, *args, **kwargs)
        return await asyncio.get_running_loop().run_in_executor(self._executor, call)

    def metrics(self) -> str:
        """What vLLM counts, by its own names (``vllm:...``)."""
        from prometheus_client import generate_latest

        return generate_latest(_VllmMetrics()).decode()

    async def close(self) -> None:
        model = self._pooler or self._loaded
        if model is not None:
            self._pooler = self._loaded = None
            await self._in_thread(model.engine.shutdown)
        self._executor.shutdown(wait=False, cancel_futures=True)


def _reader(factory: ReaderFactory, prompts: list[list[int]], request_id: str, number: int, index: int) -> VllmReader:
    from .torch_model.work import call_id

    return factory.reader(prompts[number], functools.partial(call_id, request_id, index))


class _VllmMetrics:
    """Those of the process's metrics that are vLLM's; the worker shows its own elsewhere."""

    def collect(self) -> Iterator[Metric]:
        from prometheus_client import REGISTRY

        return (metric for metric in REGISTRY.collect() if metric.name.startswith("vllm:"))
