"""The echo model as pure functions: what it answers, token by token, and what its embeddings, scores and classes are.

Its answer is the text that it was given, cut into pieces of one word each (one character where a script has no
blanks between words). A piece is a token. Nothing is random: the same request has the same answer everywhere, so
tests can compare answers, token ids, positions and usage exactly. The engine ``echo`` adds pace and failures.
"""

from __future__ import annotations

import hashlib
import math
import re
import struct
import sys
from array import array
from bisect import bisect_left
from functools import lru_cache
from itertools import accumulate, islice
from zlib import crc32

import msgspec
from modelbus_broker.messages import FinishReason, Sampling, TokenLogprob, TopLogprob

# Chinese, Japanese and Korean characters are pieces of their own.
_WIDE = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af\uf900-\ufaff"
_PIECE = re.compile(rf"\s*(?:[{_WIDE}]|[^\s{_WIDE}]+)|\s+")

_WORD = re.compile(rf"[{_WIDE}]|[^\W_{_WIDE}]+")

#: What keeps the blanks of an ASCII text from being its word borders, one for one.
_OTHER_BLANKS = ("  ", "\t", "\n", "\r", "\v", "\f", "\x1c", "\x1d", "\x1e", "\x1f")


class EchoAnswer(msgspec.Struct, frozen=True, kw_only=True):
    """One choice of an answer, whole."""

    pieces: list[str]  #: all tokens that were produced, those of the stop string included
    text: str  #: what the client sees: ends before the stop string
    finish_reason: FinishReason


def pieces(text: str, limit: int | None = None) -> list[str]:
    """The tokens of a text, at most ``limit``; joined they are the text again."""
    if limit is None:
        return _PIECE.findall(text)
    return [match.group() for match in islice(_PIECE.finditer(text), limit)]


def count_tokens(text: str) -> int:
    """How many pieces a text has."""
    if text.isascii() and text and not text[0].isspace() and not text[-1].isspace():
        # A prompt of 100,000 tokens must not cost milliseconds: searches for single characters are nearly free.
        if not any(other in text for other in _OTHER_BLANKS):
            return text.count(" ") + 1
        return len(text.split())
    return sum(1 for _ in _PIECE.finditer(text))


@lru_cache(maxsize=65_536)
def token_id(piece: str) -> int:
    """The id of a token: the same in every process."""
    return crc32(piece.encode("utf-8", "surrogatepass")) & 0x7FFFFFFF


def echo_answer(text: str, sampling: Sampling, *, tokens: int = 0, choice: int = 0) -> EchoAnswer:
    """What the model answers to a text.

    Args:
        text: what it repeats.
        sampling: ``max_tokens``, ``min_tokens``, ``ignore_eos``, ``stop`` and ``stop_token_ids`` count; ``seed`` and
            ``choice`` only with ``tokens``: then the answer begins at another piece.
        tokens: the length of the answer; the text is repeated or cut to it. 0: the text as it is.
    """
    wanted = tokens
    if sampling.ignore_eos and sampling.max_tokens is not None:
        wanted = sampling.max_tokens
    if wanted or sampling.min_tokens:
        produced = pieces(text) or ["..."]
        wanted = max(wanted or len(produced), sampling.min_tokens or 0)
        start = (choice + (sampling.seed or 0)) % len(produced) if tokens else 0
        produced = _repeated(produced, start, wanted)
    else:
        # One more than the limit tells whether the limit cut it.
        produced = pieces(text, None if sampling.max_tokens is None else sampling.max_tokens + 1)
    reason: FinishReason = "stop"
    if sampling.max_tokens is not None and len(produced) > sampling.max_tokens:
        produced, reason = produced[: sampling.max_tokens], "length"
    if sampling.ignore_eos:
        reason = "length"
    return _stopped(produced, reason, sampling)


def echo_logprob(piece: str, alternatives: int) -> TokenLogprob:
    """A made-up log probability: between ln 0.5 and ln 0.9, those of the alternatives share the rest."""
    token = token_id(piece)
    probability = 0.5 + (token % 41) / 100
    top = [TopLogprob(token=piece, logprob=math.log(probability), bytes=_bytes(piece))] if alternatives else []
    rest = 1.0 - probability
    for rank in range(1, alternatives):
        rest /= 2
        other = f"{piece}~{rank}"
        top.append(TopLogprob(token=other, logprob=math.log(rest), bytes=_bytes(other)))
    return TokenLogprob(token=piece, logprob=math.log(probability), bytes=_bytes(piece), top=top, token_id=token)


def echo_vector(text: str | list[int], dimensions: int) -> bytes:
    """The embedding of a text: a unit vector made of its hash, as little-endian float32."""
    data = text.encode("utf-8", "surrogatepass") if isinstance(text, str) else repr(text).encode()
    numbers = array("h", hashlib.shake_128(data).digest(2 * dimensions))
    if sys.byteorder == "big":
        numbers.byteswap()
    norm = math.sqrt(sum(number * number for number in numbers)) or 1.0
    vector = array("f", [number / norm for number in numbers])
    if sys.byteorder == "big":
        vector.byteswap()
    return vector.tobytes()


def echo_score(query: str, document: str) -> bytes:
    """How much of a query a document has: the share of its words that are in it, as little-endian float32."""
    words = set(_WORD.findall(query.lower()))
    found = words & set(_WORD.findall(document.lower()))
    return struct.pack("<f", len(found) / len(words) if words else 0.0)


#: What ``echo_classes`` tells apart.
ECHO_LABELS = ["short", "long"]


def echo_classes(text: str | list[int]) -> bytes:
    """The probabilities of ``ECHO_LABELS``, as little-endian float32: eight tokens are as short as long."""
    tokens = count_tokens(text) if isinstance(text, str) else len(text)
    return struct.pack("<2f", 8 / (tokens + 8), tokens / (tokens + 8))


def echo_label(label: str, said: str) -> list[TokenLogprob]:
    """How likely the model is to answer a text with a label: the likelier, the nearer to its beginning the text has it."""
    at = said.lower().find(label.lower())
    probability = 1 / (at + 2) if at >= 0 else 1e-3
    first, *rest = [match[0] for match in _PIECE.finditer(label)] or [label]
    scores = [TokenLogprob(token=first, logprob=math.log(probability), bytes=_bytes(first), token_id=token_id(first))]
    return scores + [TokenLogprob(token=t, logprob=0.0, bytes=_bytes(t), token_id=token_id(t)) for t in rest]


def _repeated(source: list[str], start: int, count: int) -> list[str]:
    """``count`` pieces of the source, which goes round; a blank keeps the ends apart."""
    first = source[0] if source[0][:1].isspace() else " " + source[0]
    ring = [first, *source[1:]]
    produced = [ring[(start + position) % len(ring)] for position in range(count)]
    if produced:
        produced[0] = produced[0].lstrip() or produced[0]
    return produced


def _stopped(produced: list[str], reason: FinishReason, sampling: Sampling) -> EchoAnswer:
    """Cuts the answer where the first stop string or stop token says; not before ``min_tokens``."""
    text = "".join(produced)
    if not sampling.stop and not sampling.stop_token_ids:
        return EchoAnswer(pieces=produced, text=text, finish_reason=reason)
    ends = list(accumulate(map(len, produced)))
    earliest = min(sampling.min_tokens or 0, len(produced))
    free = ends[earliest - 1] if earliest else 0
    found = [(at, at + len(stop)) for stop in sampling.stop if stop and (at := text.find(stop, free)) >= 0]
    # The token that completes a stop string is the last one; what ends first wins.
    last = bisect_left(ends, min(end for _, end in found)) if found else len(produced)
    ids = frozenset(sampling.stop_token_ids)
    for position in range(earliest, min(last + 1, len(produced)) if ids else 0):
        if token_id(produced[position]) in ids:
            visible = text[: ends[position] - len(produced[position])]
            return EchoAnswer(pieces=produced[: position + 1], text=visible, finish_reason="stop")
    if not found:
        return EchoAnswer(pieces=produced, text=text, finish_reason=reason)
    cut = min(at for at, end in found if end <= ends[last])
    return EchoAnswer(pieces=produced[: last + 1], text=text[:cut], finish_reason="stop")


@lru_cache(maxsize=4096)
def _bytes(piece: str) -> list[int]:
    return list(piece.encode("utf-8", "surrogatepass"))
