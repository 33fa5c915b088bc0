"""What is embedded, scored or classified, checked before anything is computed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from modelbus_broker.errors import ContextLengthExceeded, InvalidRequest
from modelbus_broker.messages import Classification, Embedding, Score


def texts_of(task: Embedding | Classification, tokenizer: Any) -> list[str]:
    """The inputs as texts; token ids stand for their text.

    Raises:
        InvalidRequest: there is none, or a token id is not in the vocabulary.
    """
    if not task.input:
        raise InvalidRequest("input is empty", param="input")
    return [text if isinstance(text, str) else _decoded(text, tokenizer) for text in task.input]


def pairs_of(task: Score) -> tuple[list[str], list[str]]:
    """The query of each document, and the documents.

    Raises:
        InvalidRequest: there is no document, or the numbers of queries and documents do not fit each other.
    """
    queries, documents = task.queries, task.documents
    if not documents:
        raise InvalidRequest("there are no documents", param="documents")
    if len(queries) not in (1, len(documents)):
        raise InvalidRequest(
            f"there must be one query, or one for each of the {len(documents)} documents, not {len(queries)}",
            param="queries",
        )
    return (queries * len(documents) if len(queries) == 1 else queries), documents


def check_lengths(counts: Sequence[int], limit: int, what: Literal["input", "query", "document", "pair"]) -> None:
    """Whether each input fits the model; nothing is cut off silently.

    Args:
        counts: tokens of each input.
        limit: the model's; 0: it has none.
        what: the inputs are; a pair is a document with its query.

    Raises:
        ContextLengthExceeded: one does not; the message has the numbers.
    """
    noun, param, beside = {
        "input": ("input", "input", ""),
        "query": ("query", "queries", ""),
        "document": ("document", "documents", ""),
        "pair": ("document", "documents", " with its query"),
    }[what]
    for index, count in enumerate(counts):
        if limit and count > limit:
            raise ContextLengthExceeded(
                f"This model's maximum context length is {limit} tokens, but {noun} {index} has {count} tokens{beside}. "
                "Please reduce its length.",
                param=param,
            )


def _decoded(ids: list[int], tokenizer: Any) -> str:
    size = len(tokenizer)
    for token in ids:
        if not 0 <= token < size:
            raise InvalidRequest(f"token id {token} is not in 0 to {size - 1}", param="input")
    text: str = tokenizer.decode(ids, skip_special_tokens=True)
    return text
