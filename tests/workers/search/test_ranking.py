"""Terms, fusion and highlights as pure functions."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from modelbus_broker.messages.search import Fusion, Span
from modelbus_workers.search.fusion import Scored, coverage, fuse, scaled
from modelbus_workers.search.highlights import PASSAGE_CHARS, highlights
from modelbus_workers.search.terms import MAX_TERM_CHARS, matches, query_terms, terms


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Running the models", "run model"),
        ("部署模型", "部 署 模 型 部署 署模 模型"),
        ("部署 a model", "部 署 部署 model"),
        ("ＡＢＣ ﾃｽﾄ", "abc テ ス ト テス スト"),
        ("gpt_emb", "gpt_emb gpt emb"),
        ("MiniLM-L6-v2", "minilm-l6-v2 minilm mini lm l6 v2"),
        ("getHTTPResponse", "gethttprespons get http respons"),
        ("llm-1.5, file.py.", "llm-1.5 llm 1 5 file.py file py"),
        ("It's the user's", "user"),
        ("naïve Grüße", "naïve grüße"),
        ("한국어", "한 국 어 한국 국어"),
        ("the of and", ""),
        ("🚍 ... -- __", ""),
    ],
)
def test_a_text_gives_these_terms(text: str, expected: str) -> None:
    assert " ".join(terms(text)) == expected


@given(st.text(max_size=200))
@settings(deadline=None)
def test_terms_are_short_words_whatever_the_text_is(text: str) -> None:
    found = terms(text)

    assert all(term and len(term) <= MAX_TERM_CHARS + 1 and not any(map(str.isspace, term)) for term in found)
    assert terms(f"{text} é") == [*found, "é"], "what is not ASCII is read in another way"
    for start, end in matches(text, found):
        assert 0 <= start < end <= len(text)
        assert set(terms(text[start:end])) & set(found)
    spans, passage = highlights(text, found)
    assert all(0 <= span.start < span.end <= len(text) for span in spans)
    assert 0 <= passage.start <= passage.end <= len(text)


def ranking(*pairs: tuple[str, float]) -> list[Scored]:
    return [Scored(key, score) for key, score in pairs]


TEXT = ranking(("a", 12.0), ("b", 6.0), ("c", 2.0))
VECTOR = ranking(("b", 0.9), ("d", 0.85), ("a", 0.8))


def order(fusion: Fusion, cover: float = 1.0) -> dict[str, float]:
    return {item.key: round(item.score, 4) for item in fuse(TEXT, VECTOR, fusion, cover=cover)}


def test_minmax_adds_scaled_scores_half_and_half() -> None:
    fused = fuse(TEXT, VECTOR, Fusion())

    assert order(Fusion()) == {"b": 0.7, "a": 0.5, "d": 0.25, "c": 0.0}
    best = fused[0]
    assert (best.text, best.text_rank, best.vector, best.vector_rank) == (6.0, 2, 0.9, 1)
    assert (fused[2].text, fused[2].text_rank) == (None, None)


def test_a_text_ranking_that_covers_little_of_the_query_counts_less() -> None:
    assert order(Fusion(), cover=0.5) == {"b": 0.6, "a": 0.25, "d": 0.25, "c": 0.0}
    assert order(Fusion(), cover=0.1) == {"b": 0.52, "d": 0.25, "a": 0.05, "c": 0.0}
    assert order(Fusion(cover=False), cover=0.1) == order(Fusion())
    assert coverage(["red", "apple"], ["apple", "pie"]) == 0.5
    assert coverage([], ["apple"]) == 0.0


def test_reciprocal_ranks_are_those_of_the_paper_with_weights() -> None:
    fused = order(Fusion(kind="rrf", text_weight=1, vector_weight=1), cover=0.0)
    weighted = order(Fusion(kind="rrf", text_weight=0, vector_weight=1))

    assert fused == {
        "b": round(1 / 62 + 1 / 61, 4),
        "a": round(1 / 61 + 1 / 63, 4),
        "d": round(1 / 62, 4),
        "c": round(1 / 63, 4),
    }
    assert list(weighted) == ["b", "d", "a", "c"]


def test_one_ranking_alone_keeps_its_scores_and_ties_go_by_id() -> None:
    assert [(item.key, item.score) for item in fuse([], VECTOR, Fusion())] == [("b", 0.9), ("d", 0.85), ("a", 0.8)]
    assert fuse([], [], Fusion()) == []
    same = ranking(("z", 1.0), ("y", 1.0))
    assert scaled(same) == {"z": 1.0, "y": 1.0}
    assert [item.key for item in fuse(same, ranking(("x", 1.0)), Fusion(window=1))] == ["x", "z"]


def test_highlights_mark_pairs_of_characters_before_single_ones() -> None:
    text = "模型部署在模具上"

    assert highlights(text, query_terms("部署模型"))[0] == [Span(start=0, end=4)]
    assert highlights(text, query_terms("具"))[0] == [Span(start=6, end=7)]


def test_the_passage_is_where_the_words_are_densest() -> None:
    text = "one apple " + "filler words " * 60 + "red apples and green apples " + "filler words " * 60

    spans, passage = highlights(text, query_terms("red green apples"))

    assert len(spans) == 5
    assert "red apples and green apples" in text[passage.start : passage.end]
    assert passage.end - passage.start <= PASSAGE_CHARS
    assert text[passage.start - 1] == " " == text[passage.end]
