"""Reranking, scoring and classifying: bodies, tasks and answers, in the shapes that Jina, Cohere and vLLM share. Pure."""

from __future__ import annotations

from typing import Any

import msgspec
from modelbus.answers import AnswerBuilder, floats
from modelbus_broker.errors import InvalidRequest
from modelbus_broker.messages import Classification, Score
from msgspec import UNSET, UnsetType

from .bodies import Body
from .checks import MAX_INPUTS, Need, integer, texts, timeout
from .openai_answers import EmbeddingUsageBody, to_json
from .translate import Translation


class Document(msgspec.Struct, frozen=True):
    text: str


class RerankRequest(msgspec.Struct, frozen=True, kw_only=True):
    """POST /v1/rerank"""

    model: str
    query: str
    documents: list[str | Document]
    top_n: int | None = None
    return_documents: bool | None = None  #: true if it is not said, as Jina and vLLM do it
    user: str | None = None
    timeout: float | None = None  #: seconds


class ScoreRequest(msgspec.Struct, frozen=True, kw_only=True):
    """POST /v1/score"""

    model: str
    text_1: str | list[str]
    text_2: str | list[str]
    user: str | None = None
    timeout: float | None = None  #: seconds


class ClassificationRequest(msgspec.Struct, frozen=True, kw_only=True):
    """POST /v1/classify"""

    model: str
    input: str | list[str | int | list[int]]
    user: str | None = None
    timeout: float | None = None  #: seconds


RERANK_BODY, SCORE_BODY = Body(RerankRequest), Body(ScoreRequest)
CLASSIFICATION_BODY = Body(ClassificationRequest)


class RerankResult(msgspec.Struct, frozen=True, kw_only=True):
    index: int
    relevance_score: float
    document: Document | UnsetType = UNSET


class RerankAnswer(msgspec.Struct, frozen=True, kw_only=True):
    id: str
    model: str
    usage: EmbeddingUsageBody
    results: list[RerankResult]


class ScoreItem(msgspec.Struct, frozen=True, kw_only=True):
    index: int
    object: str = "score"
    score: float


class ClassificationItem(msgspec.Struct, frozen=True, kw_only=True):
    index: int
    label: str
    probs: list[float]
    num_classes: int


class ListAnswer(msgspec.Struct, frozen=True, kw_only=True):
    """Scores or classifications."""

    id: str
    object: str = "list"
    created: int
    model: str
    data: list[Any]
    usage: EmbeddingUsageBody


def translate_rerank(request: RerankRequest) -> Translation:
    """Raises InvalidRequest, with ``param``."""
    _not_empty("query", request.query)
    if request.top_n is not None:
        integer("top_n", request.top_n, 1)
    return _score([request.query], documents_of(request), "documents", request.timeout)


def documents_of(request: RerankRequest) -> list[str]:
    return [document if isinstance(document, str) else document.text for document in request.documents]


def translate_score(request: ScoreRequest) -> Translation:
    """Raises InvalidRequest, with ``param``."""
    first = [request.text_1] if isinstance(request.text_1, str) else request.text_1
    second = [request.text_2] if isinstance(request.text_2, str) else request.text_2
    if not first:
        raise InvalidRequest("Invalid 'text_1': empty array. Expected at least one element.", param="text_1")
    if len(first) not in (1, len(second)):
        raise InvalidRequest(
            f"Invalid 'text_1': expected one text, or as many as in 'text_2' ({len(second)}), but got {len(first)}.",
            param="text_1",
        )
    return _score(first, second, "text_2", request.timeout)


def _score(queries: list[str], documents: list[str], param: str, timeout_s: float | None) -> Translation:
    if not documents:
        raise InvalidRequest(f"Invalid '{param}': empty array. Expected at least one element.", param=param)
    if len(documents) > MAX_INPUTS:
        raise InvalidRequest(
            f"Invalid '{param}': array too long. Expected an array with maximum length {MAX_INPUTS}, "
            f"but got an array with length {len(documents)} instead.",
            param=param,
        )
    return Translation(
        task=Score(queries=queries, documents=documents),
        needs=[Need("model", "task:score")],
        timeout_s=timeout(timeout_s),
    )


def translate_classification(request: ClassificationRequest) -> Translation:
    """Raises InvalidRequest, with ``param``."""
    needs = [Need("model", "task:classification")]
    return Translation(
        task=Classification(input=texts(request.input, "input", needs)),
        needs=needs,
        timeout_s=timeout(request.timeout),
    )


def _not_empty(param: str, text: str) -> None:
    if not text:
        raise InvalidRequest(f"Invalid '{param}': empty string.", param=param)


def rerank_answer(answer: AnswerBuilder, request: RerankRequest, *, id: str) -> bytes:
    """The body of /v1/rerank: the best documents first."""
    documents, shown = documents_of(request), request.return_documents is not False
    scores = [floats(vector)[0] for vector in answer.vectors]
    order = sorted(range(len(scores)), key=lambda index: -scores[index])[: request.top_n]
    results = [
        RerankResult(
            index=index, relevance_score=scores[index], document=Document(documents[index]) if shown else UNSET
        )
        for index in order
    ]
    return to_json(RerankAnswer(id=f"rerank-{id}", model=request.model, usage=_usage(answer), results=results))


def score_answer(answer: AnswerBuilder, *, id: str, created: int, model: str) -> bytes:
    """The body of /v1/score: in the order of the texts."""
    items = [ScoreItem(index=index, score=floats(vector)[0]) for index, vector in enumerate(answer.vectors)]
    return to_json(ListAnswer(id=f"score-{id}", created=created, model=model, data=items, usage=_usage(answer)))


def classification_answer(answer: AnswerBuilder, *, id: str, created: int, model: str) -> bytes:
    """The body of /v1/classify: in the order of the texts."""
    items = []
    for index, vector in enumerate(answer.vectors):
        probabilities = floats(vector)
        label = answer.labels[probabilities.index(max(probabilities))]
        items.append(ClassificationItem(index=index, label=label, probs=probabilities, num_classes=len(probabilities)))
    return to_json(ListAnswer(id=f"classify-{id}", created=created, model=model, data=items, usage=_usage(answer)))


def _usage(answer: AnswerBuilder) -> EmbeddingUsageBody:
    prompt_tokens = answer.usage.prompt_tokens
    return EmbeddingUsageBody(prompt_tokens, prompt_tokens)
