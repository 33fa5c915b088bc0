"""The one tokenizer of all text indexes and queries: Chinese, Japanese, Korean and Latin text, and identifiers.

Text is normalised (Unicode NFKC) and lowered. A CJK run gives its single characters and its pairs of neighbours; a Latin
word its English Snowball stem, unless it is a stop word; an identifier (``gpt_emb``, ``MiniLM-L6``, ``camelCase``) itself
as a whole and its parts. Both engines index these terms as they are, so both rank alike.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Collection, Iterator
from functools import cache, lru_cache
from typing import Any

#: Changes when the same text gives other terms: text indexes of an older version are made anew.
TOKENIZER_VERSION = 1
#: Longer terms are cut: Lucene's whitespace analyzer would split them at 255.
MAX_TERM_CHARS = 128

_CJK = (
    "\u3005\u3006\u3040-\u30ff\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af\uf900-\ufaff"
    "\uff66-\uff9f\U0001b000-\U0001b16f\U00020000-\U0003ffff"
)
#: A CJK run, or a word of other letters and digits whose pieces ``_ . -`` may join.
_LETTERS = rf"[^\W_{_CJK}]+"
_PIECE = re.compile(rf"(?P<cjk>[{_CJK}]+)|(?P<word>{_LETTERS}(?:[_.\-]+{_LETTERS})*)")
#: The same of an ASCII text.
_ASCII_WORD = re.compile(r"[0-9A-Za-z]+(?:[_.\-]+[0-9A-Za-z]+)*")
_JOINTS = re.compile(r"[_.\-]+")
_CAMEL = re.compile(r"[A-Z]+(?=[A-Z][a-z])|[A-Z]?[a-z]+|[A-Z]+|[0-9]+")
_LATIN = re.compile(r"[a-z]+")

#: Words that say nothing about what a text is about.
STOP_WORDS = frozenset(
    """a about above after again all am an and any are as at be because been before being below between both but by
    can could did do does doing don down during each few for from further had has have having he her here hers him his
    how i if in into is it its itself just me more most my no nor not of off on once only or other our ours out over own
    s same she should so some such t than that the their theirs them then there these they this those through to too
    under until up very was we were what when where which while who whom why will with would you your yours""".split()
)


def terms(text: str) -> list[str]:
    """The terms of a text in their order, as often as they occur."""
    found: list[str] = []
    if text.isascii():
        for word in _ASCII_WORD.findall(text):
            found += _word_terms(word)
        return found
    text = unicodedata.normalize("NFKC", text)
    for match in _PIECE.finditer(text):
        if match.lastgroup == "cjk":
            found += _cjk_terms(match.group())
        else:
            found += _word_terms(match.group())
    return found


def query_terms(text: str, limit: int = 512) -> list[str]:
    """The different terms of a query, at most ``limit`` of them."""
    return list(dict.fromkeys(terms(text)))[:limit]


def matches(text: str, wanted: Collection[str]) -> Iterator[tuple[int, int]]:
    """Where a text has any of the wanted terms: first character and the one after the last, in the order of the first.

    A CJK character and a pair of them are found each for itself.
    """
    wanted = frozenset(wanted)
    if text.isascii():
        for match in _ASCII_WORD.finditer(text):
            if not wanted.isdisjoint(_word_terms(match.group())):
                yield match.span()
        return
    normal = unicodedata.is_normalized("NFKC", text)
    for match in _PIECE.finditer(text):
        if match.lastgroup == "cjk":
            yield from _cjk_matches(match.group(), match.start(), wanted, normal)
        else:
            word = match.group() if normal else unicodedata.normalize("NFKC", match.group())
            if not wanted.isdisjoint(_word_terms(word)):
                yield match.span()


def _cjk_matches(run: str, start: int, wanted: frozenset[str], normal: bool) -> Iterator[tuple[int, int]]:
    if normal:
        first = {term[0] for term in wanted}
        for at in [at for at, char in enumerate(run) if char in first]:
            if run[at] in wanted:
                yield start + at, start + at + 1
            if at + 1 < len(run) and run[at : at + 2] in wanted:
                yield start + at, start + at + 2
        return
    for at, char in enumerate(run):
        if not wanted.isdisjoint(_cjk_terms(unicodedata.normalize("NFKC", char))):
            yield start + at, start + at + 1
        if at + 1 < len(run) and unicodedata.normalize("NFKC", run[at : at + 2]) in wanted:
            yield start + at, start + at + 2


def _cjk_terms(run: str) -> list[str]:
    return [*run, *map("".join, zip(run, run[1:], strict=False))]


@lru_cache(maxsize=200_000)
def _word_terms(word: str) -> tuple[str, ...]:
    """Of a word or an identifier: the whole, and its parts where it has some."""
    found: dict[str, None] = {}
    segments = _JOINTS.split(word)
    if len(segments) > 1:
        found[word.lower()[:MAX_TERM_CHARS]] = None
    for segment in segments:
        _add(found, segment.lower())
        parts = _CAMEL.findall(segment)
        if len(parts) > 1 and not segment.islower() and "".join(parts) == segment:
            for part in parts:
                if len(part) > 1:
                    _add(found, part.lower())
    return tuple(found)


def _add(found: dict[str, None], word: str) -> None:
    if word and word not in STOP_WORDS:
        word = word[:MAX_TERM_CHARS]
        found[_stemmer().stemWord(word) if _LATIN.fullmatch(word) else word] = None


@cache
def _stemmer() -> Any:
    import snowballstemmer

    return snowballstemmer.stemmer("english")
