"""The engine ``vllm``: language models on vLLM, many requests at once, with vLLM's engine core as a child process."""

from __future__ import annotations

import asyncio
import functools
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from typing import TYPE_CHECKING, ClassVar, ParamSpec, TypeVar

from modelbus_broker.messages import Capabilities, Chat, Completion, Sampling, Usage

from .base import Engine, EngineConfig, EngineOutput, Finished, Prompt, Run
from .limits import check_fits

if TYPE_CHECKING:
    from prometheus_client import Metric

    from .torch_model.answer_form import AnswerForm
    from .vllm_model.loading import Loaded
    from .vllm_model.requests import Extra

log = logging.getLogger(__name__)

P = ParamSpec("P")
T = TypeVar("T")


class VllmEngine(Engine):
    """Chat and completion from a folder with safetensors."""

    name: ClassVar[str] = "vllm"
    needs: ClassVar[tuple[str, ...]] = ("vllm", "torch", "transformers")
    extra: ClassVar[str] = "vllm"
    adapters_need: ClassVar[str] = ": it needs enable_lora"
    secrets: ClassVar[frozenset[str]] = Engine.secrets | {"hf_token"}

    def __init__(self, config: EngineConfig) -> None:
        super().__init__(config)
        #: Prompts are made here, in one thread: a tokenizer is not for two at once.
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="texts")
        self._loaded: Loaded | None = None

    async def start(self) -> None:
        """Starts vLLM in a thread.

        Raises:
            ConfigurationError: a parameter or the model path is wrong.
            DeploymentFailed: vLLM cannot run the model; the message has its words.
        """
        from .vllm_model.loading import load

        loading = asyncio.get_running_loop().run_in_executor(self._executor, load, self.config)
        while not (await asyncio.wait({loading}, timeout=10))[0]:
            log.info("still loading %s", self.config.model_path)
        self._loaded = await loading

    @property
    def _running(self) -> Loaded:
        assert self._loaded is not None, "start comes first"
        return self._loaded

    def capabilities(self) -> Capabilities:
        from .vllm_model.requests import EXTRA

        loaded = self._running
        return Capabilities(
            tasks=["chat", "completion"] if loaded.text.template else ["completion"],
            can_continue=True,
            adapters=loaded.adapters,
            tools=loaded.text.calls is not None,
            json_object=True,
            json_schema=True,
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
        return self.config.slots or self._running.slots

    @property
    def broken(self) -> str:
        dead = self._loaded is not None and self._loaded.engine.errored
        return "vLLM's engine core has died" if dead else ""

    def compat(self) -> str:
        return self._running.text.compat

    def chat(self, task: Chat, run: Run) -> AsyncIterator[EngineOutput]:
        return self._chat(task, run) if self._running.text.template else super().chat(task, run)

    def completion(self, task: Completion, run: Run) -> AsyncIterator[EngineOutput]:
        return self._completion(task, run)

    async def _chat(self, task: Chat, run: Run) -> AsyncIterator[EngineOutput]:
        from .torch_model.answer_form import answer_form
        from .torch_model.prompts import chat_prompt

        text = self._running.text
        # The form first: a schema that is wrong is told before the messages are read.
        form = answer_form(task, text.calls, text.call_tokens)
        prompt = await self._in_thread(chat_prompt, text, task)
        extra = self._extra(task)
        async with aclosing(self._generate([prompt], task.sampling, run, extra, form=form)) as outputs:
            async for output in outputs:
                yield output

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
    ) -> AsyncGenerator[EngineOutput]:
        from .torch_model.answer_form import AnswerForm
        from .torch_model.plan import make_plan
        from .torch_model.work import Work
        from .vllm_model.generation import outputs
        from .vllm_model.requests import check_goes_on, check_logprobs, structured_outputs

        loaded = self._running
        text = loaded.text
        check_logprobs(sampling.logprobs, loaded.max_logprobs, "logprobs")
        work = Work(
            prompts=prompts,
            max_tokens=[check_fits(len(prompt), sampling.max_tokens, text.context_length) for prompt in prompts],
            plan=make_plan(sampling, text),
            n=sampling.n,
            echo=list(echo),
            output_token_ids=run.output_token_ids,
            emitted_chars=run.emitted_chars,
            form=form or AnswerForm(),
            call_tokens={token: word for word, token in text.call_tokens.items()} if form and form.calls else {},
            request_id=run.id,
        )
        structured_outputs(work.form, extra)
        check_goes_on(work, extra)
        prompt_tokens = run.prompt_tokens or sum(map(len, prompts))
        completion_tokens = sum(map(len, run.output_token_ids))
        yield Prompt(prompt_tokens)
        async with aclosing(outputs(loaded, work, extra, run.adapter)) as made:
            async for output in made:
                self.steps += 1
                completion_tokens += len(output.token_ids)
                yield output
        usage = Usage(prompt_tokens=prompt_tokens, completion_tokens=completion_tokens)
        yield Finished(usage=usage, system_fingerprint=f"fp_{text.compat}")

    async def _in_thread(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        call = functools.partial(function, *args, **kwargs)
        return await asyncio.get_running_loop().run_in_executor(self._executor, call)

    def metrics(self) -> str:
        """What vLLM counts, by its own names (``vllm:...``)."""
        from prometheus_client import generate_latest

        return generate_latest(_VllmMetrics()).decode()

    async def close(self) -> None:
        if self._loaded is not None:
            engine, self._loaded = self._loaded.engine, None
            await self._in_thread(engine.shutdown)
        self._executor.shutdown(wait=False, cancel_futures=True)


class _VllmMetrics:
    """Those of the process's metrics that are vLLM's; the worker shows its own elsewhere."""

    def collect(self) -> Iterator[Metric]:
        from prometheus_client import REGISTRY

        return (metric for metric in REGISTRY.collect() if metric.name.startswith("vllm:"))
