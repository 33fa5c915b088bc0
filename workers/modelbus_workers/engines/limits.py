"""What engines refuse before they spend a token."""

from __future__ import annotations

from math import isfinite

from modelbus_broker.errors import ContextLengthExceeded, InvalidRequest
from modelbus_broker.messages import Sampling

#: Choices of one request, as OpenAI has it.
MAX_CHOICES = 128


def check_sampling(sampling: Sampling) -> None:
    """What no engine can do, whatever its model.

    Raises:
        InvalidRequest: a field has a value that it cannot have; ``param`` names it.
    """
    # In the way of every request: plain comparisons, and most fields are None.
    most, least = sampling.max_tokens, sampling.min_tokens
    if not 1 <= sampling.n <= MAX_CHOICES:
        raise _wrong("n", f"must be in 1 to {MAX_CHOICES}")
    if most is not None and most < 0:
        raise _wrong("max_tokens", "must not be negative")
    if sampling.logprobs is not None and sampling.logprobs < 0:
        raise _wrong("logprobs", "must not be negative")
    if least is not None and not 0 <= least <= (least if most is None else most):
        raise _wrong("min_tokens", "must be in 0 to max_tokens")
    if sampling.logit_bias and not all(map(isfinite, sampling.logit_bias.values())):
        raise _wrong("logit_bias", "must have finite numbers")
    for name, value in (
        ("temperature", sampling.temperature),
        ("top_p", sampling.top_p),
        ("min_p", sampling.min_p),
        ("presence_penalty", sampling.presence_penalty),
        ("frequency_penalty", sampling.frequency_penalty),
        ("repetition_penalty", sampling.repetition_penalty),
    ):
        if value is not None and not isfinite(value):
            raise _wrong(name, "must be a finite number")


def _wrong(name: str, words: str) -> InvalidRequest:
    return InvalidRequest(f"{name} {words}", param=name)


def check_fits(prompt_tokens: int, max_tokens: int | None, limit: int) -> int:
    """How many tokens the answer may have.

    Raises:
        ContextLengthExceeded: prompt and output do not fit; the message has the numbers.
    """
    asked = max_tokens or 0
    if prompt_tokens + asked > limit or (max_tokens is None and prompt_tokens >= limit):
        raise ContextLengthExceeded(
            f"This model's maximum context length is {limit} tokens. However, you requested {prompt_tokens + asked} "
            f"tokens ({prompt_tokens} in the prompt, {asked} in the completion). "
            "Please reduce the length of the prompt or completion.",
            param="max_tokens" if prompt_tokens < limit else "messages",
        )
    return limit - prompt_tokens if max_tokens is None else max_tokens
