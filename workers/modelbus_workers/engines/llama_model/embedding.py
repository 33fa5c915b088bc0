"""Texts become vectors: pooled by the model, one decode each, of length 1."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import llama_cpp
import numpy
from modelbus_broker.errors import ContextLengthExceeded, EngineFailed, InvalidRequest

from .library import Loaded
from .vocabulary import GgufTokenizer


class Embedder:
    """Embeds with a context that was made for it; not for use by two threads at once."""

    def __init__(self, loaded: Loaded, tokenizer: GgufTokenizer, count_step: Callable[[], None]) -> None:
        self._loaded, self._tokenizer, self._count_step = loaded, tokenizer, count_step
        self.dimensions = int(llama_cpp.llama_model_n_embd_out(loaded.model))
        self._batch: Any = llama_cpp.llama_batch_init(loaded.n_batch, 0, 1)

    def prepare(self, inputs: list[str | list[int]], dimensions: int | None) -> list[list[int]]:
        """The tokens of each input.

        Raises:
            InvalidRequest: no input, a token id that is not in the vocabulary, or more dimensions than the model has.
            ContextLengthExceeded: an input is too long; nothing is cut off silently.
        """
        if not inputs:
            raise InvalidRequest("input is empty", param="input")
        if dimensions is not None and not 1 <= dimensions <= self.dimensions:
            raise InvalidRequest(f"dimensions must be in 1 to {self.dimensions}", param="dimensions")
        found, most = [], self._loaded.context_length
        for index, given in enumerate(inputs):
            tokens = self._tokenizer.encode(given, special=True) if isinstance(given, str) else given
            for token in tokens:
                if not 0 <= token < self._loaded.vocabulary:
                    raise InvalidRequest(
                        f"token id {token} is not in 0 to {self._loaded.vocabulary - 1}", param="input"
                    )
            if not tokens:
                raise InvalidRequest(f"input {index} is empty", param="input")
            if len(tokens) > most:
                raise ContextLengthExceeded(
                    f"This model's maximum context length is {most} tokens, but input {index} has {len(tokens)} tokens. "
                    "Please reduce its length.",
                    param="input",
                )
            found.append(tokens)
        return found

    def embed(self, tokens: list[int], dimensions: int | None) -> bytes:
        """A little-endian float32 vector of length 1; cut to ``dimensions`` before, if given."""
        batch, context = self._batch, self._loaded.context
        for at, token in enumerate(tokens):
            batch.token[at], batch.pos[at], batch.n_seq_id[at], batch.logits[at] = token, at, 1, 1
            batch.seq_id[at][0] = 0
        batch.n_tokens = len(tokens)
        memory = llama_cpp.llama_get_memory(context)
        if memory:
            llama_cpp.llama_memory_clear(memory, True)
        code = llama_cpp.llama_decode(context, batch)
        self._count_step()
        pointer = None if code else llama_cpp.llama_get_embeddings_seq(context, 0)
        if not pointer:
            raise EngineFailed(f"llama.cpp cannot embed (code {code}): {self._loaded.words()}")
        vector = numpy.ctypeslib.as_array(pointer, (self.dimensions,)).astype("<f4")[: dimensions or self.dimensions]
        return (vector / max(float(numpy.linalg.norm(vector)), 1e-12)).astype("<f4").tobytes()

    def close(self) -> None:
        llama_cpp.llama_batch_free(self._batch)
