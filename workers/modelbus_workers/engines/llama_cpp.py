"""The engine ``llama_cpp``: GGUF files by llama.cpp, in this process, all requests of a worker in one batch a step."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, ClassVar, ParamSpec, TypeVar

import msgspec
from modelbus_broker.errors import ConfigurationError
from modelbus_broker.messages import Capabilities, Chat, Completion, Decision, Embedding, Sampling, TokenLogprob, Usage

from .base import Engine, EngineConfig, EngineOutput, Finished, Output, Prompt, Run, VectorBatch
from .limits import check_fits
from .llama_model.settings import read_settings

if TYPE_CHECKING:
    from .llama_model.decoding import Decoder
    from .llama_model.embedding import Embedder
    from .llama_model.library import Loaded
    from .llama_model.loop import BatchLoop
    from .torch_model.answer_form import AnswerForm
    from .torch_model.grammar import Grammar
    from .torch_model.loading import TextModel

P = ParamSpec("P")
T = TypeVar("T")

_SLOTS = 4


class LlamaCppEngine(Engine):
    """Chat, completion or embeddings from a GGUF file."""

    name: ClassVar[str] = "llama_cpp"
    needs: ClassVar[tuple[str, ...]] = ("llama_cpp", "llguidance")
    counts_steps: ClassVar[bool] = True
    extra: ClassVar[str] = "llama-cpp"

    def __init__(self, config: EngineConfig) -> None:
        super().__init__(config)
        self._settings = read_settings(config.params).on(len(config.gpus))
        #: Tokenizing and embedding happen here.
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="texts")
        self._loaded: Loaded | None = None
        self._text: TextModel | None = None
        self._loop: BatchLoop | None = None
        self._embedder: Embedder | None = None

    async def start(self) -> None:
        """Loads the model in a thread.

        Raises:
            ConfigurationError: a parameter or the model path is wrong.
            DeploymentFailed: the library cannot load the model; the message has its words.
        """
        decoder = await self._in_thread(self._load)
        if decoder is not None:
            from .llama_model.loop import BatchLoop

            assert self._text is not None
            self._loop = BatchLoop(
                decoder,
                self._text.tokenizer,
                prompt_piece=self._settings.prompt_piece,
                replay_piece=await self._in_thread(decoder.replay_piece),
                last_n=self._settings.last_n_tokens_size,
            )

    def _load(self) -> Decoder | None:
        from .llama_model.decoding import Decoder
        from .llama_model.embedding import Embedder
        from .llama_model.library import Loaded
        from .llama_model.vocabulary import GgufTokenizer

        settings = self._settings
        loaded = self._loaded = Loaded(self.config, settings, self.slots)
        tokenizer = GgufTokenizer(loaded, settings.chat_format)
        if settings.embedding:
            self._embedder = Embedder(loaded, tokenizer, self._count_step)
            return None
        self._text = _text_model(loaded, tokenizer, "none" if settings.chat_format else settings.tool_parser)
        return Decoder(loaded, self._count_step)

    def _count_step(self) -> None:
        self.steps += 1

    def capabilities(self) -> Capabilities:
        assert self._loaded is not None, "start comes first"
        if self._embedder is not None:
            return Capabilities(
                tasks=["embedding"], streaming=False, token_prompts=True,
                context_length=self._loaded.context_length, dimensions=self._embedder.dimensions,
            )  # fmt: skip
        from .torch_model.guided import GUIDED

        assert self._text is not None
        return Capabilities(
            tasks=["chat", "completion", "decision"] if self._text.template else ["completion"],
            can_continue=True,
            prefill=True,
            tools=self._text.calls is not None,
            json_object=True,
            json_schema=True,
            grammar=True,
            native_tools=self._text.native_tools,
            logprobs=True,
            n=True,
            seed=True,
            penalties=True,
            logit_bias=True,
            token_prompts=True,
            context_length=self._loaded.context_length,
            extra_fields=[
                "top_k", "min_p", "min_tokens", "repetition_penalty", "stop_token_ids", "ignore_eos",
                "chat_template_kwargs", "echo", "parallel_tool_calls", *GUIDED,
            ],
        )  # fmt: skip

    @property
    def slots(self) -> int:
        return self.config.slots or self._settings.slots or _SLOTS

    @property
    def running(self) -> int:
        """Sequences that are held right now."""
        return 0 if self._loop is None else self._loop.running

    def compat(self) -> str:
        return self._loaded.compat if self._loaded is not None else ""

    def chat(self, task: Chat, run: Run) -> AsyncIterator[EngineOutput]:
        return super().chat(task, run) if self._text is None else self._chat(self._text, task, run)

    def completion(self, task: Completion, run: Run) -> AsyncIterator[EngineOutput]:
        return super().completion(task, run) if self._text is None else self._completion(self._text, task, run)

    def decision(self, task: Decision, run: Run) -> AsyncIterator[EngineOutput]:
        text = self._text
        return self._decide(text, task, run) if text is not None and text.template else super().decision(task, run)

    def embedding(self, task: Embedding, run: Run) -> AsyncIterator[EngineOutput]:
        return super().embedding(task, run) if self._embedder is None else self._embed(self._embedder, task)

    async def _chat(self, text: TextModel, task: Chat, run: Run) -> AsyncIterator[EngineOutput]:
        from .torch_model.prompts import chat_prompt

        # The form first: a schema that is wrong is told before the messages are read.
        form, grammar = await self._in_thread(_form, text, task)
        prompt = await self._in_thread(chat_prompt, text, task)
        stops = text.tokenizer.stops()
        outputs = self._generate(text, [prompt], task.sampling, run, form=form, grammar=grammar, stops=stops)
        async with aclosing(outputs):
            async for output in outputs:
                yield output

    async def _decide(self, text: TextModel, task: Decision, run: Run) -> AsyncIterator[EngineOutput]:
        """Each label is the end of a prompt that is echoed with its log probabilities."""
        from .torch_model.answer_form import AnswerForm
        from .torch_model.labels import label_prompt

        prompt, labels = await self._in_thread(label_prompt, text, task)
        whole = [[*prompt, *label] for label in labels]
        echo = await self._in_thread(lambda: [text.tokenizer.decode(ids) for ids in whole])
        sampling = Sampling(temperature=0.0, max_tokens=1, logprobs=0)
        scores: list[list[TokenLogprob]] = [[] for _ in labels]
        async with aclosing(self._generate(text, whole, sampling, run, echo=echo, form=AnswerForm())) as outputs:
            async for output in outputs:
                if isinstance(output, Output):
                    scores[output.choice] += output.logprobs
        yield Prompt(len(prompt))
        for index, label in enumerate(labels):
            own = scores[index][len(prompt) : len(prompt) + len(label)]
            yield Output(choice=index, tokens=0, finish_reason="stop", logprobs=own)
        yield Finished(usage=Usage(prompt_tokens=len(prompt)), system_fingerprint=f"fp_{text.compat}")

    async def _completion(self, text: TextModel, task: Completion, run: Run) -> AsyncIterator[EngineOutput]:
        from .torch_model.prompts import completion_prompts, prompt_texts

        form, grammar = await self._in_thread(_form, text, task)
        prompts = await self._in_thread(completion_prompts, text, task)
        echo = await self._in_thread(prompt_texts, text, task) if task.echo else []
        outputs = self._generate(text, prompts, task.sampling, run, echo=echo, form=form, grammar=grammar)
        async with aclosing(outputs):
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
        form: AnswerForm,
        grammar: Grammar | None = None,
        stops: Sequence[str] = (),
    ) -> AsyncGenerator[EngineOutput]:
        from .torch_model.plan import make_plan
        from .torch_model.work import Work

        plan = make_plan(sampling, text)
        plan = msgspec.structs.replace(
            plan, stop=[*plan.stop, *stops], seed=self._settings.seed if plan.seed is None else plan.seed
        )
        work = Work(
            prompts=prompts,
            max_tokens=[check_fits(len(prompt), sampling.max_tokens, text.context_length) for prompt in prompts],
            plan=plan,
            n=sampling.n,
            echo=list(echo),
            output_token_ids=run.output_token_ids,
            emitted_chars=run.emitted_chars,
            form=form,
            grammar=grammar,
            call_tokens={token: word for word, token in text.call_tokens.items()} if form.calls else {},
            request_id=run.id,
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
        yield Finished(usage=usage, system_fingerprint=f"fp_{text.compat}")

    async def _embed(self, embedder: Embedder, task: Embedding) -> AsyncIterator[EngineOutput]:
        inputs = await self._in_thread(embedder.prepare, task.input, task.dimensions)
        tokens = sum(map(len, inputs))
        yield Prompt(tokens)
        for start, ids in enumerate(inputs):
            vector = await self._in_thread(embedder.embed, ids, task.dimensions)
            yield VectorBatch(start=start, dimensions=task.dimensions or embedder.dimensions, data=[vector])
        yield Finished(usage=Usage(prompt_tokens=tokens), system_fingerprint=f"fp_{self.compat()}")

    async def _in_thread(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        call = functools.partial(function, *args, **kwargs)
        return await asyncio.get_running_loop().run_in_executor(self._executor, call)

    async def close(self) -> None:
        if self._loop is not None:
            await self._loop.close()
        if self._embedder is not None:
            await self._in_thread(self._embedder.close)
        if self._loaded is not None:
            await self._in_thread(self._loaded.close)
        self._executor.shutdown(wait=False, cancel_futures=True)


def _form(text: TextModel, task: Chat | Completion) -> tuple[AnswerForm, Grammar | None]:
    from .torch_model.answer_form import AnswerForm, answer_form
    from .torch_model.guided import guided_form

    form = guided_form(task)
    if form is None:
        form = answer_form(task, text.calls, text.call_tokens) if isinstance(task, Chat) else AnswerForm()
    assert text.grammars is not None
    return form, text.grammars.compile(form)


def _text_model(loaded: Loaded, tokenizer: Any, tool_parser: Any) -> TextModel:
    """What the text side of ``torch_model`` wants to know of a model."""
    from .torch_model.call_formats import choose_format
    from .torch_model.loading import TextModel

    calls = choose_format(tokenizer.chat_template, tool_parser)
    call_tokens = {}
    for word in calls.markers if calls else ():
        ids = tokenizer.encode(word, special=False)
        if len(ids) == 1:
            call_tokens[word] = ids[0]
    if calls is None and tool_parser not in ("auto", "none"):
        raise ConfigurationError(f"tool_parser is {tool_parser}, but this model has no chat template")
    return TextModel(
        # A GGUF file has no defaults for sampling.
        model=SimpleNamespace(generation_config=SimpleNamespace(do_sample=False, repetition_penalty=None)),
        tokenizer=tokenizer,
        device="llama.cpp",
        context_length=loaded.context_length,
        vocabulary=loaded.vocabulary,
        eos=tokenizer.ends,
        compat=loaded.compat,
        calls=calls,
        call_tokens=call_tokens,
        grammars=tokenizer.grammars(),
    )
