"""Log probabilities of labels become probabilities among them. Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence

import msgspec
from modelbus_broker.errors import EngineFailed, InvalidRequest

from ..answers import ChoiceAnswer


class Judged(msgspec.Struct, frozen=True, kw_only=True):
    """How likely each label is."""

    probabilities: list[float]  #: in the order of the labels; they sum to 1
    mass: float  #: how likely the model was to begin with any of them, 0 to 1


def judge(answers: Sequence[ChoiceAnswer], count: int) -> Judged:
    """The probabilities of ``count`` labels, from what an engine answers to a ``Decision``: one choice for each label.

    Raises:
        InvalidRequest: two labels are the same to the model's tokenizer.
        EngineFailed: log probabilities are missing.
    """
    by_index = {answer.index: answer.logprobs for answer in answers}
    tokens: list[tuple[int, ...]] = []
    logprobs: list[float] = []
    for index in range(count):
        scores = by_index.get(index)
        if not scores:
            raise EngineFailed(f"the engine gave no log probabilities of label {index + 1}")
        tokens.append(tuple(score.token_id for score in scores))
        logprobs.append(sum(score.logprob for score in scores))
    return _among(tokens, logprobs)


def _among(tokens: Sequence[tuple[int, ...]], logprobs: Sequence[float]) -> Judged:
    """Probabilities from the tokens of each label and their summed log probability, given the prompt.

    A label's event is that the answer begins with its tokens, and not with those of a longer label: so "yes" and "yes, but"
    exclude each other. The chance of the longer one is part of that of the shorter one, and is taken from it.
    """
    if len(set(tokens)) != len(tokens):
        twin = next(index for index, own in enumerate(tokens) if own in tokens[:index])
        raise InvalidRequest(f"label {twin + 1} is the same as an earlier one to the model's tokenizer")
    likely = [math.exp(logprob) for logprob in logprobs]
    events = []
    for index, own in enumerate(tokens):
        longer = [other for other in tokens if len(other) > len(own) and other[: len(own)] == own]
        # Of those that begin with each other only the shortest: the others are part of it.
        nearest = [
            other for other in longer if not any(len(one) < len(other) and other[: len(one)] == one for one in longer)
        ]
        rest = likely[index] - sum(likely[tokens.index(other)] for other in nearest)
        events.append(max(rest, 0.0))
    mass = sum(events)
    if mass <= 0.0:
        # Beyond what a float can say: the log probabilities still say which is the likeliest.
        top = max(logprobs)
        events = [math.exp(logprob - top) for logprob in logprobs]
    total = sum(events)
    return Judged(probabilities=[event / total for event in events], mass=min(mass, 1.0))
