"""The OpenAI protocol as pure functions: answers that are lists, of embeddings and of models."""

from __future__ import annotations

import struct
from base64 import b64decode
from collections.abc import Callable

import msgspec
from modelbus_broker.errors import UpstreamFailed

from .openai_wire import UpstreamUsage


class _Vector(msgspec.Struct):
    embedding: list[float] | str
    index: int | None = None


class _Vectors(msgspec.Struct):
    data: list[_Vector]
    usage: UpstreamUsage | None = None
    model: str | None = None


_decode_vectors = msgspec.json.Decoder(_Vectors, strict=False).decode


class EmbeddingAnswer(msgspec.Struct, frozen=True, kw_only=True):
    vectors: list[bytes]  #: float32, little endian, in the order of the inputs
    prompt_tokens: int  #: 0: not told
    model: str


def decode_embeddings(document: bytes, count: int, hide: Callable[[str], str]) -> EmbeddingAnswer:
    """The vectors of ``count`` inputs.

    Raises:
        UpstreamFailed: it is something else, or not one vector of one size for each input.
    """
    try:
        answer = _decode_vectors(document)
        found = sorted(enumerate(answer.data), key=lambda item: item[0] if item[1].index is None else item[1].index)
        vectors = [_float32(vector.embedding) for _, vector in found]
    except (msgspec.DecodeError, ValueError, OverflowError, struct.error) as error:
        shown = hide(document[:300].decode("utf-8", "replace"))[:200]
        raise UpstreamFailed(f"the provider sent no embeddings ({hide(str(error))}): {shown}", upstream=shown) from None
    if len(vectors) != count or len({len(vector) for vector in vectors}) > 1 or not all(vectors):
        raise UpstreamFailed(f"the provider sent {len(vectors)} vectors for {count} inputs, or of unequal size")
    usage = answer.usage or UpstreamUsage()
    tokens = usage.prompt_tokens or usage.total_tokens or 0
    return EmbeddingAnswer(vectors=vectors, prompt_tokens=tokens, model=answer.model or "")


def _float32(embedding: list[float] | str) -> bytes:
    if isinstance(embedding, str):
        data = b64decode(embedding, validate=True)
        if len(data) % 4:
            raise ValueError("a base64 vector is not made of float32")
        return data
    return struct.pack(f"<{len(embedding)}f", *embedding)


class _Model(msgspec.Struct):
    id: str
    max_model_len: int | None = None
    context_length: int | None = None


class _Models(msgspec.Struct):
    data: list[_Model] | None = None


_decode_models = msgspec.json.Decoder(_Models, strict=False).decode


def decode_models(document: bytes) -> dict[str, int]:
    """Context lengths (0: not told) by model name; empty if the document is no such list."""
    try:
        models = _decode_models(document).data or []
    except (msgspec.DecodeError, UnicodeDecodeError):
        return {}
    return {model.id.removeprefix("models/"): model.max_model_len or model.context_length or 0 for model in models}
