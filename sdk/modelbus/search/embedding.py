"""Vectors of chunks and queries, by an embedding model on the bus; texts that are longer than it takes in parts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import msgspec
from modelbus_broker.asking import CallOptions
from modelbus_broker.errors import ContextLengthExceeded
from modelbus_broker.messages.search import Chunk, StoreRecord

from ..gathering import gathered
from ..model_client import ModelClient
from .items import packed, whole_text

#: Texts of one request to an embedding model, and such requests at once.
EMBED_TEXTS, EMBED_AT_ONCE = 32, 4
#: From so many texts on nobody waits for each: they go through the lane for batches.
MANY_TEXTS = 64


async def embedded(
    client: ModelClient, record: StoreRecord, chunks: list[Chunk], lane: Literal["hi", "lo"] | None
) -> list[Chunk]:
    """The chunks, those with a text and no vector with the vector of their title and text."""
    at = [n for n, chunk in enumerate(chunks) if not chunk.vector and (chunk.text.strip() or chunk.title.strip())]
    if not at:
        return chunks
    texts = [whole_text(chunks[n]) for n in at]
    vectors = await embed(client, record.embedding_model, texts, lane, prefix=record.passage_prefix)
    result = list(chunks)
    for n, vector in zip(at, vectors, strict=True):
        result[n] = msgspec.structs.replace(chunks[n], vector=vector)
    return result


async def embed(
    client: ModelClient, model: str, texts: Sequence[str], lane: Literal["hi", "lo"] | None = None, *, prefix: str = ""
) -> list[bytes]:
    """The vectors of texts, as float32; many are asked in several requests at once."""
    options = CallOptions(lane=lane or ("lo" if len(texts) >= MANY_TEXTS else "hi"), wait=True)
    parts = [texts[start : start + EMBED_TEXTS] for start in range(0, len(texts), EMBED_TEXTS)]
    answers = await gathered([_vectors(client, model, part, prefix, options) for part in parts], EMBED_AT_ONCE)
    return [packed(vector) for vectors in answers for vector in vectors]


async def _vectors(
    client: ModelClient, model: str, texts: Sequence[str], prefix: str, options: CallOptions
) -> list[list[float]]:
    """The vectors of texts. Of one that is longer than the model takes: the mean of those of its halves, by their lengths.

    Averaging the parts of a long text is what OpenAI's cookbook does ("Embedding texts that are longer than the model's
    maximum context length").
    """
    try:
        return (await client.embed(model, [prefix + text for text in texts], options=options)).vectors
    except ContextLengthExceeded:
        if len(texts) > 1:
            half = len(texts) // 2
            first = await _vectors(client, model, texts[:half], prefix, options)
            return first + await _vectors(client, model, texts[half:], prefix, options)
        (text,) = texts
        if len(text) < 2:
            raise
        left, right = _halves(text)
        a, b = await _vectors(client, model, [left, right], prefix, options)
        mean = [x * len(left) + y * len(right) for x, y in zip(a, b, strict=True)]
        length = math.sqrt(sum(x * x for x in mean)) or 1.0
        return [[x / length for x in mean]]


def _halves(text: str) -> tuple[str, str]:
    """Cut at the white space that is nearest to the middle, if there is one not far from it."""
    middle, far = len(text) // 2, len(text) // 4
    for away in range(far):
        for at in (middle + away, middle - away):
            if text[at].isspace() and text[:at].strip() and text[at:].strip():
                return text[:at], text[at:]
    return text[:middle], text[middle:]
