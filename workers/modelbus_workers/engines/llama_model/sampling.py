"""Logits become one token. The counterpart of the transformers engine's, on numpy."""

from __future__ import annotations

import random
from typing import Any

import numpy
from modelbus_broker.messages import TokenLogprob, TopLogprob

from ..torch_model.grammar import Constraint
from ..torch_model.plan import Plan
from .vocabulary import TokenTexts

#: So many tokens are sorted first: seldom are more of them likely enough, and sorting a vocabulary takes milliseconds.
_FEW = 256


class Sampler:
    """Chooses the tokens of one choice.

    Random numbers come one per token from the choice's own generator, so a choice that goes on after ``k`` tokens of
    another run draws what that run would have drawn.
    """

    def __init__(self, plan: Plan, choice: int, prompt: list[int], last_n: int, constraint: Constraint | None) -> None:
        """``last_n``: how many tokens the repetition penalty sees; below 0: all. The caller moves ``constraint`` on."""
        self._plan, self._last_n, self._constraint = plan, last_n, constraint
        self._random = random.Random(None if plan.seed is None else plan.seed + choice)
        self._seen = list(prompt)
        self._counts: dict[int, int] = {}
        self._output_tokens = 0

    def choose(self, logits: Any) -> int:
        """The next token; ``logits`` is a float32 row and stays as it is. Call ``count`` with the token then."""
        scores = self._adjusted(logits)
        if self._constraint is not None:
            forbidden = self._constraint.forbidden(len(scores))
            held = numpy.where(forbidden, -numpy.inf, scores)
            # min_tokens may forbid the end and the grammar all but the end: the form of an answer is worth more.
            scores = held if numpy.isfinite(held).any() else numpy.where(forbidden, -numpy.inf, logits)
        if self._plan.temperature == 0.0:
            return int(scores.argmax())
        return self._draw(scores, self._random.random())

    def count(self, token: int) -> None:
        """The token is part of the output."""
        self._output_tokens += 1
        self._seen.append(token)
        self._counts[token] = self._counts.get(token, 0) + 1

    def replay(self, tokens: list[int]) -> None:
        """These tokens were chosen by an earlier run."""
        for token in tokens:
            self._random.random()
            self.count(token)

    def _adjusted(self, logits: Any) -> Any:
        plan, scores = self._plan, logits.copy()
        if plan.logit_bias:
            scores[list(plan.logit_bias)] += numpy.array(list(plan.logit_bias.values()), "<f4")
        if self._output_tokens < plan.min_tokens:
            scores[[token for token in plan.stop_ids if token < len(scores)]] = -numpy.inf
        if plan.repetition_penalty != 1.0 and self._last_n:
            seen = sorted(set(self._seen[-self._last_n :] if self._last_n > 0 else self._seen))
            found, penalty = scores[seen], plan.repetition_penalty
            scores[seen] = numpy.where(found > 0, found / penalty, found * penalty)
        if self._counts and (plan.frequency_penalty or plan.presence_penalty):
            counts = numpy.array(list(self._counts.values()), "<f4")
            scores[list(self._counts)] -= plan.frequency_penalty * counts + plan.presence_penalty
        return scores

    def _draw(self, scores: Any, point: float) -> int:
        plan, order = self._plan, None
        weights = numpy.exp((scores.astype("<f8") - float(scores.max())) / plan.temperature)
        weights /= weights.sum()
        if plan.top_p < 1.0 or plan.top_k:
            order = self._likeliest(weights)
            weights = weights[order]
            weights /= weights.sum() if plan.top_k else 1.0
        if plan.top_p < 1.0:
            weights[weights.cumsum() - weights >= plan.top_p] = 0.0
        if plan.min_p > 0.0:
            weights[weights < plan.min_p * weights.max()] = 0.0
        sums = weights.cumsum()
        place = min(int((sums <= point * sums[-1]).sum()), int(weights.nonzero()[0][-1]))
        return place if order is None else int(order[place])

    def _likeliest(self, weights: Any) -> Any:
        """The tokens that top_k and top_p leave, and maybe more, the likeliest first."""
        wanted = self._plan.top_k or len(weights)
        count = min(wanted, _FEW, len(weights))
        few = numpy.argpartition(-weights, count - 1)[:count]
        if count < wanted and (self._plan.top_k or weights[few].sum() < self._plan.top_p):
            return numpy.argsort(-weights, kind="stable")[:wanted]
        return few[numpy.argsort(-weights[few], kind="stable")]


def token_score(texts: TokenTexts, logits: Any, token: int, alternatives: int) -> TokenLogprob:
    """Log probabilities as the model gives them, before temperature, penalties and grammar."""
    wide = logits.astype("<f8")
    logprobs = wide - (wide.max() + numpy.log(numpy.exp(wide - wide.max()).sum()))
    top = []
    if alternatives:
        best = numpy.argpartition(-logprobs, min(alternatives, len(logprobs)) - 1)[:alternatives]
        for other in best[numpy.argsort(-logprobs[best], kind="stable")].tolist():
            text, raw = texts.of(other)
            top.append(TopLogprob(token=text, logprob=float(logprobs[other]), bytes=raw))
    text, raw = texts.of(token)
    return TokenLogprob(token=text, logprob=float(logprobs[token]), bytes=raw, top=top, token_id=token)
