"""JSON from models, whole and in pieces: what is read, and what must never happen."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from modelbus.structure import MISSING, Broken, NoJSON, PartialJSON, find_json

VALUES: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)
CONTAINERS = VALUES.filter(lambda value: isinstance(value, list | dict))
WRITTEN = st.builds(
    lambda value, indent, ascii: json.dumps(value, indent=indent, ensure_ascii=ascii),
    CONTAINERS, st.sampled_from([None, 2]), st.booleans(),
)  # fmt: skip
PROSE = st.text(st.characters(exclude_characters="{[("), max_size=30)


def read(text: str, sizes: list[int] | None = None) -> PartialJSON:
    """All of it, in pieces of these sizes."""
    parser, at = PartialJSON(), 0
    for size in sizes or []:
        parser.feed(text[at : at + size])
        at += size
    parser.feed(text[at:])
    parser.finish()
    return parser


@settings(max_examples=150, deadline=None)
@given(WRITTEN, st.lists(st.integers(1, 7), max_size=30))
def test_json_is_read_as_json_says_in_whatever_pieces_it_comes(text: str, sizes: list[int]) -> None:
    parser = read(text, sizes)

    assert parser.value == json.loads(text)
    assert json.dumps(parser.value) == json.dumps(json.loads(text)), "the order of the members too"
    assert parser.complete and not parser.cut and parser.read == len(text)


@settings(max_examples=60, deadline=None)
@given(st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text())
def test_scalars_are_read_too(value: Any) -> None:
    assert find_json(json.dumps(value), scalars=True).value == value


def grows(before: Any, after: Any, open_: bool) -> bool:
    """Whether nothing of what was there has been taken back or changed."""
    if before is MISSING:
        return True
    if isinstance(before, str):
        return isinstance(after, str) and (after.startswith(before) if open_ else after == before)
    if isinstance(before, list):
        inner = zip(before, after, strict=False)
        last = len(before) - 1
        return isinstance(after, list) and len(after) >= len(before) and all(
            grows(old, new, open_ and at == last) for at, (old, new) in enumerate(inner)
        )  # fmt: skip
    if isinstance(before, dict):
        last_key = next(reversed(before), None)
        return isinstance(after, dict) and list(after)[: len(before)] == list(before) and all(
            grows(old, after[key], open_ and key == last_key) for key, old in before.items()
        )  # fmt: skip
    return type(before) is type(after) and bool(before == after)


@settings(max_examples=100, deadline=None)
@given(WRITTEN)
def test_what_was_given_is_never_taken_back_and_what_is_off_the_path_is_done(text: str) -> None:
    parser, before = PartialJSON(), MISSING
    whole = json.loads(text)
    for letter in text:
        value = parser.feed(letter)
        now = json.loads(json.dumps(value)) if value is not MISSING else MISSING
        assert grows(before, now, True)
        assert now is MISSING or grows(now, whole, True), "and it is the beginning of what comes"
        at: Any = now
        rest: Any = whole
        steps: tuple[Any, ...] = parser.path
        for step in steps:
            if isinstance(at, list):
                assert at[:step] == rest[:step]
                at, rest = (at[step], rest[step]) if step < len(at) else (MISSING, MISSING)
            elif isinstance(at, dict):
                assert all(at[key] == rest[key] for key in at if key != step)
                at, rest = (at[step], rest[step]) if step in at else (MISSING, MISSING)
        before = now


@settings(max_examples=60, deadline=None)
@given(st.lists(VALUES, max_size=6))
def test_items_of_a_list_come_one_by_one_when_they_are_whole(items: list[Any]) -> None:
    parser, given_out = PartialJSON(), []
    for letter in json.dumps(items):
        parser.feed(letter)
        given_out += json.loads(json.dumps(parser.items()))
    assert given_out == items


@settings(max_examples=80, deadline=None)
@given(WRITTEN, st.data())
def test_what_is_cut_off_is_said_to_be_cut_off_and_nothing_is_made_up(text: str, data: st.DataObject) -> None:
    end = data.draw(st.integers(1, len(text) - 1))
    parser = read(text[:end])

    assert parser.cut and not parser.complete
    assert grows(parser.value, json.loads(text), True)


@settings(max_examples=60, deadline=None)
@given(WRITTEN, PROSE, PROSE, st.sampled_from(["{}", "```json\n{}\n```", "<think>[1]</think>\n{}"]))
def test_it_is_found_among_whatever_stands_around_it(text: str, before: str, after: str, around: str) -> None:
    if "```" in text or "```" in before or "</think" in text + before + after:
        return
    written = around.replace("{}", text)
    found = find_json(written if around.startswith("<") else before + "\n" + written + "\n" + after)

    assert found.value == json.loads(text) and not found.cut


@settings(max_examples=200, deadline=None)
@given(st.text(st.sampled_from("{}[]():,\"'`\\/#*\n utrefalsn01.-+eE_“”aN"), max_size=40))
def test_no_text_breaks_the_reader(text: str) -> None:
    try:
        found = find_json(text, scalars=True)
    except NoJSON as error:
        assert str(error)
    else:
        json.dumps(found.value, allow_nan=False)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("{'a': 'it's', 'b': True, 'c': None}", {"a": "it's", "b": True, "c": None}),
        ("{a: 1, b_2: [1, 2,],}", {"a": 1, "b_2": [1, 2]}),
        ('{"a": 1 // one\n, /* two */ "b": 2 # three\n}', {"a": 1, "b": 2}),
        ('{"a": "she said "no" to me"}', {"a": 'she said "no" to me'}),
        ('{"a": "line\nline"}', {"a": "line\nline"}),
        ('{"a": "x" "b": "y"\n "c": [1 2]}', {"a": "x", "b": "y", "c": [1, 2]}),
        ("[(1, 2), +3, .5, 1_000]", [[1, 2], 3, 0.5, 1000]),
        ("{“a”: “b”}", {"a": "b"}),
        ('{"path": "C:\\dir", "re": "\\d+", "e": "\\ud83d\\ude00", "half": "\\ud83d!"}',
         {"path": "C:\\dir", "re": "\\d+", "e": "😀", "half": "\ufffd!"}),
        ('Is [this] it? {"a": 1}', {"a": 1}),
    ],
)  # fmt: skip
def test_what_models_write_is_read(text: str, value: Any) -> None:
    assert find_json(text, accept=lambda found: found == value).value == value


@pytest.mark.parametrize(
    "text",
    ['{"a": }', '{"a" 1}', '{"a": b}', '{"a": 1, "a": 2}', "[1, 2}", '{"a": NaN}', '{"a": 1e999}', "[[" * 80, "{:1}"],
)
def test_what_means_nothing_certain_is_broken(text: str) -> None:
    with pytest.raises(Broken):
        parser = PartialJSON()
        parser.feed(text)
        parser.finish()


def test_of_several_values_the_one_that_is_accepted_counts() -> None:
    text = 'A call looks like {"name": "x"}. Mine: {"name": "y", "arguments": {}}'

    assert find_json(text, accept=lambda value: "arguments" in value).value["name"] == "y"
    assert find_json(text).value["name"] == "x"
    with pytest.raises(NoJSON, match="no JSON value"):
        find_json("no idea")
    with pytest.raises(NoJSON, match="empty"):
        find_json(" ")
