"""Counting tokens where nobody says how many there are."""

from __future__ import annotations

import pytest
from modelbus.token_estimate import estimate_text


@pytest.mark.parametrize(
    ("text", "tokens"),
    [("", 0), (" \n", 1), ("Hello, world!", 4), ("internationalization", 4), ("你好，世界", 5), ("naïve café", 2)],
    ids=repr,
)
def test_words_characters_and_signs_are_counted(text: str, tokens: int) -> None:
    assert estimate_text(text) == tokens


@pytest.mark.parametrize("words", ["a book ", "什么是总线？ bus, ", "0123456789\n"])
def test_a_long_text_has_about_as_many_as_its_parts(words: str) -> None:
    """Longer ones are counted by samples."""
    repeated = 1_000_000 // len(words)

    assert estimate_text(words * repeated) == pytest.approx(estimate_text(words) * repeated, rel=0.01)


def test_what_stands_in_one_part_of_a_long_text_is_seen() -> None:
    text = "你" * 500_000 + "a" * 500_000

    assert estimate_text(text) == pytest.approx(500_000 + 500_000 / 6, rel=0.05)
