"""Decisions: a model chooses among labels, and says how likely each is. Nothing is generated, so nothing is parsed.

``await client.decide("chat", "Refund me!", "Is the customer angry?")`` gives a ``Decision[bool]``; the type may be ``bool``, a
``Literal`` or an ``Enum``.
"""

from .decision import Decision, Label, Labels, decision_of, labels_of
from .probabilities import Judged, judge

__all__ = ["Decision", "Judged", "Label", "Labels", "decision_of", "judge", "labels_of"]
