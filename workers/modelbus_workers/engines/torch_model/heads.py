"""Pairs become scores and texts become probabilities, by a folder of a ``...ForSequenceClassification``."""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING, Any

import msgspec
from modelbus_broker.errors import ConfigurationError
from modelbus_broker.messages import Classification, Score

from .fingerprint import fingerprint
from .inputs import check_lengths, pairs_of, texts_of
from .loading import Source, context_length, loading_errors
from .settings import TransformersSettings

if TYPE_CHECKING:
    from torch import Tensor

log = logging.getLogger(__name__)


class Rows(msgspec.Struct, frozen=True, kw_only=True):
    """Inputs that fit the model, as token ids and whatever else its tokenizer makes of them."""

    rows: list[dict[str, list[int]]]
    tokens: int


class Head:
    """A loaded model with one output, which scores pairs, or with one for each class; not for two threads at once."""

    def __init__(self, source: Source, settings: TransformersSettings, device: str) -> None:
        """Loads it; blocks for seconds. Raises as ``load_text_model`` does."""
        began = time.monotonic()
        with loading_errors(source):
            from transformers import AutoModelForSequenceClassification, AutoTokenizer

            known: dict[str, Any] = {"trust_remote_code": settings.trust_remote_code, "local_files_only": True}
            self._tokenizer: Any = AutoTokenizer.from_pretrained(source.folder, **known)
            options = known | (
                {"attn_implementation": settings.attn_implementation} if settings.attn_implementation else {}
            )
            model: Any = AutoModelForSequenceClassification.from_pretrained(
                source.folder, dtype=settings.torch_dtype(device), **options
            )
        self._model = model.eval().to(device)
        self._device = device
        config = model.config
        # Without a token to pad with, texts of several lengths cannot be in one batch.
        self._batch_size = 1 if self._tokenizer.pad_token is None else settings.batch_size
        self.context_length = context_length(config.get_text_config(), self._tokenizer, settings.max_model_len)
        self.labels: list[str] = [str(config.id2label[index]) for index in range(config.num_labels)]
        #: Several labels may hold for one text: each has a probability of its own.
        self._independent = config.problem_type == "multi_label_classification"
        self._raw = self.scores and _scores_are_logits(config)
        self.compat = fingerprint(source.files, "transformers", str(model.dtype))
        log.info("loaded %s on %s in %.1f s", type(model).__name__, device, time.monotonic() - began)

    @property
    def scores(self) -> bool:
        """Whether it has one output: the score of a pair."""
        return len(self.labels) == 1

    def prepare(self, task: Score | Classification) -> Rows:
        """Checks a request before anything is computed.

        Raises:
            InvalidRequest: nothing to do, numbers of queries and documents that do not fit each other, or a token id
                that is not in the vocabulary.
            ContextLengthExceeded: an input is too long; nothing is cut off silently.
        """
        rows = self._rows(*pairs_of(task)) if isinstance(task, Score) else self._rows(texts_of(task, self._tokenizer))
        counts = [len(row["input_ids"]) for row in rows]
        check_lengths(counts, self.context_length, "pair" if self.scores else "input")
        return Rows(rows=rows, tokens=sum(counts))

    def _rows(self, *texts: list[str]) -> list[dict[str, list[int]]]:
        made = self._tokenizer(*texts, truncation=False, verbose=False)
        return [{name: values[index] for name, values in made.items()} for index in range(len(texts[0]))]

    def batches(self, rows: Rows) -> list[tuple[int, list[dict[str, list[int]]]]]:
        """The rows in the pieces that are computed at once, each with the index of its first."""
        size = self._batch_size
        return [(start, rows.rows[start : start + size]) for start in range(0, len(rows.rows), size)]

    def compute(self, rows: list[dict[str, list[int]]]) -> list[bytes]:
        """Of each row the score, or a probability per class, as little-endian float32."""
        import torch

        if len(rows) == 1:
            inputs: Any = {name: torch.tensor([values]) for name, values in rows[0].items()}
        else:
            inputs = self._tokenizer.pad(rows, return_tensors="pt")
        with torch.inference_mode():
            logits = self._model(**{name: values.to(self._device) for name, values in inputs.items()}).logits
            found = self._activated(logits.float())
        return [row.astype("<f4").tobytes() for row in found.cpu().numpy()]

    def _activated(self, logits: Tensor) -> Tensor:
        if self._raw:
            return logits
        if self.scores or self._independent:
            return logits.sigmoid()
        return logits.softmax(-1)


def _scores_are_logits(config: Any) -> bool:
    """What sentence-transformers' ``CrossEncoder`` does with the output: the sigmoid, unless the folder says none.

    Raises:
        ConfigurationError: the folder names another function.
    """
    said = getattr(config, "sentence_transformers", None) or {}
    name = said.get("activation_fn") or getattr(config, "sbert_ce_default_activation_function", None) or "Sigmoid"
    last = str(name).rpartition(".")[2]
    if last not in ("Sigmoid", "Identity"):
        raise ConfigurationError(f"the model's scores go through {name}; known are Sigmoid and Identity")
    return last == "Identity"
