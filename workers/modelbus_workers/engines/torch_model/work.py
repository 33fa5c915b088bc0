"""What the loop is asked to do for one request."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import msgspec

from .answer_form import AnswerForm
from .grammar import Grammar
from .plan import Plan


class Work(msgspec.Struct, frozen=True, kw_only=True):
    """One request, ready for the model."""

    prompts: list[list[int]]
    max_tokens: list[int]  #: per prompt
    plan: Plan
    n: int = 1
    echo: list[str] = []  #: the texts of the prompts, if they shall be part of the answer
    output_token_ids: list[list[int]] = []  #: per choice, of an earlier run
    emitted_chars: list[int] = []
    form: AnswerForm = AnswerForm()
    grammar: Grammar | None = None  #: of the form
    call_tokens: Mapping[int, str] = {}  #: special tokens that calls are told from by
    request_id: str = ""

    def before(self, choice: int) -> list[int]:
        """What an earlier run has made of this choice."""
        return self.output_token_ids[choice] if choice < len(self.output_token_ids) else []

    def emitted(self, choice: int) -> int:
        """How many characters of this choice the client has."""
        return self.emitted_chars[choice] if choice < len(self.emitted_chars) else 0

    def call_id(self, choice: int, call: int) -> str:
        """The same in every run of the request, so that a run that goes on calls nothing by another name."""
        digest = hashlib.sha256(f"{self.request_id} {choice} {call}".encode()).hexdigest()
        return digest[:9] if self.form.calls is not None and self.form.calls.short_ids else f"call_{digest[:24]}"
