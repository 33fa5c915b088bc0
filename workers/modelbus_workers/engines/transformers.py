"""The engine ``transformers``: any model that Hugging Face's library runs, on a CPU or a GPU, in this process."""

from __future__ import annotations

import asyncio
import copy
import functools
import importlib.util
import logging
from collections import OrderedDict
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from typing import TYPE_CHECKING, Any, ClassVar, ParamSpec, TypeVar

from modelbus_broker.errors import ConfigurationError, UnsupportedField
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

from .base import Engine, EngineConfig, EngineOutput, Finished, Prompt, Run, VectorBatch
from .limits import check_fits
from .params import read_params
from .torch_model.settings import TransformersSettings

if TYPE_CHECKING:
    from .torch_model.adapters import Adapters, AdapterWeights
    from .torch_model.answer_form import AnswerForm
    from .torch_model.drafting import Drafting
    from .torch_model.embedding import Embedder
    from .torch_model.generation import Stepper
    from .torch_model.grammar import Grammar
    from .torch_model.heads import Head
    from .torch_model.loading import TextModel
    from .torch_model.loop import GenerationLoop

log = logging.getLogger(__name__)

P = ParamSpec("P")
T = TypeVar("T")

#: Where requests at once share forward passes.
_SHARED_SLOTS = 8


class TransformersEngine(Engine):
    """Chat and completion from a safetensors folder or a GGUF file; embeddings from a sentence-transformers folder;
    scores and classes from a folder of a ``...ForSequenceClassification``."""

    name: ClassVar[str] = "transformers"
    needs: ClassVar[tuple[str, ...]] = ("torch", "transformers", "llguidance")
    counts_steps: ClassVar[bool] = True
    extra: ClassVar[str] = "transformers"
    adapters_need: ClassVar[str] = ": it needs a language model, and the library peft on its node"

    def __init__(self, config: EngineConfig) -> None:
        super().__init__(config)
        self._settings = read_params(TransformersSettings, config.params, engine=self.name)
        if self._settings.slots < 0 or self._settings.batch_size < 1 or self._settings.max_adapters < 1:
            raise ConfigurationError("slots must not be negative; batch_size and max_adapters must be at least 1")
        #: Tokenizing and embedding happen here, in one thread: a tokenizer is not for two at once.
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="texts")
        self._text: TextModel | None = None
        self._stepper: Stepper | None = None
        self._loop: GenerationLoop | None = None
        self._embedder: Embedder | None = None
        self._head: Head | None = None
        self._adapters: Adapters | None = None
        self._drafting: Drafting | None = None
        #: Those that were read; used last is last.
        self._read: OrderedDict[str, AdapterWeights] = OrderedDict()

    async def start(self) -> None:
        """Loads the model in a thread.

        Raises:
            ConfigurationError: a parameter or the model path is wrong.
            MissingExtra: a library that these weights need is not installed.
            DeploymentFailed: the library cannot load the model; the message has its words.
        """
        loading = asyncio.get_running_loop().run_in_executor(self._executor, self._load)
        while not (await asyncio.wait({loading}, timeout=10))[0]:
            log.info("still loading %s", self.config.model_path)
        await loading
        if self._stepper is not None:
            from .torch_model.loop import GenerationLoop

            self._loop = GenerationLoop(self._stepper)

    def _load(self) -> None:
        from .torch_model.loading import choose_device, find_source, load_text_model, set_threads
        from .torch_model.quantizing import check_quantization

        source = find_source(self.config)
        check_quantization(self._settings, source.kind, source.gguf, source.folder)
        device = choose_device(self._settings, self.config.gpus)
        set_threads(self._settings, self.config.cpus)
        if source.kind == "embedding":
            from .torch_model.embedding import Embedder

            self._embedder = Embedder(source, self._settings, device)
            return
        if source.kind == "head":
            from .torch_model.heads import Head

            self._head = Head(source, self._settings, device)
            return
        from .torch_model.drafting import make_drafting
        from .torch_model.generation import Stepper

        self._text = load_text_model(source, self._settings, device, len(self.config.gpus))
        tokenizer, together = copy.deepcopy(self._text.tokenizer), self._settings.continuous_batching
        if importlib.util.find_spec("peft") is not None:
            from .torch_model.adapters import Adapters

            self._adapters = Adapters(self._text.model, self._settings.max_adapters)
        self._drafting = make_drafting(self._settings, self._text)
        self._stepper = Stepper(
            self._text, tokenizer, self._count_step, together=together, adapters=self._adapters, drafting=self._drafting
        )

    def _count_step(self) -> None:
        self.steps += 1

    def capabilities(self) -> Capabilities:
        if self._embedder is not None:
            return Capabilities(
                tasks=["embedding"], streaming=False, token_prompts=True,
                context_length=self._embedder.context_length, dimensions=self._embedder.dimensions,
            )  # fmt: skip
        if self._head is not None:
            return Capabilities(
                tasks=["score" if self._head.scores else "classification"], streaming=False,
                token_prompts=not self._head.scores, context_length=self._head.context_length,
            )  # fmt: skip
        assert self._text is not None, "start comes first"
        grammars = self._text.grammars is not None
        return Capabilities(
            tasks=["chat", "completion", "decision"] if self._text.template else ["completion"],
            can_continue=True,
            prefill=True,
            adapters=self._adapters is not None,
            vision=self._text.processor is not None,
            tools=self._text.calls is not None,
            json_object=grammars,
            json_schema=grammars,
            grammar=grammars,
            native_tools=self._text.native_tools,
            logprobs=True,
            n=True,
            seed=True,
            penalties=True,
            logit_bias=True,
            token_prompts=True,
            context_length=self._text.context_length,
            extra_fields=[
                "top_k", "min_p", "min_tokens", "repetition_penalty", "stop_token_ids", "ignore_eos",
                "chat_template_kwargs", "echo", "parallel_tool_calls",
            ],
        )  # fmt: skip

    @property
    def slots(self) -> int:
        alone = self._stepper is not None and not self._stepper.together
        own = 1 if alone else _SHARED_SLOTS
        return self.config.slots or self._settings.slots or own

    @property
    def running(self) -> int:
        """Requests whose key-value caches are held right now."""
        return 0 if self._loop is None else self._loop.running

    def compat(self) -> str:
        loaded = self._text or self._embedder or self._head
        return loaded.compat if loaded is not None else ""

    async def check_adapter(self, adapter: Adapter) -> str:
        """Reads it and lays it over the model, so that the first request finds it there."""
        weights = await self._weights(adapter)
        if weights.fingerprint not in self._adapters_here:
            assert self._loop is not None, "start comes first"
            await self._loop.call(functools.partial(self._try, weights))
        return weights.fingerprint

    @property
    def _adapters_here(self) -> Adapters:
        assert self._adapters is not None, "the capabilities say whether there are adapters"
        return self._adapters

    def _try(self, weights: AdapterWeights) -> None:
        self._adapters_here.hold(weights)
        self._adapters_here.release(weights)

    async def _weights(self, adapter: Adapter) -> AdapterWeights:
        from .torch_model.adapters import read_weights

        # Whoever names no fingerprint means the files as they are now.
        fingerprint = adapter.fingerprint or await super().check_adapter(adapter)
        weights = self._read.get(fingerprint)
        if weights is None:
            weights = await self._in_thread(read_weights, self._adapter_reader, adapter)
            self._read[weights.fingerprint] = weights
            if len(self._read) > self._settings.max_adapters:
                self._read.popitem(last=False)
        else:
            self._read.move_to_end(fingerprint)
        return weights

    def chat(self, task: Chat, run: Run) -> AsyncIterator[EngineOutput]:
        return super().chat(task, run) if self._text is None else self._chat(self._text, task, run)

    def completion(self, task: Completion, run: Run) -> AsyncIterator[EngineOutput]:
        return super().completion(task, run) if self._text is None else self._completion(self._text, task, run)

    def decision(self, task: Decision, run: Run) -> AsyncIterator[EngineOutput]:
        text = self._text
        return super().decision(task, run) if text is None else self._decide(text, task, run)

    def embedding(self, task: Embedding, run: Run) -> AsyncIterator[EngineOutput]:
        return super().embedding(task, run) if self._embedder is None else self._embed(self._embedder, task)

    def score(self, task: Score, run: Run) -> AsyncIterator[EngineOutput]:
        head = self._head
        return super().score(task, run) if head is None or not head.scores else self._judge(head, task)

    def classification(self, task: Classification, run: Run) -> AsyncIterator[EngineOutput]:
        head = self._head
        return super().classification(task, run) if head is None or head.scores else self._judge(head, task)

    async def _chat(self, text: TextModel, task: Chat, run: Run) -> AsyncIterator[EngineOutput]:
        from .torch_model.images import image_bytes
        from .torch_model.prompts import chat_prompt, picture_prompt

        # The form first: a schema that is wrong is told before the messages are read.
        form, grammar = await self._in_thread(self._form, text, task)
        features: dict[str, Any] = {}
        if text.processor is None:
            prompt = await self._in_thread(chat_prompt, text, task)
        else:
            files = await image_bytes(task, self._settings)
            prompt, features = await self._in_thread(picture_prompt, text, task, files)
        made = self._generate(text, [prompt], task.sampling, run, form=form, grammar=grammar, features=features)
        async with aclosing(made) as outputs:
            async for output in outputs:
                yield output

    def _form(self, text: TextModel, task: Chat) -> tuple[AnswerForm, Grammar | None]:
        from .torch_model.answer_form import answer_form

        form = answer_form(task, text.calls, text.call_tokens)
        if not form.rules:
            return form, None
        if text.grammars is None:
            param = form.schemas[-1].param if form.calls is None else "tool_choice"
            raise UnsupportedField("this model's tokenizer is of a kind that cannot be held to a form", param=param)
        return form, text.grammars.compile(form)

    async def _decide(self, text: TextModel, task: Decision, run: Run) -> AsyncIterator[EngineOutput]:
        from .torch_model.labels import label_prompt

        prompt, labels = await self._in_thread(label_prompt, text, task)
        async with aclosing(self._generate(text, [prompt], Sampling(), run, labels=labels)) as outputs:
            async for output in outputs:
                yield output

    async def _completion(self, text: TextModel, task: Completion, run: Run) -> AsyncIterator[EngineOutput]:
        from .torch_model.prompts import completion_prompts, prompt_texts

        prompts = await self._in_thread(completion_prompts, text, task)
        echo = await self._in_thread(prompt_texts, text, task) if task.echo else []
        async with aclosing(self._generate(text, prompts, task.sampling, run, echo=echo)) as outputs:
            async for output in outputs:
                yield output

    async def _generate(
        self,
        text: TextModel,
        prompts: list[list[int]],
        sampling: Sampling,
        run: Run,
        *,
        echo: Sequence[str] = (),
        form: AnswerForm | None = None,
        grammar: Grammar | None = None,
        features: Mapping[str, Any] | None = None,
        labels: Sequence[list[int]] = (),
    ) -> AsyncGenerator[EngineOutput]:
        from .torch_model.answer_form import AnswerForm
        from .torch_model.plan import make_plan
        from .torch_model.work import Work

        adapter = await self._weights(run.adapter) if run.adapter is not None else None
        work = Work(
            prompts=prompts,
            max_tokens=[check_fits(len(prompt), sampling.max_tokens, text.context_length) for prompt in prompts],
            plan=make_plan(sampling, text),
            n=sampling.n,
            echo=list(echo),
            output_token_ids=run.output_token_ids,
            emitted_chars=run.emitted_chars,
            form=form or AnswerForm(),
            grammar=grammar,
            call_tokens={token: word for word, token in text.call_tokens.items()} if form and form.calls else {},
            request_id=run.id,
            adapter=adapter,
            features=features or {},
            labels=list(labels),
        )
        prompt_tokens = run.prompt_tokens or sum(map(len, prompts))
        completion_tokens = sum(map(len, run.output_token_ids))
        yield Prompt(prompt_tokens)
        assert self._loop is not None, "start comes first"
        async with aclosing(self._loop.outputs(work)) as steps:
            async for outputs in steps:
                for output in outputs:
                    completion_tokens += len(output.token_ids)
                    yield output
        usage = Usage(prompt_tokens=prompt_tokens, completion_tokens=completion_tokens)
        laid_over = f"-{adapter.fingerprint}" if adapter is not None else ""
        yield Finished(usage=usage, system_fingerprint=f"fp_{text.compat}{laid_over}")

    async def _embed(self, embedder: Embedder, task: Embedding) -> AsyncIterator[EngineOutput]:
        texts = await self._in_thread(embedder.prepare, task)
        yield Prompt(texts.tokens)
        # Each batch is its own turn of the thread, so requests side by side share it.
        for start, batch in embedder.batches(texts.texts):
            vectors = await self._in_thread(embedder.embed, batch, task.dimensions)
            self.steps += 1
            yield VectorBatch(start=start, dimensions=task.dimensions or embedder.dimensions, data=vectors)
        yield Finished(usage=Usage(prompt_tokens=texts.tokens), system_fingerprint=f"fp_{embedder.compat}")

    async def _judge(self, head: Head, task: Score | Classification) -> AsyncIterator[EngineOutput]:
        rows = await self._in_thread(head.prepare, task)
        yield Prompt(rows.tokens)
        labels = [] if head.scores else head.labels
        for start, batch in head.batches(rows):
            found = await self._in_thread(head.compute, batch)
            self.steps += 1
            yield VectorBatch(start=start, dimensions=len(head.labels), data=found, labels=labels)
        yield Finished(usage=Usage(prompt_tokens=rows.tokens), system_fingerprint=f"fp_{head.compat}")

    async def _in_thread(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        call = functools.partial(function, *args, **kwargs)
        return await asyncio.get_running_loop().run_in_executor(self._executor, call)

    def metrics(self) -> str:
        counts = [("steps_total", "counter", "Forward passes.", self.steps)]
        if self._drafting is not None:
            drafts = self._drafting.counts
            counts += [
                ("draft_tokens_total", "counter", "Tokens that were guessed.", drafts.guessed),
                ("draft_tokens_accepted_total", "counter", "Guesses that came true.", drafts.kept),
            ]
        if self._adapters is not None:
            counts += [
                ("adapters", "gauge", "Adapters that are loaded.", len(self._adapters)),
                ("adapter_loads_total", "counter", "Adapters that were laid over the model.", self._adapters.loads),
            ]
        return "".join(
            f"# HELP transformers_{name} {text}\n# TYPE transformers_{name} {kind}\ntransformers_{name} {value}\n"
            for name, kind, text, value in counts
        )

    async def close(self) -> None:
        if self._loop is not None:
            await self._loop.close()
        self._executor.shutdown(wait=False, cancel_futures=True)
