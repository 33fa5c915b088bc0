"""Decisions as the answers of prompt functions: ``def angry(letter: str) -> Decision[bool]``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, get_args

from modelbus_broker.errors import InvalidRequest
from modelbus_broker.messages import Usage

from ..answers import ChoiceAnswer
from ..structure.annotations import understand
from ..structure.output_types import OutputType
from .decision import Decision, decision_of, labels_of
from .probabilities import judge


class DecisionType(OutputType[Decision[Any]]):
    """The type of a decision: it is not parsed out of a text, but made of the log probabilities of its values."""

    def __init__(self, annotation: Any) -> None:
        arguments = get_args(annotation)
        if not arguments:
            raise InvalidRequest("say what is decided: Decision[bool], Decision[Literal['a', 'b']]")
        super().__init__(annotation, understand(arguments[0]), "choice")
        self.labels = labels_of(arguments[0])

    def decided(self, answers: Sequence[ChoiceAnswer], *, id: str, model: str, usage: Usage) -> Decision[Any]:
        """The decision that an engine's answer says. Raises as ``judge``."""
        return decision_of(self.labels, judge(answers, len(self.labels)), id=id, model=model, usage=usage)
