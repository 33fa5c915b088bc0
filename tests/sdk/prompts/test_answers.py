"""The return annotation decides what comes back: on models that follow a script, in this process."""

from __future__ import annotations

import dataclasses
import datetime
import enum
import json
from collections.abc import AsyncIterator, Iterator
from typing import Any, Literal, TypedDict

import modelbus
import msgspec
import pydantic
import pytest
from modelbus.errors import OutputError, PromptError, TooManyRounds, UpstreamFailed
from modelbus.prompts import Middleware, Next, Partial, RenderedCall, middleware
from modelbus.prompts.cuts import ItemsCut, PartialsCut
from modelbus.structure import Result, Retry, output_type
from modelbus.testing import ScriptedAnswer, ScriptedCall, ScriptedModel
from modelbus.tools import Injected


class Mood(enum.Enum):
    GOOD = "good"
    BAD = "bad"


class Story(pydantic.BaseModel):
    """A story."""

    title: str
    pages: int


@dataclasses.dataclass(frozen=True)
class Point:
    x: int
    y: int


class Movie(TypedDict):
    name: str
    year: int


class Cat(msgspec.Struct, frozen=True):
    name: str


@modelbus.prompt(llm="m")
def ask(what: str) -> str:
    """{{ what }}"""


@pytest.mark.parametrize(
    ("annotation", "said", "value"),
    [
        (str, "a text", "a text"),
        (int, "42", 42),
        (float, "1.5", 1.5),
        (bool, "true", True),
        (datetime.date, '"2024-02-29"', datetime.date(2024, 2, 29)),
        (Literal["yes", "no"], "no", "no"),
        (Mood, '"bad"', Mood.BAD),
        (Story, '{"title": "T", "pages": 3}', Story(title="T", pages=3)),
        (Point, '```json\n{"x": 1, "y": 2}\n```', Point(1, 2)),
        (Movie, '{"name": "N", "year": 1999}', {"name": "N", "year": 1999}),
        (Cat, 'Here it is: {"name": "Tom"}', Cat("Tom")),
        (list[int], "[1, 2]", [1, 2]),
        (list[Story], '[{"title": "T", "pages": 3}]', [Story(title="T", pages=3)]),
        (Story | Point, '{"x": 1, "y": 2}', Point(1, 2)),
        (Story | None, "null", None),
        (dict[str, int], '{"a": 1}', {"a": 1}),
    ],
)
def test_an_answer_becomes_a_value_of_the_annotation(annotation: Any, said: str, value: object) -> None:
    result = ask.with_return_type(annotation).with_llm(ScriptedModel(said)).result("x")

    assert (result.value, type(result.value)) == (value, type(value))
    assert result.raw == said
    assert result.usage.completion_tokens > 0


def test_a_wrong_answer_is_asked_for_again_with_what_is_wrong() -> None:
    model = ScriptedModel('{"title": "T"}', '{"title": "T", "pages": 3}')

    result = ask.with_return_type(Story).with_llm(model).result("x")

    assert result.value == Story(title="T", pages=3)
    assert (result.attempts, result.rung) == (2, "reasked")
    assert "pages" in model.last.messages[-1].text()


def test_an_answer_that_stays_wrong_is_an_error_with_its_words() -> None:
    model = ScriptedModel("nothing", "no", "never")

    with pytest.raises(OutputError) as caught:
        ask.with_return_type(Story).with_llm(model)("x")

    assert caught.value.raw == "never"
    assert len(model.requests) == 3
    with pytest.raises(OutputError):
        ask.with_return_type(Story).with_ladder(reasks=0).with_llm(ScriptedModel("nothing"))("x")


def test_a_validator_of_the_user_may_ask_again() -> None:
    def short(story: Story) -> None:
        if story.pages > 5:
            raise Retry("at most 5 pages")

    model = ScriptedModel('{"title": "T", "pages": 9}', '{"title": "T", "pages": 5}')
    wanted = output_type(Story).with_validators(short)

    assert ask.with_return_type(wanted).with_llm(model)("x").pages == 5
    assert "at most 5 pages" in model.last.messages[-1].text()


def test_examples_of_the_user_are_shown_as_turns() -> None:
    model = ScriptedModel('{"title": "T", "pages": 3}')
    taught = ask.with_return_type(Story).with_examples(({"what": "a"}, Story(title="A", pages=1)))

    taught.with_llm(model)("b")

    assert model.last.messages[1].text() == '{"title": "A", "pages": 1}'


# Streams


@modelbus.prompt(llm="m")
def stories(count: int) -> Iterator[Story]:
    """{{ count }} stories"""


@modelbus.prompt(llm="m")
def growing(about: str) -> AsyncIterator[Partial[Story]]:
    """{{ about }}"""


def test_items_come_one_by_one_each_checked() -> None:
    text = json.dumps([{"title": f"T{n}", "pages": n} for n in range(3)])
    seen = []

    stream = stories.with_llm(ScriptedModel(text, chunks=40))(3)
    for story in stream:
        seen.append(story)

    assert seen == [Story(title=f"T{n}", pages=n) for n in range(3)]
    assert stream.result.value == seen


def test_a_wrong_item_ends_the_stream_after_the_good_ones() -> None:
    text = '[{"title": "T", "pages": 1}, {"title": "U"}, {"title": "V", "pages": 3}]'
    stream = stories.with_llm(ScriptedModel(text, chunks=40))(3)

    assert next(stream) == Story(title="T", pages=1)
    with pytest.raises(OutputError, match="pages"):
        next(stream)


def test_a_list_that_is_cut_by_length_gives_its_whole_items_and_then_the_error() -> None:
    cut = ScriptedAnswer(text='[{"title": "T", "pages": 1}, {"title": "U', finish_reason="length")
    stream = stories.with_llm(ScriptedModel(cut, chunks=20))(3)

    assert next(stream) == Story(title="T", pages=1)
    with pytest.raises(OutputError, match="cut off"):
        next(stream)


async def test_an_object_grows_and_takes_nothing_back() -> None:
    model = ScriptedModel('```json\n{"title": "A long title", "pages": 12}\n```', chunks=30)

    parts = [part async for part in growing.with_llm(model)("x")]

    assert len(parts) > 5
    titles = [part.data.get("title", "") for part in parts]
    assert all(later.startswith(before) for before, later in zip(titles, titles[1:], strict=False))
    assert all(part.value is None for part in parts[:-1])
    assert "title" not in parts[0].done
    first_done = next(part for part in parts if "title" in part.done)
    assert first_done.data["title"] == "A long title"
    assert parts[-1].value == Story(title="A long title", pages=12)
    assert parts[-1].done == {"title", "pages"}


@pytest.mark.parametrize("size", [1, 2, 3, 7, 1000])
@pytest.mark.parametrize(
    "text",
    [
        '[{"title": "a [b", "pages": 1}, {"title": "]", "pages": 2}]',
        'Sure!\n```json\n[{"title": "a [b", "pages": 1},\n {"title": "]", "pages": 2}]\n```\nDone.',
        '{"value": [{"title": "a [b", "pages": 1}, {"title": "]", "pages": 2}]}',
        '<think>[{"no": 1}]</think>[{"title": "a [b", "pages": 1}, {"title": "]", "pages": 2}]',
        'As [1] says: [{"title": "a [b", "pages": 1}, {"title": "]", "pages": 2}]',
    ],
)
def test_items_are_the_same_however_the_text_is_cut(text: str, size: int) -> None:
    output = output_type(list[Story])
    cut: ItemsCut[Story] = ItemsCut(output)

    items = [item for at in range(0, len(text), size) for item in cut.feed(text[at : at + size])]
    items += cut.finish(Result(value=output.parse(text)))

    assert items == [Story(title="a [b", pages=1), Story(title="]", pages=2)]


def test_a_value_that_is_no_object_may_grow_too() -> None:
    output = output_type(list[int])
    cut: PartialsCut[list[int]] = PartialsCut(output)

    parts = cut.feed('{"value": [1, 2, ') + cut.feed("3]}") + cut.finish(Result(value=[1, 2, 3]))

    assert [(part.data, part.value) for part in parts] == [([1, 2], None), ([1, 2, 3], None), ([1, 2, 3], [1, 2, 3])]


def test_a_piece_that_adds_nothing_to_an_object_gives_no_part() -> None:
    cut: PartialsCut[Story] = PartialsCut(output_type(Story))

    pieces = ["Here: ", '{"title"', ": ", '"a', '"', ", ", '"pages": ', "1", "\n", "}", "\n"]
    parts = [(part.data, sorted(part.done)) for piece in pieces for part in cut.feed(piece)]

    assert parts == [
        ({}, []),
        ({"title": "a"}, []),
        ({"title": "a"}, ["title"]),
        ({"title": "a", "pages": 1}, ["pages", "title"]),
    ]


# What is laid around calls


@pytest.fixture
def laid_around(monkeypatch: pytest.MonkeyPatch) -> list[Middleware]:
    """The list, empty for this test."""
    found: list[Middleware] = []
    monkeypatch.setattr("modelbus.prompts.running.middleware", found)
    return found


def test_middleware_sees_every_call_and_result_the_first_one_outermost(laid_around: list[Middleware]) -> None:
    seen: list[str] = []

    def named(name: str) -> Middleware:
        async def around(call: RenderedCall, following: Next) -> Result[Any]:
            seen.append(f"{name} {call.messages[0].text()}")
            result = await following(msgspec.structs.replace(call, model=f"{call.model}{name}"))
            seen.append(f"{name} {result.value}")
            return result

        return around

    laid_around += [named("a"), named("b")]
    model = ScriptedModel("yes", "yes")

    assert ask.with_llm(model)("x") == "yes"
    assert seen == ["a x", "b x", "b yes", "a yes"]
    assert model.last.model == "mab"

    @modelbus.prompt(llm="m")
    def streamed(what: str) -> Iterator[str]:
        """{{ what }}"""

    assert list(streamed.with_llm(model)("y")) == ["yes"]
    assert seen[4:] == ["a y", "b y", "b yes", "a yes"], "streams pass through it too"


def test_who_answers_without_asking_answers_streams_as_well(laid_around: list[Middleware]) -> None:
    async def cached(call: RenderedCall, following: Next) -> Result[Any]:
        raw = '[{"title": "kept", "pages": 1}]'
        return Result(value=call.output.parse(raw), raw=raw)

    laid_around.append(cached)

    assert list(stories.with_llm(ScriptedModel())(1)) == [Story(title="kept", pages=1)]


def test_an_error_of_the_model_is_raised_through_all_of_it(laid_around: list[Middleware]) -> None:
    seen: list[BaseException] = []

    async def watching(call: RenderedCall, following: Next) -> Result[Any]:
        try:
            return await following(call)
        except UpstreamFailed as error:
            seen.append(error)
            raise

    laid_around.append(watching)
    model = ScriptedModel(ScriptedAnswer(error="upstream_failed"))

    with pytest.raises(UpstreamFailed):
        ask.with_llm(model)("x")
    assert len(seen) == 1


def test_the_list_of_all_programs_is_the_one_that_is_exported() -> None:
    from modelbus.prompts import running

    assert middleware is running.middleware


def test_a_partial_needs_to_know_of_what() -> None:
    with pytest.raises(PromptError, match=r"Partial\[str\]"):
        ask.with_return_type(Partial)


# Tools


def add(a: int, b: int) -> int:
    """Adds two numbers."""
    return a + b


def calling(name: str = "add", **arguments: Any) -> ScriptedAnswer:
    return ScriptedAnswer(tool_calls=[ScriptedCall(name=name, arguments=arguments)])


def test_the_model_may_call_functions_before_it_answers() -> None:
    model = ScriptedModel(calling(a=1, b=2), "It is 3.", calling(a=2, b=2), '{"title": "Sum", "pages": 4}')
    helped = ask.with_tools(add).with_llm(model)

    result = helped.result("1 + 2?")

    assert (result.value, result.attempts) == ("It is 3.", 2)
    assert [message.role for message in result.messages] == ["assistant", "tool", "assistant"]
    assert result.messages[1].text() == "3"
    assert helped.with_return_type(Story)("2 + 2?") == Story(title="Sum", pages=4)


def test_an_answer_with_tools_streams_too() -> None:
    @modelbus.prompt(llm="m", tools=[add])
    def streamed(what: str) -> Iterator[str]:
        """{{ what }}"""

    model = ScriptedModel(calling(a=1, b=2), "It is three indeed.", chunks=3)
    stream = streamed.with_llm(model)("1 + 2?")

    assert "".join(stream) == "It is three indeed." == stream.result.value


def test_the_calls_themselves_may_be_the_answer() -> None:
    @modelbus.prompt(llm="m", tools=[add])
    def one(what: str) -> modelbus.ToolCall:
        """{{ what }}"""

    @modelbus.prompt(llm="m", tools=[add])
    def some(what: str) -> list[modelbus.ToolCall]:
        """{{ what }}"""

    call = one.with_llm(ScriptedModel(calling(a=1, b=2)))("1 + 2?")
    assert (call.function.name, json.loads(call.function.arguments)) == ("add", {"a": 1, "b": 2})

    two = ScriptedAnswer(tool_calls=[ScriptedCall(name="add", arguments={"a": n, "b": n}) for n in (1, 2)])
    assert len(some.with_llm(ScriptedModel(two))("sums")) == 2
    assert some.with_tools(add, choice="auto").with_llm(ScriptedModel("none of use"))("hello") == []
    with pytest.raises(OutputError):
        one.with_ladder(reasks=0).with_llm(ScriptedModel("no"))("x")
    with pytest.raises(PromptError, match=r"prompt\(tools="):
        ask.with_return_type(modelbus.ToolCall).with_llm(ScriptedModel("x"))("x")


def test_limits_and_injected_values_reach_the_tools() -> None:
    def lookup(key: str, table: Injected[dict[str, int]]) -> int:
        """Looks something up."""
        return table[key]

    model = ScriptedModel(calling("lookup", key="x"), "It is 7.")

    assert ask.with_tools(lookup, inject={"table": {"x": 7}}).with_llm(model)("x?") == "It is 7."
    with pytest.raises(TooManyRounds):
        again = ScriptedModel(calling(a=1, b=2), calling(a=1, b=2))
        ask.with_tools(add, max_rounds=1).with_llm(again)("x")
