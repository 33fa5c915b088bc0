"""What every engine with a context of its own refuses before it spends a token."""

from __future__ import annotations

from modelbus_broker.errors import ContextLengthExceeded


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
