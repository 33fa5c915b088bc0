"""Texts become vectors, by a sentence-transformers folder."""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING, Any

import msgspec
from modelbus_broker.errors import ConfigurationError, InvalidRequest, MissingExtra
from modelbus_broker.messages import Embedding

from .fingerprint import fingerprint
from .inputs import check_lengths, texts_of
from .loading import Source, loading_errors
from .settings import TransformersSettings

if TYPE_CHECKING:
    from numpy import ndarray

log = logging.getLogger(__name__)


class Texts(msgspec.Struct, frozen=True, kw_only=True):
    """Inputs that fit the model, and how many tokens they are together."""

    texts: list[str]
    tokens: int


class Embedder:
    """A loaded embedding model; not for use by two threads at once."""

    def __init__(self, source: Source, settings: TransformersSettings, device: str) -> None:
        """Loads it; blocks for seconds. Raises as ``load_text_model`` does."""
        began = time.monotonic()
        with loading_errors(source):
            try:
                from sentence_transformers import SentenceTransformer
            except ImportError as error:
                raise MissingExtra(
                    f"embeddings need sentence-transformers: {error}: pip install 'modelbus[transformers]'"
                ) from error
            self._model: Any = SentenceTransformer(
                str(source.folder),
                device=device,
                local_files_only=True,
                trust_remote_code=settings.trust_remote_code,
                model_kwargs={"dtype": settings.torch_dtype(device)},
            )
            if settings.max_model_len:
                self._raise_limit(settings.max_model_len)
        self._normalize = source.normalize
        self._batch_size = settings.batch_size
        self.context_length: int = self._model.max_seq_length or 0
        self.dimensions: int = self._model.get_embedding_dimension()
        self.compat = fingerprint(source.files, "transformers", str(self._model.dtype))
        log.info("loaded %s on %s in %.1f s", source.folder, device, time.monotonic() - began)

    def _raise_limit(self, wanted: int) -> None:
        inner = self._model.transformers_model
        made_for = getattr(getattr(inner, "config", None), "max_position_embeddings", 0)
        if wanted < 0 or (made_for and wanted > made_for):
            raise ConfigurationError(f"max_model_len is {wanted}, but the model was made for 1 to {made_for} tokens")
        self._model.max_seq_length = wanted

    def prepare(self, task: Embedding) -> Texts:
        """Checks a request before anything is computed.

        Raises:
            InvalidRequest: no input, a token id that is not in the vocabulary, or more dimensions than the model has.
            ContextLengthExceeded: an input is too long; nothing is cut off silently.
        """
        if task.dimensions is not None and not 1 <= task.dimensions <= self.dimensions:
            raise InvalidRequest(f"dimensions must be in 1 to {self.dimensions}", param="dimensions")
        texts = texts_of(task, self._model.tokenizer)
        # Said once here, so that the tokenizer does not warn of long texts.
        counts = [len(ids) for ids in self._model.tokenizer(texts, truncation=False, verbose=False)["input_ids"]]
        check_lengths(counts, self.context_length, "input")
        return Texts(texts=texts, tokens=sum(counts))

    def batches(self, texts: list[str]) -> list[tuple[int, list[str]]]:
        """The texts in the pieces that are embedded at once, each with the index of its first."""
        size = self._batch_size
        return [(start, texts[start : start + size]) for start in range(0, len(texts), size)]

    def embed(self, texts: list[str], dimensions: int | None) -> list[bytes]:
        """One little-endian float32 vector per text; cut to ``dimensions`` and then of length 1, if given."""
        import numpy

        vectors: ndarray[Any, Any] = self._model.encode(
            texts, batch_size=self._batch_size, normalize_embeddings=self._normalize, show_progress_bar=False
        )
        vectors = vectors.astype("<f4")
        if dimensions is not None:
            vectors = vectors[:, :dimensions]
            lengths = numpy.linalg.norm(vectors, axis=1, keepdims=True)
            vectors = vectors / numpy.maximum(lengths, 1e-12)
        return [vector.astype("<f4").tobytes() for vector in vectors]
