"""The steps of one request: its prompt is read in pieces, then every step makes one token of each choice."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from modelbus_broker.messages import TokenLogprob, TopLogprob

from ..base import Output
from .batch import Decoder, Row
from .choice import Choice
from .loading import TextModel
from .sampling import Sampler
from .text import TokenTexts
from .work import Work

if TYPE_CHECKING:
    from torch import Tensor

#: Tokens of a prompt that are read in one step: others get their turn in between, and an abort is noticed.
_CPU_PIECE, _GPU_PIECE = 512, 4096
#: ... when the probabilities of all of them are wanted, which takes memory of the vocabulary's size for each.
_SCORED_PIECE = 128


class Scores:
    """Log probabilities as the model and the grammar give them, before temperature and penalties."""

    def __init__(self, tokenizer: Any) -> None:
        self._texts = TokenTexts(tokenizer)

    def of(self, logits: Tensor, token: int, alternatives: int) -> TokenLogprob:
        logprobs = logits.float().log_softmax(0)
        values, ids = logprobs.topk(min(alternatives, logprobs.shape[0]))
        top = []
        for value, other in zip(values.tolist(), ids.tolist(), strict=True):
            if value == float("-inf"):
                break  # the grammar allows no more
            text, raw = self._texts.of(other)
            top.append(TopLogprob(token=text, logprob=value, bytes=list(raw)))
        text, raw = self._texts.of(token)
        return TokenLogprob(token=text, logprob=float(logprobs[token]), bytes=list(raw), top=top, token_id=token)

    def first(self, token: int) -> TokenLogprob:
        """The first token of a prompt has nothing before it that could make it likely."""
        text, raw = self._texts.of(token)
        return TokenLogprob(token=text, logprob=0.0, bytes=list(raw), token_id=token)


class Stepper:
    """Turns work into outputs. Its iterators read prompts, and choose the tokens that ``read_wanted`` or they themselves read."""

    def __init__(self, loaded: TextModel, tokenizer: Any, count_step: Callable[[], None], *, together: bool) -> None:
        """``tokenizer`` belongs to the thread that runs the steps; ``count_step`` is called after each forward pass.

        ``together``: one forward pass for all sequences, where the model allows that.
        """
        self._decoder = Decoder(loaded.model, count_step, together=together)
        self._tokenizer = tokenizer
        self._scores = Scores(tokenizer)
        self._piece = _CPU_PIECE if loaded.device == "cpu" else _GPU_PIECE

    @property
    def together(self) -> bool:
        """Whether requests side by side share forward passes."""
        return self._decoder.together

    def read_wanted(self) -> None:
        """One forward pass for all sequences that wait for one; call it before each round of the iterators."""
        self._decoder.step()

    def answer(self, work: Work) -> Iterator[list[Output]]:
        """Runs one request: the prompts one after the other, the choices of a prompt side by side."""
        for number in range(len(work.prompts)):
            yield from self._answer_prompt(work, number)

    def _answer_prompt(self, work: Work, number: int) -> Iterator[list[Output]]:
        prompt = work.prompts[number]
        logprobs = work.plan.logprobs if work.echo else None
        scores = [] if logprobs is None else [self._scores.first(prompt[0])]
        cache, logits = None, None
        piece = self._piece if logprobs is None else _SCORED_PIECE
        for start in range(0, len(prompt), piece):
            part = prompt[start : start + piece]
            rows, cache = self._decoder.forward(part, cache, every=logprobs is not None)
            if logprobs is not None:
                following = prompt[start + 1 : start + 1 + len(part)]
                scores += [self._scores.of(row, token, logprobs) for row, token in zip(rows, following, strict=False)]
            logits = rows[-1]
            del rows
            yield []
        assert logits is not None
        turns: list[Iterator[list[Output]]] = []
        for index in range(number * work.n, (number + 1) * work.n):
            choice = Choice(work, number, index, self._tokenizer)
            sampler = Sampler(work.plan, index, prompt, logits, choice.constraint)
            # The last choice takes the cache itself, the others a copy.
            own = cache if len(turns) == work.n - 1 else copy.deepcopy(cache)
            turns.append(self._go_on(work, index, choice, choice.begin(scores), sampler, own, logits))
        del cache, own, logits
        while turns:
            # A token of each choice, so that all of them want their next one at once.
            outputs = [(steps, next(steps, None)) for steps in turns]
            turns = [steps for steps, output in outputs if output is not None]
            if turns:
                yield [one for _, output in outputs for one in output or ()]

    def _go_on(
        self, work: Work, index: int, choice: Choice, first: Output, sampler: Sampler, cache: Any, logits: Tensor
    ) -> Iterator[list[Output]]:
        if first.text or first.finish_reason or first.logprobs:
            yield [first]
        if choice.finish:
            return
        before, alternatives = work.before(index), work.plan.logprobs
        sampler.replay(before)
        for start in range(0, len(before), self._piece):
            rows, cache = self._decoder.forward(before[start : start + self._piece], cache)
            logits = rows[-1]
            yield []
        row = Row(cache)
        del cache
        try:
            while True:
                token = sampler.choose(logits)
                sampler.count(token)
                score = None
                if alternatives is not None:
                    held = logits if choice.constraint is None else choice.constraint.held(logits)
                    score = self._scores.of(held, token, alternatives)
                output = choice.take(token, score)
                if not choice.finish:
                    self._decoder.want(row, token)
                yield [output]
                if choice.finish:
                    return
                logits = self._decoder.logits(row)
        finally:
            self._decoder.leave(row)
