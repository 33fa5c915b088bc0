"""Models for the tests of those who build on modelbus: no weights, no provider, the same answer every time."""

from __future__ import annotations

from .echo import EchoAnswer, count_tokens, echo_answer, echo_logprob, echo_vector, pieces, token_id

__all__ = ["EchoAnswer", "count_tokens", "echo_answer", "echo_logprob", "echo_vector", "pieces", "token_id"]
