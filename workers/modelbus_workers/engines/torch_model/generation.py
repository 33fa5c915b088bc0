"""The steps of one request: its prompt is read in pieces, then every step makes one token of one choice."""

from __future__ import annotations

import copy
import inspect
from collections import deque
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import msgspec
from modelbus_broker.errors import EngineFailed
from modelbus_broker.messages import FinishReason, TokenLogprob, TopLogprob

from ..base import Output
from .loading import TextModel
from .plan import Plan
from .sampling import Sampler
from .text import Detokenizer, StopBuffer, TokenTexts

if TYPE_CHECKING:
    from torch import Tensor

#: Tokens of a prompt that are read in one step: others get their turn in between, and an abort is noticed.
_CPU_PIECE, _GPU_PIECE = 512, 4096
#: ... when the probabilities of all of them are wanted, which takes memory of the vocabulary's size for each.
_SCORED_PIECE = 128


class Work(msgspec.Struct, frozen=True, kw_only=True):
    """What the loop is asked to do."""

    prompts: list[list[int]]
    max_tokens: list[int]  #: per prompt
    plan: Plan
    n: int = 1
    echo: list[str] = []  #: the texts of the prompts, if they shall be part of the answer
    output_token_ids: list[list[int]] = []  #: per choice, of an earlier run
    emitted_chars: list[int] = []

    def before(self, choice: int) -> list[int]:
        """What an earlier run has made of this choice."""
        return self.output_token_ids[choice] if choice < len(self.output_token_ids) else []

    def emitted(self, choice: int) -> int:
        """How many characters of this choice the client has."""
        return self.emitted_chars[choice] if choice < len(self.emitted_chars) else 0


class Scores:
    """Log probabilities as the model gives them, before temperature and penalties."""

    def __init__(self, tokenizer: Any) -> None:
        self._texts = TokenTexts(tokenizer)

    def of(self, logits: Tensor, token: int, alternatives: int) -> TokenLogprob:
        logprobs = logits.float().log_softmax(0)
        values, ids = logprobs.topk(min(alternatives, logprobs.shape[0]))
        top = []
        for value, other in zip(values.tolist(), ids.tolist(), strict=True):
            text, raw = self._texts.of(other)
            top.append(TopLogprob(token=text, logprob=value, bytes=list(raw)))
        text, raw = self._texts.of(token)
        return TokenLogprob(token=text, logprob=float(logprobs[token]), bytes=list(raw), top=top, token_id=token)

    def first(self, token: int) -> TokenLogprob:
        """The first token of a prompt has nothing before it that could make it likely."""
        text, raw = self._texts.of(token)
        return TokenLogprob(token=text, logprob=0.0, bytes=list(raw), token_id=token)


class Choice:
    """The text side of one choice: which tokens it has, what of their text may go out, whether it has ended."""

    def __init__(self, work: Work, number: int, index: int, tokenizer: Any) -> None:
        self._work, self._plan = work, work.plan
        self._limit = work.max_tokens[number]
        self._index = index
        self._echo = work.echo[number] if work.echo else ""
        self._skip = work.emitted(index)
        self._tokens = 0
        self._text = Detokenizer(tokenizer, work.prompts[number])
        self._stops = StopBuffer(work.plan.stop)
        self.finish: FinishReason = ""

    def begin(self, echo_scores: list[TokenLogprob]) -> Output:
        """What the client lacks of the echo and of the tokens of an earlier run."""
        before = self._work.before(self._index)
        text = self._echo + "".join(self._add(token) for token in before)
        if not self.finish and self._tokens >= self._limit:
            text += self._end("length")
        return Output(
            choice=self._index,
            text=self._unseen(text),
            finish_reason=self.finish,
            # The client of an earlier run has them.
            logprobs=[] if before else echo_scores,
        )

    def take(self, token: int, score: TokenLogprob | None) -> Output:
        """A new token. One that only ends the answer has no text, so it has no log probability either."""
        text = self._unseen(self._add(token))
        ends = token in self._plan.stop_ids
        return Output(
            choice=self._index,
            text=text,
            token_ids=[token],
            finish_reason=self.finish,
            logprobs=[score] if score is not None and not ends else [],
        )

    def _add(self, token: int) -> str:
        if self.finish:
            return ""
        self._tokens += 1
        if token in self._plan.stop_ids and self._tokens > self._plan.min_tokens:
            return self._end("stop")
        text = self._text.add(token)
        if self._tokens > self._plan.min_tokens:
            text, found = self._stops.add(text)
            if found:
                self.finish = "stop"
                return text
        if self._tokens >= self._limit:
            text += self._end("length")
        return text

    def _end(self, reason: FinishReason) -> str:
        self.finish = reason
        text, found = self._stops.add(self._text.flush())
        if found:
            self.finish = "stop"
            return text
        return text + self._stops.flush()

    def _unseen(self, text: str) -> str:
        unseen = text[self._skip :]
        self._skip = max(0, self._skip - len(text))
        return unseen


class Stepper:
    """Turns work into outputs. Every item of its iterators is one forward pass of the model, or none."""

    def __init__(self, loaded: TextModel, tokenizer: Any, count_step: Callable[[], None]) -> None:
        """``tokenizer`` belongs to the thread that runs the steps; ``count_step`` is called after each forward pass."""
        self._count_step = count_step
        self._model = loaded.model
        self._device = loaded.model.device
        self._tokenizer = tokenizer
        self._scores = Scores(tokenizer)
        self._piece = _CPU_PIECE if loaded.device == "cpu" else _GPU_PIECE
        self._keeps_logits = "logits_to_keep" in inspect.signature(loaded.model.forward).parameters

    def answer(self, work: Work) -> Iterator[list[Output]]:
        """Runs one request: the prompts one after the other, the choices of a prompt in turns."""
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
            rows, cache = self._forward(part, cache, every=logprobs is not None)
            if logprobs is not None:
                following = prompt[start + 1 : start + 1 + len(part)]
                scores += [self._scores.of(row, token, logprobs) for row, token in zip(rows, following, strict=False)]
            logits = rows[-1]
            del rows
            yield []
        assert logits is not None
        turns: deque[Iterator[list[Output]]] = deque()
        for index in range(number * work.n, (number + 1) * work.n):
            choice = Choice(work, number, index, self._tokenizer)
            sampler = Sampler(work.plan, index, prompt, logits)
            # The last choice takes the cache itself, the others a copy.
            own = cache if len(turns) == work.n - 1 else copy.deepcopy(cache)
            turns.append(self._go_on(work, index, choice, choice.begin(scores), sampler, own, logits))
        del cache, logits
        while turns:
            steps = turns.popleft()
            outputs = next(steps, None)
            if outputs is not None:
                turns.append(steps)
                yield outputs

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
            rows, cache = self._forward(before[start : start + self._piece], cache)
            logits = rows[-1]
            yield []
        while True:
            token = sampler.choose(logits)
            sampler.count(token)
            score = None if alternatives is None else self._scores.of(logits, token, alternatives)
            yield [choice.take(token, score)]
            if choice.finish:
                return
            rows, cache = self._forward([token], cache)
            logits = rows[-1]

    def _forward(self, tokens: list[int], cache: Any, *, every: bool = False) -> tuple[Tensor, Any]:
        """Rows of float32 logits, the last one or all, and the cache that has these tokens too."""
        import torch

        options = {} if every or not self._keeps_logits else {"logits_to_keep": 1}
        if cache is not None:
            options["past_key_values"] = cache
        ids = torch.tensor([tokens], device=self._device)
        answer = self._model(input_ids=ids, use_cache=True, **options)
        self._count_step()
        cache = getattr(answer, "past_key_values", None)
        if cache is None:
            raise EngineFailed(f"{type(self._model).__name__} has no key-value cache, so this engine cannot run it")
        return answer.logits[0].float(), cache
