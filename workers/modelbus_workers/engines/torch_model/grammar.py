"""Holds a model to a grammar: which tokens may come next."""

from __future__ import annotations

import logging
import time
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Self

from modelbus_broker.errors import EngineFailed, InvalidRequest

from .answer_form import AnswerForm

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer
    from torch import Tensor

log = logging.getLogger(__name__)


class Grammar:
    """A compiled grammar. Many choices can be held to it, each by a constraint of its own."""

    def __init__(self, matcher: LLMatcher) -> None:
        self._matcher = matcher

    def constraint(self) -> Constraint:
        return Constraint(self._matcher.deep_copy())


class Grammars:
    """Compiles grammars for one model and remembers the last ones."""

    def __init__(self, tokenizer: LLTokenizer) -> None:
        self._tokenizer = tokenizer
        self._compiled = lru_cache(maxsize=256)(self._compile)

    @classmethod
    def of_tokenizer(cls, tokenizer: Any, vocabulary: int, ends: frozenset[int]) -> Self:
        """For one of Hugging Face's tokenizers; takes up to a second. ``ends``: the tokens that end an answer.

        Raises:
            ValueError: the tokenizer is not one of those that can be read.
        """
        from llguidance.hf import from_tokenizer

        began = time.monotonic()
        read = from_tokenizer(tokenizer, n_vocab=vocabulary, eos_token=sorted(ends) or None)
        log.info("made ready for grammars in %.1f s", time.monotonic() - began)
        return cls(read)

    def compile(self, form: AnswerForm) -> Grammar | None:
        """The grammar of a form; None if it has none.

        Raises:
            InvalidRequest: a schema is wrong, says what no grammar can, or is too large; ``param`` names its field.
        """
        return self._compiled(form) if form.rules else None

    def _compile(self, form: AnswerForm) -> Grammar:
        from llguidance import LLMatcher

        matcher = LLMatcher(self._tokenizer, form.grammar, log_level=0)
        if not matcher.is_error():
            return Grammar(matcher)
        for schema in form.schemas:
            wrong = LLMatcher.validate_grammar(LLMatcher.grammar_from_json_schema(schema.text), self._tokenizer)
            if wrong:
                raise InvalidRequest(f"Invalid schema for '{schema.param}': {_first_line(wrong)}", param=schema.param)
        raise InvalidRequest(
            f"the form of the answer cannot be made a grammar: {_first_line(matcher.get_error())}",
            param=form.schemas[-1].param if form.schemas else form.param,
        )


def _first_line(words: str) -> str:
    return next((line.strip() for line in words.splitlines() if line.strip()), "")


class Constraint:
    """Where one choice is in its grammar. Its state depends on the tokens alone."""

    def __init__(self, matcher: LLMatcher) -> None:
        self._matcher = matcher
        self._forbidden: Tensor | None = None  # of the next token; None: not computed yet

    def held(self, logits: Tensor) -> Tensor:
        """A copy of a row of logits in which the forbidden tokens are impossible."""
        if self._forbidden is None:
            import torch

            self._forbidden = torch.from_numpy(self.forbidden(logits.shape[0])).to(logits.device)
        return logits.masked_fill(self._forbidden, float("-inf"))

    def forbidden(self, vocabulary: int) -> Any:
        """For each token of the vocabulary whether it may not come next: an array of bool."""
        import numpy

        bits = numpy.frombuffer(self._matcher.compute_bitmask(), numpy.uint8)
        if self._matcher.is_error():
            raise EngineFailed(f"the grammar of the answer broke: {_first_line(self._matcher.get_error())}")
        return numpy.unpackbits(bits, bitorder="little", count=vocabulary) == 0

    def take(self, token: int) -> None:
        """The token is the next one of the output.

        Raises:
            EngineFailed: the grammar does not allow it.
        """
        self._forbidden = None
        if not self._matcher.consume_token(token):
            raise EngineFailed(f"the grammar of the answer broke: {_first_line(self._matcher.get_error())}")

    @property
    def complete(self) -> bool:
        """Nothing can follow any more."""
        return self._matcher.is_stopped()
