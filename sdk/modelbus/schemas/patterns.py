"""A text that a regular expression matches."""

from __future__ import annotations

import re
from collections.abc import Iterable

# The parser of the standard library: private by name, the same in all Python versions that modelbus supports.
from re import _constants as code  # type: ignore[attr-defined]
from re import _parser  # type: ignore[attr-defined]
from typing import Any

#: Tried in this order where a class of characters leaves the choice.
_LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789 _-.,:;/@#%&+=!?'\"()[]{}<>|\\~^$*`\n\t"
_CATEGORIES = {
    code.CATEGORY_DIGIT: r"\d", code.CATEGORY_NOT_DIGIT: r"\D", code.CATEGORY_SPACE: r"\s",
    code.CATEGORY_NOT_SPACE: r"\S", code.CATEGORY_WORD: r"\w", code.CATEGORY_NOT_WORD: r"\W",
}  # fmt: skip
_MOST_REPEATS = 256
_LONGEST = 100_000


def text_matching(pattern: str, *, least: int = 0, most: int | None = None, variant: int = 0) -> str | None:
    """A text in which the pattern is found, of ``least`` to ``most`` characters; None if none was found.

    Looking ahead and behind is not planned for: what is made is tried, and other lengths and variants after it.
    """
    try:
        parsed, compiled = _parser.parse(pattern), re.compile(pattern)
    except (re.error, OverflowError, RecursionError):
        return None
    for other in range(variant, variant + 4):
        repeats = 0
        while repeats <= _MOST_REPEATS:
            writer = _Writer(repeats, other)
            text = writer.written(parsed)
            if writer.length > _LONGEST:
                return None
            if text is not None:
                padded = text if len(text) >= least else text + "x" * (least - len(text))
                for candidate in (text, padded):
                    fits = least <= len(candidate) and (most is None or len(candidate) <= most)
                    if fits and compiled.search(candidate):
                        return candidate
                if most is not None and len(text) > most:
                    break
            repeats += 1 if repeats < 16 else 16
    return None


class _Writer:
    """Writes one text: each repeat as often as it may be, but not more than ``repeats`` beyond its least."""

    def __init__(self, repeats: int, variant: int) -> None:
        self._repeats, self._variant = repeats, variant
        self._groups: dict[int, str] = {}
        self.length = 0  # of what was repeated

    def written(self, parsed: Iterable[tuple[Any, Any]]) -> str | None:
        texts: list[str] = []
        for operation, argument in parsed:
            text = self._one(operation, argument)
            if text is None:
                return None
            texts.append(text)
        return "".join(texts)

    def _one(self, operation: Any, argument: Any) -> str | None:
        if operation is code.LITERAL:
            return chr(argument)
        if operation is code.NOT_LITERAL:
            return next(letter for letter in _LETTERS if ord(letter) != argument)
        if operation is code.ANY:
            return _LETTERS[self._variant % 26]
        if operation is code.IN:
            return self._of_class(argument)
        if operation is code.BRANCH:
            branches = argument[1]
            return self.written(branches[self._variant % len(branches)])
        if operation is code.SUBPATTERN:
            text = self.written(argument[3])
            if text is not None and argument[0] is not None:
                self._groups[argument[0]] = text
            return text
        if operation is code.ATOMIC_GROUP:
            return self.written(argument)
        if operation is code.GROUPREF:
            return self._groups.get(argument)
        if operation in (code.MAX_REPEAT, code.MIN_REPEAT, code.POSSESSIVE_REPEAT):
            least, most, inner = argument
            count = min(int(most), int(least) + self._repeats)
            return self._repeated(inner, count)
        if operation in (code.AT, code.ASSERT, code.ASSERT_NOT):
            return ""
        return None

    def _repeated(self, inner: Iterable[tuple[Any, Any]], count: int) -> str | None:
        texts: list[str] = []
        for _ in range(count):
            text = self.written(inner)
            self.length += len(text or "")
            if text is None or self.length > _LONGEST:
                return None
            texts.append(text)
        return "".join(texts)

    def _of_class(self, items: list[tuple[Any, Any]]) -> str | None:
        negated = items[0][0] is code.NEGATE
        starts = [chr(low + self._variant % (high - low + 1)) for kind, (low, high) in _ranges(items)]
        letters = [*starts, *_LETTERS] if not negated else _LETTERS
        return next((letter for letter in letters if _is_in(letter, items) != negated), None)


def _ranges(items: list[tuple[Any, Any]]) -> list[tuple[Any, tuple[int, int]]]:
    found = []
    for kind, argument in items:
        if kind is code.RANGE:
            found.append((kind, argument))
        elif kind is code.LITERAL:
            found.append((kind, (argument, argument)))
    return found


def _is_in(letter: str, items: list[tuple[Any, Any]]) -> bool:
    for kind, argument in items:
        if kind is code.LITERAL and ord(letter) == argument:
            return True
        if kind is code.RANGE and argument[0] <= ord(letter) <= argument[1]:
            return True
        if kind is code.CATEGORY and re.fullmatch(_CATEGORIES[argument], letter):
            return True
    return False
