"""POST /v1/decisions: its bodies, the task of each question and its answer, in the shapes of the OpenAI API. Pure."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import msgspec
from modelbus.answers import AnswerBuilder
from modelbus.decisions import Label, judge
from modelbus.decisions.decision import LEAST_LABELS, MOST_LABELS, asked
from modelbus_broker.errors import InvalidRequest, UnsupportedField
from modelbus_broker.messages import (
    ChatMessage,
    Decision,
    ImagePart,
    ImageURL,
    Part,
    Role,
    TextPart,
    Usage,
    WorkerRecord,
)

from .bodies import Body
from .checks import integer, timeout
from .openai_answers import to_json
from .translate import Translation

MAX_QUESTIONS = 400
#: A model that was less likely than this to begin its answer with any of the values has declined to answer.
REFUSAL_MASS = 1e-4


class Piece(msgspec.Struct, frozen=True, kw_only=True):
    """A part of a message, of a question's instructions, or of a tool's output."""

    type: str
    text: str | None = None
    refusal: str | None = None
    image_url: str | None = None
    detail: str | None = None
    data: Any = None


class Item(msgspec.Struct, frozen=True, kw_only=True):
    """An item of the input: a message, a call of a tool, or what it gave."""

    type: str = "message"
    role: str = ""
    content: str | list[Piece] = ""
    name: str = ""
    arguments: str = ""
    input: str = ""
    output: str | list[Piece] = ""


class ChoiceOption(msgspec.Struct, frozen=True, kw_only=True):
    value: str | bool
    description: str = ""


class Level(msgspec.Struct, frozen=True, kw_only=True):
    label: str
    description: str = ""


class Question(msgspec.Struct, frozen=True, kw_only=True):
    """A question of any kind; ``labels_of_question`` checks what belongs to which."""

    type: str
    instructions: str | list[Piece]
    name: str | None = None
    choices: list[ChoiceOption] = []
    levels: list[Level] = []


class DecisionsRequest(msgspec.Struct, frozen=True, kw_only=True):
    """POST /v1/decisions"""

    model: str
    input: str | list[Item]
    questions: list[Question]
    prompt_cache_key: str | None = None
    prompt_cache_options: dict[str, Any] | None = None
    safety_identifier: str | None = None
    user: str | None = None
    timeout: float | None = None  #: seconds


DECISIONS_BODY = Body(DecisionsRequest)


class Asked(msgspec.Struct, frozen=True, kw_only=True):
    """One question on its way."""

    question: Question
    labels: list[Label]
    translation: Translation


def translate_decisions(request: DecisionsRequest) -> list[Asked]:
    """The task of each question, in their order.

    Raises:
        InvalidRequest: something is wrong; ``param`` says where.
        UnsupportedField: an item or a part that cannot be shown to a model here.
    """
    integer("questions", len(request.questions), 1, MAX_QUESTIONS)
    if not request.input:
        raise InvalidRequest("Invalid 'input': it is empty.", param="input")
    messages = _messages(request.input)
    budget_s = timeout(request.timeout)
    found = []
    for index, question in enumerate(request.questions):
        param = f"questions[{index}]"
        labels = _labels(question, param)
        told = _text(question.instructions, f"{param}.instructions")
        if not told.strip():
            raise InvalidRequest(f"Invalid '{param}.instructions': it is empty.", param=f"{param}.instructions")
        task = Decision(messages=asked(messages, told, labels), labels=[label.text for label in labels])
        translation = Translation(task=task, timeout_s=budget_s)
        found.append(Asked(question=question, labels=labels, translation=translation))
    return found


def check_decides(model: str, workers: Sequence[WorkerRecord]) -> None:
    """Raises UnsupportedField if no live worker of the model scores labels. Without workers nothing is known."""
    if workers and not any("decision" in worker.capabilities.tasks for worker in workers):
        engines = ", ".join(sorted({worker.engine for worker in workers}))
        raise UnsupportedField(
            f"The model '{model}' (engine: {engines}) gives no log probabilities of labels, which decisions are made of.",
            param="model",
        )


def decision_answer(asked: list[Asked], answers: list[AnswerBuilder], *, model: str) -> bytes:
    """The body of the answer: one answer for each question, and the usage of all.

    Raises:
        InvalidRequest: two values of a question are the same to the model's tokenizer.
        EngineFailed: the engine gave no log probabilities.
    """
    shown = [_answer(one, answer) for one, answer in zip(asked, answers, strict=True)]
    return to_json({"model": model, "answers": shown, "usage": _usage([answer.usage for answer in answers])})


def _labels(question: Question, param: str) -> list[Label]:
    match question.type:
        case "predicate":
            return [Label(value=True, text="yes"), Label(value=False, text="no")]
        case "choice":
            place = f"{param}.choices"
            labels = [
                Label(value=option.value, text=_said(option.value), description=option.description)
                for option in question.choices
            ]
        case "score":
            place = f"{param}.levels"
            labels = [
                Label(value=number, text=level.label, description=level.description)
                for number, level in enumerate(question.levels)
            ]
        case _:
            raise InvalidRequest(
                f"Invalid value: '{question.type}'. Supported values are: 'predicate', 'choice', and 'score'.",
                param=f"{param}.type",
            )
    integer(place, len(labels), LEAST_LABELS, MOST_LABELS)
    for index, label in enumerate(labels):
        if not label.text.strip():
            raise InvalidRequest(f"Invalid '{place}[{index}]': it is empty.", param=f"{place}[{index}]")
        if any(label.text == other.text for other in labels[:index]):
            raise InvalidRequest(
                f"Invalid '{place}[{index}]': {label.text!r} is there already.", param=f"{place}[{index}]"
            )
    return labels


def _said(value: str | bool) -> str:
    """How the model says a value. (A choice between true and "true" is one that no text can tell apart.)"""
    return ("true" if value else "false") if isinstance(value, bool) else value


def _answer(one: Asked, answer: AnswerBuilder) -> dict[str, Any]:
    question, labels = one.question, one.labels
    judged = judge(answer.choices, len(labels))
    name = question.name
    if judged.mass < REFUSAL_MASS:
        return {"type": "refusal", "name": name}
    probabilities = judged.probabilities
    if question.type == "predicate":
        return {"type": "predicate", "name": name, "probability": probabilities[0]}
    best = max(range(len(labels)), key=lambda index: probabilities[index])
    if question.type == "choice":
        return {
            "type": "choice",
            "name": name,
            "choice": labels[best].value,
            "confidence": probabilities[best],
            "probabilities": [
                {"value": label.value, "probability": p} for label, p in zip(labels, probabilities, strict=True)
            ],
        }
    return {
        "type": "score",
        "name": name,
        "score": sum(label.value * p for label, p in zip(labels, probabilities, strict=True)),
        "confidence": probabilities[best],
        "probabilities": [
            {"label": label.text, "value": label.value, "probability": p}
            for label, p in zip(labels, probabilities, strict=True)
        ],
    }


def _usage(each: list[Usage]) -> dict[str, Any]:
    inputs = sum(usage.prompt_tokens for usage in each)
    return {
        "input_tokens": inputs,
        "input_tokens_details": {
            "cached_tokens": sum(usage.cached_tokens for usage in each),
            "cache_write_tokens": 0,
        },
        "output_tokens": 0,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": inputs,
    }


def _messages(given: str | list[Item]) -> list[ChatMessage]:
    if isinstance(given, str):
        return [ChatMessage(role="user", content=given)]
    return [_message(item, f"input[{index}]") for index, item in enumerate(given)]


def _message(item: Item, param: str) -> ChatMessage:
    match item.type:
        case "message":
            roles: dict[str, Role] = {
                "user": "user", "assistant": "assistant", "system": "system", "developer": "developer",
            }  # fmt: skip
            if item.role not in roles:
                raise InvalidRequest(
                    f"Invalid value: '{item.role}'. Supported values are: 'user', 'assistant', 'system', and 'developer'.",
                    param=f"{param}.role",
                )
            if isinstance(item.content, str):
                return ChatMessage(role=roles[item.role], content=item.content)
            parts = [_part(piece, f"{param}.content[{index}]") for index, piece in enumerate(item.content)]
            if all(isinstance(part, TextPart) for part in parts):
                return ChatMessage(role=roles[item.role], content=_text(item.content, f"{param}.content"))
            return ChatMessage(role=roles[item.role], content=parts)
        # What tools did is evidence here, for models too that know no tools.
        case "function_call" | "custom_tool_call":
            return ChatMessage(role="assistant", content=f"[calls {item.name} with {item.arguments or item.input}]")
        case "function_call_output" | "custom_tool_call_output":
            return ChatMessage(role="user", content=f"[the tool gave] {_text(item.output, f'{param}.output')}")
    raise UnsupportedField(f"Invalid value: '{item.type}' is not supported here.", param=f"{param}.type")


def _part(piece: Piece, param: str) -> Part:
    if piece.type == "input_image":
        if not piece.image_url:
            raise UnsupportedField("Only images with an 'image_url' are supported here.", param=param)
        return ImagePart(image_url=ImageURL(url=piece.image_url, detail=piece.detail or "auto"))
    return TextPart(text=_text([piece], param))


def _text(given: str | list[Piece], param: str) -> str:
    if isinstance(given, str):
        return given
    texts = []
    for piece in given:
        match piece.type:
            case "input_text" | "output_text" | "text":
                texts.append(piece.text or "")
            case "refusal":
                texts.append(piece.refusal or "")
            case "input_json":
                texts.append(json.dumps(piece.data, ensure_ascii=False))
            case _:
                raise UnsupportedField(f"A part of type '{piece.type}' is not supported here.", param=param)
    return "\n".join(texts)
