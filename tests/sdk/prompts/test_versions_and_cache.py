"""What makes a version of a prompt function, and answers that are not asked for twice."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import pytest
from modelbus import Decision, prompt
from modelbus.cache import Cache, CachedAnswer, is_deterministic
from modelbus.errors import EngineFailed, PromptError
from modelbus.prompts.base import Prompt
from modelbus.testing import ScriptedModel
from modelbus.versions import diff

from tests.helpers.doc_blocks import DOCS, run_page


def helper(word: str) -> str:
    return word.upper()


def other_helper(word: str) -> str:
    return word.lower()


@prompt(llm="m")
def greet(name: str) -> str:
    """Hello {{ name }}"""
    return {"name": helper(name)}  # type: ignore[return-value]


def test_a_version_is_a_hash_of_all_that_decides_what_is_asked() -> None:
    version = greet.version
    assert (version.name, version.template) == (f"{__name__}.greet", "Hello {{ name }}")
    assert len(version.id) == 16 and str(version) == version.id == greet.version.id
    assert greet.render("you").version == version.id
    assert greet.render("you").options.labels == {"prompt": version.name, "version": version.id}
    assert sorted(version.helpers) == [f"{__name__}.greet", f"{__name__}.helper"]
    copies: list[Prompt[Any]] = [
        greet.with_options(temperature=0),
        greet.with_examples(("Hi", "Ho")),
        greet.with_return_type(int),
        greet.with_max_turns(2),
    ]
    assert len({version.id, *(copy.version.id for copy in copies)}) == 5
    # Where it is asked is no part of it.
    assert greet.with_llm("other").version.id == version.id
    assert greet.with_options(lane="lo").version.id == version.id


def greeting(help_with: Callable[[str], str]) -> Prompt[Any]:
    @prompt(llm="m")
    def greets(name: str) -> str:
        """Hello {{ name }}"""
        return {"name": help_with(name)}  # type: ignore[return-value]

    return greets


def test_a_diff_says_what_has_changed() -> None:
    old = greet.version
    assert diff(old, greet.version) == ""
    changed = diff(old, greet.with_options(temperature=0.5).with_return_type(Literal["a", "b"]).version)
    assert '+    "temperature": 0.5' in changed and "schema (old)" in changed
    assert "template" not in changed and "helper" not in changed
    one, other = greeting(helper).version, greeting(other_helper).version
    shown = diff(one, other)
    assert one.id != other.id and one.id == greeting(helper).version.id
    assert "-    return word.upper()" in shown and "+    return word.lower()" in shown


def test_a_version_is_the_same_in_another_process() -> None:
    code = f"import sys; sys.path.insert(0, {str(Path(__file__).parents[3])!r}); from {__name__} import greet; print(greet.version)"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert ran.stdout.strip() == greet.version.id


@pytest.mark.parametrize("stored", [False, True])
async def test_an_answer_that_is_kept_is_not_asked_for_again(tmp_path: Path, stored: bool) -> None:
    path = tmp_path / "answers.sqlite" if stored else None
    cache = Cache(path)
    model = ScriptedModel("one", "two", "three", "four")
    asked = greet.with_llm(model, model="m").with_options(temperature=0).with_cache(cache)
    first = await asked.aio_result("you")
    again = await asked.aio_result("you")
    assert (first.value, again) == ("one", first)
    assert (len(model.requests), cache.hits, cache.misses) == (1, 1, 1)
    # Another argument, other options, no cache: other questions.
    assert await asked.aio("them") == "two"
    assert await asked.with_options(max_tokens=7).aio("you") == "three"
    assert await asked.with_cache(None).aio("you") == "four"
    if stored:
        cache.close()
        elsewhere = asked.with_cache(Cache(path))
        assert await elsewhere.aio("you") == "one", "another program finds it in the file"
    cache.clear()
    with pytest.raises(EngineFailed, match="all given"):
        await asked.with_cache(Cache(None)).aio("you")


async def test_typed_answers_are_read_again() -> None:
    @prompt()
    def count(text: str) -> list[int]:
        """Numbers in {{ text }}"""

    model = ScriptedModel("[1, 2, 3]")
    asked = count.with_llm(model, model="m").with_options(seed=1).with_cache(Cache())
    assert [await asked.aio("x"), await asked.aio("x")] == [[1, 2, 3]] * 2
    assert len(model.requests) == 1
    other = asked.with_return_type(str)
    with pytest.raises(EngineFailed, match="all given"):
        await other.aio("x")  # another version


async def test_streams_come_from_the_cache_too() -> None:
    @prompt()
    def tell(name: str) -> Iterator[str]:
        """Tell of {{ name }}"""

    model = ScriptedModel("once upon a time", "all over again")
    asked = tell.with_llm(model, model="m").with_options(temperature=0).with_cache(Cache())
    for _ in range(2):
        assert "".join([piece async for piece in asked.aio("you")]) == "once upon a time"
    assert len(model.requests) == 1


async def test_what_may_differ_is_only_kept_where_that_is_said() -> None:
    model = ScriptedModel("one", "two")
    asked = greet.with_llm(model, model="m").with_cache(Cache())
    for careless in (asked, asked.with_options(temperature=0.7)):
        with pytest.raises(PromptError, match="temperature=0"):
            await careless.aio("you")
    assert not model.requests
    always = greet.with_llm(model, model="m").with_cache(Cache(), always=True)
    assert [await always.aio("you"), await always.aio("you")] == ["one", "one"]


@pytest.mark.parametrize(
    ("sampling", "expected"),
    [({}, False), ({"temperature": 0}, True), ({"temperature": 0.1}, False), ({"temperature": 0.1, "seed": 0}, True), ({"seed": 3}, True)],
)  # fmt: skip
def test_what_is_deterministic(sampling: dict[str, Any], expected: bool) -> None:
    assert is_deterministic(sampling) is expected


def test_a_cache_forgets_what_is_old_and_what_is_too_much(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for path in (None, tmp_path / "answers.sqlite"):
        cache = Cache(path, entries=2)
        for name in "abc":
            cache.put(name, CachedAnswer(raw=name))
        assert [cache.get(name) is not None for name in "abc"] == [False, True, True]
        old = Cache(path, kept_s=10)
        old.put("a", CachedAnswer(raw="a"))
        assert old.get("a") is not None
        monkeypatch.setattr("time.time", lambda: 1e12)
        assert old.get("a") is None
        monkeypatch.undo()


async def test_a_decision_is_the_answer_of_a_prompt_function_and_no_text() -> None:
    @prompt()
    def kind(text: str) -> Decision[Literal["a", "b"]]:
        """Which is {{ text }}?"""

    assert [label.text for label in kind.with_llm("m").render("x").output.labels] == ["a", "b"]  # type: ignore[attr-defined]


async def test_the_page_on_versions_is_right() -> None:
    await asyncio.to_thread(run_page, DOCS / "versions.md")
