"""What a decision is: a value of a type with few values, with the probability of each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from enum import Enum
from typing import Any, Generic, Literal, TypeVar, get_args, get_origin

import msgspec
from modelbus_broker.errors import InvalidRequest
from modelbus_broker.messages import ChatMessage, TextPart, Usage

from .probabilities import Judged

T = TypeVar("T")

#: Fewer are no choice; the decisions API of OpenAI takes as many at most.
LEAST_LABELS, MOST_LABELS = 2, 255


class Label(msgspec.Struct, frozen=True, kw_only=True):
    """One of the values that can be decided for."""

    value: Any
    text: str  #: how the model would say it
    description: str = ""  #: what it means, for the model


Labels = Sequence[Label]


class Decision(msgspec.Struct, Generic[T], frozen=True, kw_only=True):
    """A value that a model has decided for, and how likely each of the values is."""

    value: T  #: the likeliest
    confidence: float  #: its probability
    probabilities: dict[T, float]  #: of every value; they sum to 1
    mass: float  #: how likely the model was to answer with any of the values: near 0 it did not answer this question
    id: str = ""  #: of the request
    model: str = ""
    usage: Usage = Usage()


def labels_of(annotation: Any, descriptions: Mapping[Any, str] | None = None) -> list[Label]:
    """The values of a type: ``bool`` (said as yes and no), a ``Literal`` or an ``Enum`` (said as its values).

    Raises:
        InvalidRequest: the type has no values that can be listed, fewer than 2, more than 255, or two that are said alike.
    """
    said = descriptions or {}
    if annotation is bool:
        labels = [Label(value=True, text="yes"), Label(value=False, text="no")]
    elif get_origin(annotation) is Literal:
        labels = [Label(value=value, text=_text(value)) for value in get_args(annotation)]
    elif isinstance(annotation, type) and issubclass(annotation, Enum):
        labels = [Label(value=member, text=_text(member.value)) for member in annotation]
    else:
        raise InvalidRequest(f"a decision is for bool, a Literal or an Enum, not for {annotation!r}", param="type")
    return check_labels(
        [msgspec.structs.replace(label, description=said.get(label.value, "")) for label in labels], param="type"
    )


def check_labels(labels: list[Label], *, param: str) -> list[Label]:
    """The labels, if there can be a decision among them; raises InvalidRequest."""
    if not LEAST_LABELS <= len(labels) <= MOST_LABELS:
        raise InvalidRequest(
            f"between {LEAST_LABELS} and {MOST_LABELS} values are needed, not {len(labels)}", param=param
        )
    for index, label in enumerate(labels):
        if not label.text.strip():
            raise InvalidRequest("a value is empty", param=param)
        if any(label.text == other.text for other in labels[:index]):
            raise InvalidRequest(f"two values are both said as {label.text!r}", param=param)
    return labels


def _text(value: object) -> str:
    return ("yes" if value else "no") if isinstance(value, bool) else str(value)


def decision_of(
    labels: Labels, judged: Judged, *, id: str = "", model: str = "", usage: Usage | None = None
) -> Decision[Any]:
    """The decision that the probabilities say. Of two that are equally likely the first is taken."""
    best = max(range(len(labels)), key=lambda index: judged.probabilities[index])
    return Decision(
        value=labels[best].value,
        confidence=judged.probabilities[best],
        probabilities={label.value: p for label, p in zip(labels, judged.probabilities, strict=True)},
        mass=judged.mass,
        id=id,
        model=model,
        usage=usage or Usage(),
    )


def asked(messages: Sequence[ChatMessage], question: str, labels: Labels) -> list[ChatMessage]:
    """A conversation that ends with the question and its values. It joins the last turn if that is the user's: many chat
    templates want turns that alternate."""
    lines = [f"- {label.text}: {label.description}" if label.description else f"- {label.text}" for label in labels]
    text = "\n".join([question, "", "Answer with exactly one of these and nothing else:", *lines]).strip()
    if messages and messages[-1].role == "user":
        last = messages[-1]
        if isinstance(last.content, list):
            joined = msgspec.structs.replace(last, content=[*last.content, TextPart(text=f"\n\n{text}")])
        else:
            joined = msgspec.structs.replace(last, content=f"{last.content or ''}\n\n{text}".strip())
        return [*messages[:-1], joined]
    return [*messages, ChatMessage(role="user", content=text)]
