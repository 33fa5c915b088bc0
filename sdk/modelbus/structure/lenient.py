"""Finds the JSON in what a model wrote: bare, in a fence, after prose, after thinking. Pure.

Nothing is made up. What ends too early is told apart (``cut``), and of several values the one that is valid counts.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

import msgspec

from .partial import MISSING, Broken, PartialJSON

_FENCE = re.compile(r"```[ \t]*([\w+-]*)[ \t]*\r?\n?(.*?)(?:```|\Z)", re.DOTALL)
_THINKING = re.compile(r"\A\s*<(think|thinking|reasoning|analysis)>.*?</\1>", re.DOTALL)
#: Some templates open the thinking in the prompt: only its end is in the answer.
_THOUGHT = re.compile(r"\A.*</(?:think|thinking)>", re.DOTALL)
#: Between the end of one candidate and the next, so many beginnings are tried.
_MOST_TRIES = 64


class Found(msgspec.Struct, frozen=True, kw_only=True):
    """A value in a text."""

    value: Any
    cut: bool = False  #: the text ended before the value did


class NoJSON(ValueError):
    """There is no JSON value in the text; the message says what stands there in its place."""


def without_thinking(text: str) -> str:
    """The text after what a model thought aloud before its answer. A text that begins as JSON is its answer."""
    if text.lstrip()[:1] in ("{", "[", '"'):
        return text
    text = _THINKING.sub("", text, count=1)
    return _THOUGHT.sub("", text, count=1)


def find_json(
    text: str, *, opening: str = "{[", accept: Callable[[Any], bool] | None = None, scalars: bool = False
) -> Found:
    """The JSON value in a model's text.

    Args:
        opening: letters that a value may begin with: ``{`` for objects, ``[`` for lists.
        accept: which of several values is the one that is meant; without it, or when none is accepted, the first.
        scalars: the text as a whole may be a number, a constant or a quoted text.

    Raises:
        NoJSON: there is none.
    """
    text = without_thinking(text)
    first: Found | None = None
    broken = ""
    for part in _parts(text):
        for found in _values(part, opening, scalars):
            if isinstance(found, str):
                broken = broken or found
                continue
            if not found.cut and (accept is None or accept(found.value)):
                return found
            if first is None or (first.cut and not found.cut):
                first = found
    if first is not None:
        return first
    raise NoJSON(broken or ("it is empty" if not text.strip() else "it has no JSON value"))


def _parts(text: str) -> Iterator[str]:
    """Where to look, in this order: what is fenced, all of it."""
    stripped = text.strip()
    if stripped[:1] not in ("{", "["):
        yield from (match[2] for match in _FENCE.finditer(text) if match[2].strip())
    yield text


def _values(text: str, opening: str, scalars: bool) -> Iterator[Found | str]:
    """The values in a text one after another, or why one that began was none."""
    if scalars:
        whole = _whole(text.strip())
        if whole is not None:
            yield whole
    at = tries = 0
    while tries < _MOST_TRIES:
        at = min((found for found in (text.find(letter, at) for letter in opening) if found >= 0), default=-1)
        if at < 0:
            return
        tries += 1
        parser = PartialJSON()
        try:
            parser.feed(text[at:])
            parser.finish()
        except Broken as error:
            yield f"{error} (after {text[max(at, at + error.at - 20) : at + error.at]!r})"
            at += 1
            continue
        if parser.value is not MISSING:
            yield Found(value=parser.value, cut=parser.cut)
        at += max(1, parser.read)


def _whole(text: str) -> Found | None:
    """A scalar that is all of the text."""
    parser = PartialJSON()
    try:
        parser.feed(text)
        parser.finish()
    except Broken:
        return None
    if parser.value is MISSING or isinstance(parser.value, list | dict) or parser.read < len(text):
        return None
    return Found(value=parser.value, cut=parser.cut)
