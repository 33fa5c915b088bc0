"""Tokens become text as they come: never half a character, never a piece of a stop string."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

#: How many tokens of the prompt the first decoding sees: whether a word begins with a blank depends on what is before.
_CONTEXT_TOKENS = 6
#: Tokens that may wait for the end of a character; a character has at most 4 bytes. What is longer is not text.
_MOST_HELD_TOKENS = 8

_REPLACEMENT = "\ufffd"


class Detokenizer:
    """Decodes one token after the other. Its state depends on the tokens alone, so a replay gives the same text."""

    def __init__(self, tokenizer: Any, before: Sequence[int] = (), kept: Mapping[int, str] | None = None) -> None:
        """``kept``: special tokens that are text all the same."""
        self._tokenizer = tokenizer
        self._kept = kept or {}
        self._begin(list(before[-_CONTEXT_TOKENS:]))

    def _begin(self, ids: list[int]) -> None:
        self._ids = ids
        self._shown = len(ids)  # how many of _ids are in the text that was given out
        self._shown_text = self._decode(ids)

    def add(self, token_id: int) -> str:
        """The text that this token completes; "" while a character is unfinished."""
        if token_id in self._kept:
            text = self.flush() + self._kept[token_id]
            self._begin([])
            return text
        self._ids.append(token_id)
        text = self._decode(self._ids)
        if text.endswith(_REPLACEMENT) and len(self._ids) - self._shown <= _MOST_HELD_TOKENS:
            return ""
        return self._show(text)

    def flush(self) -> str:
        """What still waited for more bytes."""
        return self._show(self._decode(self._ids)) if self._shown < len(self._ids) else ""

    def _show(self, text: str) -> str:
        new = text[len(self._shown_text) :]
        # The tokens of this piece are the context of the next.
        self._ids = self._ids[self._shown :]
        self._shown = len(self._ids)
        self._shown_text = self._decode(self._ids)
        return new

    def _decode(self, ids: list[int]) -> str:
        text: str = self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text


class StopBuffer:
    """Holds text back while it may be the beginning of a stop string."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = [stop for stop in stops if stop]
        self._held = ""

    def add(self, text: str) -> tuple[str, bool]:
        """Text that may go out, and whether a stop string was found; it and all after it are gone."""
        if not self._stops:
            return text, False
        text = self._held + text
        found = [at for stop in self._stops if (at := text.find(stop)) >= 0]
        if found:
            self._held = ""
            return text[: min(found)], True
        keep = max(overlap(text, stop) for stop in self._stops)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep], False

    def flush(self) -> str:
        """What was held back, when the answer ends for another reason."""
        held, self._held = self._held, ""
        return held


def overlap(text: str, stop: str) -> int:
    """How long the longest end of ``text`` is that is a true beginning of ``stop``."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0


_HEX_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class TokenTexts:
    """The text and the bytes of single tokens, for log probabilities; remembered, since alternatives repeat."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self.of = lru_cache(maxsize=65_536)(self._of)

    def _of(self, token_id: int) -> tuple[str, tuple[int, ...]]:
        text = self._tokenizer.decode([token_id], skip_special_tokens=False, clean_up_tokenization_spaces=False)
        if _REPLACEMENT not in text:
            return text, tuple(text.encode())
        # A piece of a character: its bytes are in the vocabulary's own spelling.
        piece = self._tokenizer.convert_ids_to_tokens(token_id) or ""
        if match := _HEX_BYTE.fullmatch(piece):
            return text, (int(match[1], 16),)
        letters = _byte_letters()
        if all(letter in letters for letter in piece):
            return text, tuple(letters[letter] for letter in piece)
        return text, tuple(text.encode())


@lru_cache(maxsize=1)
def _byte_letters() -> dict[str, int]:
    """The letters by which byte-level vocabularies (GPT-2 and its heirs) spell bytes."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(256 + i): byte for i, byte in enumerate(others)}
