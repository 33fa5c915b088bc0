"""Going on from an earlier run's tokens: what vLLM would forget, since for it they are part of the prompt.

vLLM counts and compares the output of one request of its own alone. An answer that goes on is therefore made in
stretches: in each, what the tokens so far mean for the next ones is said by biases of the logits, and a stretch ends
where that would become wrong.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import msgspec

from ..torch_model.plan import Plan

#: No likelihood makes up for this; vLLM takes no larger bias.
_NEVER = -100.0


class Stretch(msgspec.Struct, frozen=True, kw_only=True):
    """What one request to vLLM needs beyond its prompt, and how far it holds."""

    biases: dict[int, float] = {}  #: added to the logits of these tokens
    until: frozenset[int] = frozenset()  #: the stretch ends with the first of these tokens
    one_token: bool = False  #: it ends with its first


def next_stretch(plan: Plan, so_far: Sequence[int], bad_words: Sequence[Sequence[int]]) -> Stretch:
    """The stretch that follows the tokens ``so_far``.

    - ``frequency_penalty`` falls on each token once for each time it was made: vLLM counts on from zero, the bias has
      the rest.
    - ``presence_penalty`` falls once: where vLLM would take it a second time, the stretch ends.
    - A bad word that is half written must not be ended: it is looked at token by token until it is over.
    """
    if not so_far:
        return Stretch()
    counts = Counter(so_far)
    biases: dict[int, float] = {}
    if plan.presence_penalty or plan.frequency_penalty:
        biases = {token: -(plan.frequency_penalty * count + plan.presence_penalty) for token, count in counts.items()}
    ended = [word for word in bad_words if len(word) > 1 and _ends_with(so_far, word[:-1])]
    half = any(_ends_with(so_far, word[:length]) for word in bad_words for length in range(1, len(word)))
    return Stretch(
        biases=biases | {word[-1]: _NEVER for word in ended},
        until=frozenset(counts) if plan.presence_penalty else frozenset(),
        one_token=half,
    )


def _ends_with(tokens: Sequence[int], end: Sequence[int]) -> bool:
    return len(end) <= len(tokens) and list(tokens[len(tokens) - len(end) :]) == list(end)
