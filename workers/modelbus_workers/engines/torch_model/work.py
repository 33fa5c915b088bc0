"""What the loop is asked to do for one request."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from typing import Any

import msgspec

from .adapters import AdapterWeights
from .answer_form import AnswerForm
from .grammar import Grammar
from .plan import Plan
from .reading import Reader


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
    call_tokens: Mapping[int, str] = {}  #: special tokens that are text, since calls or reasoning are told by them
    #: makes who tells reasoning from the answer, of the number of the prompt and that of the choice; None: all is answer
    reader: Callable[[int, int], Reader] | None = None
    request_id: str = ""
    adapter: AdapterWeights | None = None
    features: Mapping[str, Any] = {}  #: what the model reads beside the one prompt's tokens: its images
    labels: list[list[int]] = []  #: nothing is generated: these are scored as answers to the only prompt

    def before(self, choice: int) -> list[int]:
        """What an earlier run has made of this choice."""
        return self.output_token_ids[choice] if choice < len(self.output_token_ids) else []

    def emitted(self, choice: int) -> int:
        """How many characters of this choice the client has."""
        return self.emitted_chars[choice] if choice < len(self.emitted_chars) else 0

    def call_id(self, choice: int, call: int) -> str:
        """The same in every run of the request, so that a run that goes on calls nothing by another name."""
        short = self.form.calls is not None and self.form.calls.short_ids
        return call_id(self.request_id, choice, call, short=short)


def call_id(request_id: str, choice: int, call: int, *, short: bool = False) -> str:
    """The id of a call; ``short``: the nine letters that some templates want."""
    digest = hashlib.sha256(f"{request_id} {choice} {call}".encode()).hexdigest()
    return digest[:9] if short else f"call_{digest[:24]}"
