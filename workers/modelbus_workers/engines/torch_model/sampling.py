"""Logits become one token."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

from .grammar import Constraint
from .plan import Plan

if TYPE_CHECKING:
    from torch import Tensor


class Sampler:
    """Chooses the tokens of one choice.

    Random numbers come one per token from the choice's own generator, so a choice that goes on after ``k`` tokens of
    another run draws what that run would have drawn.
    """

    def __init__(
        self, plan: Plan, choice: int, prompt: list[int], like: Tensor, constraint: Constraint | None = None
    ) -> None:
        """``like`` is a row of logits: its length and device are those of all. The caller moves ``constraint`` on."""
        self._plan = plan
        self._constraint = constraint
        self._random = random.Random(None if plan.seed is None else plan.seed + choice)
        self._output_tokens = 0
        counts_output = bool(plan.presence_penalty or plan.frequency_penalty)
        self._counts = like.new_zeros(like.shape[0]) if counts_output else None
        self._seen: Tensor | None = None
        if plan.repetition_penalty != 1.0:
            self._seen = like.new_zeros(like.shape[0]).bool()
            self._seen[prompt] = True
        self._bias: Tensor | None = None
        if plan.logit_bias:
            self._bias = like.new_zeros(like.shape[0])
            self._bias[list(plan.logit_bias)] = like.new_tensor(list(plan.logit_bias.values()))
        self._ends = sorted(token for token in plan.stop_ids if token < like.shape[0])

    def choose(self, logits: Tensor) -> int:
        """The next token; ``logits`` is a float32 row and stays as it is. Call ``count`` with the token then."""
        plan = self._plan
        scores = self._adjusted(logits)
        if self._constraint is not None:
            scores = self._held(scores, logits, self._constraint)
        if plan.temperature == 0.0:
            return int(scores.argmax())
        return self._draw(scores / plan.temperature, self._random.random())

    def count(self, token: int) -> None:
        """The token is part of the output."""
        self._output_tokens += 1
        if self._counts is not None:
            self._counts[token] += 1
        if self._seen is not None:
            self._seen[token] = True

    def replay(self, tokens: list[int]) -> None:
        """These tokens were chosen by an earlier run."""
        for token in tokens:
            self._random.random()
            self.count(token)

    def _adjusted(self, logits: Tensor) -> Tensor:
        plan, scores = self._plan, logits
        if self._bias is not None:
            scores = scores + self._bias
        if self._output_tokens < plan.min_tokens and self._ends:
            scores = scores.clone()
            scores[self._ends] = float("-inf")
        if self._seen is not None:
            penalty = plan.repetition_penalty
            scores = scores.where(~self._seen, (scores / penalty).where(scores > 0, scores * penalty))
        if self._counts is not None:
            scores = scores - plan.frequency_penalty * self._counts - plan.presence_penalty * (self._counts > 0)
        return scores

    def _held(self, scores: Tensor, logits: Tensor, constraint: Constraint) -> Tensor:
        held = constraint.held(scores)
        if bool(held.max().isneginf()):
            # min_tokens forbids the end and the grammar all but the end: the form of an answer is worth more.
            return constraint.held(logits)
        return held

    def _draw(self, scores: Tensor, point: float) -> int:
        # One sort serves top_k, top_p and min_p; the library's processors sort the vocabulary once each.
        plan = self._plan
        order: Tensor | None = None
        if plan.top_k and plan.top_k < scores.shape[0]:
            scores, order = scores.topk(plan.top_k)
        elif plan.top_p < 1.0 or plan.min_p > 0.0:
            scores, order = scores.sort(descending=True)
        # In double precision, or the sum over a large vocabulary is off by more than its rare tokens weigh.
        weights = scores.double().softmax(0)
        if plan.top_p < 1.0:
            weights = weights.where(weights.cumsum(0) - weights < plan.top_p, 0.0)
        if plan.min_p > 0.0:
            weights = weights.where(weights >= plan.min_p * weights.max(), 0.0)
        sums = weights.cumsum(0)
        place = int((sums <= point * sums[-1]).sum())
        place = min(place, int(weights.nonzero()[-1])) if place >= weights.shape[0] else place
        return place if order is None else int(order[place])
