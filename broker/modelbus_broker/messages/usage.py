"""What an answer has cost, in tokens: said by frames and by the ledger."""

from __future__ import annotations

from .base import Row


class Usage(Row, frozen=True, kw_only=True):
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0  #: of the prompt
    reasoning_tokens: int = 0  #: of the completion
    estimated: bool = False  #: counted by us because the provider gave none
