"""Models without an answer in words: texts become vectors, scores or probabilities of classes, on vLLM."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncGenerator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import msgspec
from modelbus_broker.errors import ConfigurationError, EngineFailed
from modelbus_broker.messages import Capabilities, Classification, Embedding, Score

from ..base import VectorBatch
from ..torch_model.inputs import check_lengths, pairs_of, texts_of
from .adapters import Adapters
from .requests import vllm_errors

if TYPE_CHECKING:
    from numpy import ndarray

_numbers = itertools.count()


class Row(msgspec.Struct, frozen=True):
    """One input of the model."""

    ids: list[int]
    second: int | None = None  #: where the second text of a pair begins, for models that are told so


class Pooler:
    """A running vLLM with a model that embeds, scores or classifies."""

    def __init__(
        self, engine: Any, folder: Path, supported: Sequence[str], tokenizer: Any, compat: str, template: str
    ) -> None:
        """``supported``: vLLM's pooling tasks of this model. ``template``: for pairs; "": the model's usual form.

        Raises:
            ConfigurationError: the model is for other things.
        """
        model = engine.vllm_config.model_config
        task = model.get_pooling_task(supported)
        if task not in ("embed", "classify"):
            raise ConfigurationError(
                f"{folder} is a model for {task or 'nothing that vLLM knows'}; the vllm engine runs models that generate, "
                "embed, score or classify"
            )
        self.engine = engine
        self.compat = compat
        self._model = model
        self._template = template
        self._tokenizer = tokenizer
        self._lower = bool(getattr(engine.renderer.default_cmpl_tok_params, "do_lower_case", False))
        self.slots = int(engine.vllm_config.scheduler_config.max_num_seqs)
        self.adapters = Adapters(engine) if engine.vllm_config.lora_config is not None else None
        self.context_length = int(model.max_model_len)
        labels = getattr(model.hf_config, "id2label", None) or {}
        classes = int(getattr(model.hf_config, "num_labels", 0))
        self.kind: Literal["embedding", "score", "classification"] = "classification"
        if task == "embed":
            self.kind = "embedding"
        elif classes <= 1:
            self.kind = "score"
        self.labels = (
            [str(labels.get(index, index)) for index in range(classes)] if self.kind == "classification" else []
        )
        self.dimensions = int(model.embedding_size) if task == "embed" else 0
        self._pairs = self._pair_maker() if self.kind == "score" else None

    def capabilities(self) -> Capabilities:
        # Vectors can be compared, so a model that makes them also scores.
        tasks = ["embedding", "score"] if self.kind == "embedding" else [str(self.kind)]
        return Capabilities(
            tasks=tasks, streaming=False, adapters=self.adapters is not None, token_prompts=self.kind != "score",
            context_length=self.context_length, dimensions=self.dimensions,
        )  # fmt: skip

    def prepare(self, task: Embedding | Score | Classification) -> list[Row]:
        """The rows of a request, checked before anything is computed. Not for two threads at once.

        Raises:
            InvalidRequest: there is nothing to do, or a field has a value that it cannot have.
            ContextLengthExceeded: an input is too long; nothing is cut off silently.
        """
        if isinstance(task, Embedding):
            self._check_dimensions(task.dimensions)
        if not isinstance(task, Score):
            rows = self._rows(texts_of(task, self._tokenizer))
            self._check(rows, "input")
            return rows
        queries, documents = pairs_of(task)
        if self._pairs is not None:
            rows = [self._pair(query, document) for query, document in zip(queries, documents, strict=True)]
            self._check(rows, "pair")
            return rows
        own, others = self._rows(task.queries), self._rows(documents)
        self._check(own, "query")
        self._check(others, "document")
        return own + others

    def _check(self, rows: list[Row], what: Literal["input", "query", "document", "pair"]) -> None:
        check_lengths([len(row.ids) for row in rows], self.context_length, what)

    async def batches(
        self, task: Embedding | Score | Classification, rows: list[Row], name: str, lora: Any
    ) -> AsyncGenerator[VectorBatch]:
        """The results in the order of the inputs, as they become ready. Leaving early aborts what still runs."""
        if isinstance(task, Score) and self._pairs is None:
            yield await self._similarities(task, rows, name, lora)
            return
        dimensions = task.dimensions if isinstance(task, Embedding) else None
        running = self._start(rows, name, lora, dimensions)
        try:
            start = 0
            while start < len(running):
                made = [await running[start]]
                # What the same step of the engine has made goes out at once.
                made += [done.result() for done in itertools.takewhile(asyncio.Future.done, running[start + 1 :])]
                data = [vector.astype("<f4").tobytes() for vector in made]
                yield VectorBatch(start=start, dimensions=len(data[0]) // 4, data=data, labels=self.labels)
                start += len(made)
        finally:
            await _stop(running)

    async def _similarities(self, task: Score, rows: list[Row], name: str, lora: Any) -> VectorBatch:
        import numpy

        running = self._start(rows, name, lora, None)
        try:
            vectors = numpy.stack(await asyncio.gather(*running))
        finally:
            await _stop(running)
        vectors = vectors / numpy.maximum(numpy.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
        queries, documents = vectors[: len(task.queries)], vectors[len(task.queries) :]
        scores = (queries * documents).sum(axis=1).astype("<f4")
        return VectorBatch(start=0, dimensions=1, data=[score.tobytes() for score in scores])

    def _start(
        self, rows: list[Row], name: str, lora: Any, dimensions: int | None
    ) -> list[asyncio.Task[ndarray[Any, Any]]]:
        return [asyncio.create_task(self._compute(row, name, lora, dimensions)) for row in rows]

    async def _compute(self, row: Row, name: str, lora: Any, dimensions: int | None) -> ndarray[Any, Any]:
        from vllm import PoolingParams
        from vllm.inputs import TokensPrompt

        params = PoolingParams(task="embed" if self.kind == "embedding" else "classify", dimensions=dimensions)
        if row.second is not None:
            params.extra_kwargs = {"compressed_token_type_ids": row.second}
        prompt = TokensPrompt(prompt_token_ids=row.ids)
        with vllm_errors():
            async for output in self.engine.encode(prompt, params, f"{name}-{next(_numbers)}", lora_request=lora):
                if output.error is not None:
                    raise EngineFailed(f"vLLM: {output.error.message}")
                found: ndarray[Any, Any] = output.outputs.data.float().cpu().numpy().reshape(-1)
                return found
        raise EngineFailed("vLLM ended the request without a result")

    def _check_dimensions(self, dimensions: int | None) -> None:
        from vllm import PoolingParams

        if dimensions is not None:
            with vllm_errors("dimensions"):
                PoolingParams(task="embed", dimensions=dimensions).verify(self._model)

    def _rows(self, texts: list[str]) -> list[Row]:
        texts = [text.lower() for text in texts] if self._lower else texts
        return [Row(ids) for ids in self._tokenizer(texts, truncation=False, verbose=False)["input_ids"]]

    def _pair_maker(self) -> Any:
        """vLLM's own, since some models want their pairs in a form of their own."""
        from vllm.entrypoints.pooling.scoring.io_processor import CrossEncoderIOProcessor
        from vllm.renderers.chat_utils import ChatTemplateConfig

        maker = CrossEncoderIOProcessor(self.engine.vllm_config, self.engine.renderer, ChatTemplateConfig())
        maker.tokenizer = self._tokenizer
        return maker

    def _pair(self, query: str, document: str) -> Row:
        from vllm.entrypoints.pooling.scoring.utils import compress_token_type_ids

        assert self._pairs is not None
        encoding = {"truncation": False, "verbose": False}
        with vllm_errors("documents"):
            _, prompt = self._pairs.get_score_prompt(query, document, encoding, chat_template=self._template or None)
        types = prompt.get("token_type_ids")
        return Row(list(prompt["prompt_token_ids"]), compress_token_type_ids(types) if types else None)


async def _stop(running: Sequence[asyncio.Task[Any]]) -> None:
    for task in running:
        task.cancel()
    await asyncio.gather(*running, return_exceptions=True)
