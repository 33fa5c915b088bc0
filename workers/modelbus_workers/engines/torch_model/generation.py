"""The steps of one request: its prompt is read in pieces, then every step makes one token of each choice."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from modelbus_broker.messages import TokenLogprob, TopLogprob

from ..base import Output
from .adapters import Adapters
from .batch import Decoder, Row
from .choice import Choice
from .drafting import Drafting
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

    def __init__(
        self,
        loaded: TextModel,
        tokenizer: Any,
        count_step: Callable[[], None],
        *,
        together: bool,
        adapters: Adapters | None = None,
        drafting: Drafting | None = None,
    ) -> None:
        """``tokenizer`` belongs to the thread that runs the steps; ``count_step`` is called after each forward pass.

        ``together``: one forward pass for all sequences with the same adapter, where the model allows that. With
        ``drafting`` each sequence is read when its turn comes, several tokens at once.
        """
        self._decoder = Decoder(loaded.model, count_step, together=together, adapters=adapters)
        self._adapters, self._drafting = adapters, drafting
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
        """Runs one request: the prompts one after the other, the choices of a prompt side by side.

        Raises:
            AdapterUnavailable: its adapter does not fit the model.
        """
        held = work.adapter
        if held is not None and self._adapters is not None:
            self._adapters.hold(held)
        try:
            for number in range(len(work.prompts)):
                yield from self._answer_prompt(work, number)
        finally:
            if held is not None and self._adapters is not None:
                self._adapters.release(held)

    def _answer_prompt(self, work: Work, number: int) -> Iterator[list[Output]]:
        prompt = work.prompts[number]
        logprobs = work.plan.logprobs if work.echo else None
        scores = [] if logprobs is None else [self._scores.first(prompt[0])]
        cache, logits = None, None
        piece = self._piece if logprobs is None else _SCORED_PIECE
        if work.features:
            piece = len(prompt)  # images are read with all of the tokens that stand for them
        for start in range(0, len(prompt), piece):
            part = prompt[start : start + piece]
            rows, cache = self._decoder.forward(
                part, cache, adapter=work.adapter, every=logprobs is not None, features=work.features
            )
            if logprobs is not None:
                following = prompt[start + 1 : start + 1 + len(part)]
                scores += [self._scores.of(row, token, logprobs) for row, token in zip(rows, following, strict=False)]
            logits = rows[-1]
            del rows
            yield []
        assert logits is not None
        if work.labels:
            yield from self._label_scores(work, cache, logits)
            return
        turns: list[Iterator[list[Output]]] = []
        for index in range(number * work.n, (number + 1) * work.n):
            choice = Choice(work, number, index, self._tokenizer)
            sampler = Sampler(work.plan, index, prompt, logits, choice.constraint)
            # The last choice takes the cache itself, the others a copy.
            own = cache if len(turns) == work.n - 1 else copy.deepcopy(cache)
            first = choice.begin(scores)
            turns.append(self._go_on(work, prompt, index, choice, first, sampler, own, logits))
        del cache, own, logits
        while turns:
            # A step of each choice, so that all of them want their next token at once.
            outputs = [(steps, next(steps, None)) for steps in turns]
            turns = [steps for steps, output in outputs if output is not None]
            if turns:
                yield [one for _, output in outputs for one in output or ()]

    def _label_scores(self, work: Work, cache: Any, logits: Tensor) -> Iterator[list[Output]]:
        """One output for each label: the log probabilities of its tokens after the prompt."""
        for index, label in enumerate(work.labels):
            scores = [self._scores.of(logits, label[0], 0)]
            if len(label) > 1:
                rows, _ = self._decoder.forward(label[:-1], copy.deepcopy(cache), adapter=work.adapter, every=True)
                scores += [self._scores.of(row, token, 0) for row, token in zip(rows, label[1:], strict=True)]
            yield [Output(choice=index, tokens=0, finish_reason="stop", logprobs=scores)]

    def _go_on(
        self,
        work: Work,
        prompt: list[int],
        index: int,
        choice: Choice,
        first: Output,
        sampler: Sampler,
        cache: Any,
        logits: Tensor,
    ) -> Iterator[list[Output]]:
        if first.text or first.finish_reason or first.logprobs:
            yield [first]
        if choice.finish:
            return
        before = work.before(index)
        sampler.replay(before)
        for start in range(0, len(before), self._piece):
            rows, cache = self._decoder.forward(before[start : start + self._piece], cache, adapter=work.adapter)
            logits = rows[-1]
            yield []
        row = Row(cache, work.adapter)
        del cache
        try:
            if self._drafting is not None:
                yield from self._guessed(self._drafting, work, [*prompt, *before], choice, sampler, row, logits)
                return
            while True:
                token, output = self._choose(work, choice, sampler, logits)
                if not choice.finish:
                    self._decoder.want(row, token)
                yield [output]
                if choice.finish:
                    return
                logits = self._decoder.logits(row)
        finally:
            self._decoder.leave(row)

    def _choose(self, work: Work, choice: Choice, sampler: Sampler, logits: Tensor) -> tuple[int, Output]:
        token = sampler.choose(logits)
        sampler.count(token)
        score = None
        if work.plan.logprobs is not None:
            held = logits if choice.constraint is None else choice.constraint.held(logits)
            score = self._scores.of(held, token, work.plan.logprobs)
        return token, choice.take(token, score)

    def _guessed(
        self,
        drafting: Drafting,
        work: Work,
        tokens: list[int],
        choice: Choice,
        sampler: Sampler,
        row: Row,
        logits: Tensor,
    ) -> Iterator[list[Output]]:
        """Chooses one token after the other, as without guesses; those that were guessed right have been read by then.

        ``tokens``: all so far; ``logits``: what follows them.
        """
        drafter = drafting.drafter()
        known, guesses = [logits], list[int]()
        while True:
            outputs, right = [], 0
            for at, row_logits in enumerate(known):
                token, output = self._choose(work, choice, sampler, row_logits)
                outputs.append(output)
                tokens.append(token)
                if choice.finish or guesses[at : at + 1] != [token]:
                    break
                right += 1
            drafting.counts.kept += right
            yield outputs
            if choice.finish:
                return
            if right < len(guesses):
                row.cache.crop(right - len(guesses))
            # One token is chosen beyond what is guessed.
            guesses = drafter.guess(tokens, choice.left - 1)
            drafting.counts.guessed += len(guesses)
            read = [tokens[-1], *guesses]
            found, row.cache = self._decoder.forward(read, row.cache, adapter=work.adapter, every=True)
            known = list(found)
