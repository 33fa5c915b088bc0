"""Detokenizing, stop strings and drawing, on made-up tokens."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from modelbus_workers.engines.torch_model.text import Detokenizer, StopBuffer


class ByteTokenizer:
    """Every token is one byte."""

    def decode(self, ids: list[int], **_: Any) -> str:
        return bytes(ids).decode(errors="replace")


@given(st.text())
def test_characters_are_never_shown_in_part(text: str) -> None:
    detokenizer = Detokenizer(ByteTokenizer(), list(b"prompt"))

    shown = [detokenizer.add(byte) for byte in text.encode()]

    assert "".join(shown) == text
    assert detokenizer.flush() == ""


@given(st.binary(max_size=40))
def test_bytes_that_are_no_text_are_not_held_for_ever(junk: bytes) -> None:
    detokenizer = Detokenizer(ByteTokenizer())

    shown = "".join(detokenizer.add(byte) for byte in junk) + detokenizer.flush()

    if len(junk) <= 8:
        assert shown == junk.decode(errors="replace")
    assert len(shown) >= len(junk) // 4


@given(st.lists(st.text("ab", max_size=3), max_size=12), st.lists(st.text("ab", min_size=1, max_size=4), max_size=3))
def test_a_stop_string_is_never_shown_however_the_text_comes(pieces: list[str], stops: list[str]) -> None:
    buffer = StopBuffer(stops)
    shown, stopped = "", False
    for piece in pieces:
        text, stopped = buffer.add(piece)
        shown += text
        if stopped:
            break
    whole = "".join(pieces)

    assert stopped == any(stop in whole for stop in stops)
    assert not any(stop in shown for stop in stops)
    if not stopped:
        assert shown + buffer.flush() == whole
    assert whole.startswith(shown)


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.floats(-8, 8, width=32), min_size=2, max_size=30, unique=True),
    st.integers(0, 10),
    st.floats(0.05, 1.0),
    st.sampled_from([0.0, 0.05, 0.3]),
    st.floats(0, 1, exclude_max=True),
)
def test_only_tokens_that_the_librarys_processors_leave_are_drawn(
    values: list[float], top_k: int, top_p: float, min_p: float, point: float
) -> None:
    torch = pytest.importorskip("torch")
    library = pytest.importorskip("transformers")
    from modelbus_workers.engines.torch_model.plan import Plan
    from modelbus_workers.engines.torch_model.sampling import Sampler

    scores = torch.tensor(values)
    sampler = Sampler(Plan(temperature=1.0, top_k=top_k, top_p=top_p, min_p=min_p), 0, [], scores)
    # A hair wider, since the library sums in single precision.
    kept = scores[None]
    if 0 < top_k < len(values):
        kept = library.TopKLogitsWarper(top_k)(None, kept)
    if top_p < 1.0:
        kept = library.TopPLogitsWarper(min(1.0, top_p + 1e-4))(None, kept)
    if min_p:
        kept = library.MinPLogitsWarper(max(0.0, min_p - 1e-4))(None, kept)

    drawn = sampler._draw(scores, point)

    assert kept[0, drawn] > float("-inf")


def test_tokens_are_drawn_as_often_as_they_are_likely() -> None:
    torch = pytest.importorskip("torch")
    from modelbus_workers.engines.torch_model.plan import Plan
    from modelbus_workers.engines.torch_model.sampling import Sampler

    weights = [0.5, 0.3, 0.15, 0.05]
    scores = torch.tensor(weights).log()
    for plan in (Plan(temperature=1.0), Plan(temperature=1.0, top_p=0.999999)):
        sampler = Sampler(plan, 0, [], scores)
        drawn = [sampler._draw(scores, (i + 0.5) / 1000) for i in range(1000)]
        assert [drawn.count(token) / 1000 for token in range(4)] == pytest.approx(weights, abs=0.002)
