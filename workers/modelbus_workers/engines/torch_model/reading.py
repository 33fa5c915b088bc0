"""Who tells a model's reasoning from its answer, for models that write both into one text."""

from __future__ import annotations

from typing import Protocol

from .call_parser import Piece


class Reader(Protocol):
    """Reads one choice, token by token. What it has given out depends on the tokens alone, so a replay gives the same."""

    @property
    def reasons(self) -> bool:
        """Whether the next token is reasoning, as far as is known before it comes."""
        ...

    def add(self, token: int, text: str) -> Piece:
        """What the text that this token completes says."""
        ...

    def finish(self, text: str) -> Piece:
        """What the last of the text says, and all that was held back."""
        ...
