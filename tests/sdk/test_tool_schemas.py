"""What a model is told of a function, and how its arguments become the function's."""

from __future__ import annotations

import dataclasses
import datetime
import enum
import functools
from collections.abc import AsyncIterator, Iterator
from typing import Annotated, Any, Literal, TypedDict

import jsonschema
import pydantic
import pytest
from modelbus.errors import InvalidRequest
from modelbus.schemas import instance
from modelbus.tools import Injected, Tool, ToolContext, ToolSet, tool
from modelbus.tools.docstrings import read_docstring


class Unit(enum.Enum):
    C = "celsius"
    F = "fahrenheit"


class Place(pydantic.BaseModel):
    city: str = pydantic.Field(min_length=2)
    country: str = "DE"


@dataclasses.dataclass
class Span:
    start: datetime.date
    days: int = 1


class Option(TypedDict, total=False):
    verbose: bool


def weather(  # type: ignore[no-untyped-def]
    place: Place,
    unit: Unit,
    mode: Literal["now", "day"],
    span: Span,
    options: Option,
    levels: list[int],
    count: Annotated[int, "how many"] = 3,
    note: str | None = None,
    limit: int = None,  # type: ignore[assignment]  # as people write it
    anything=None,
    *,
    exact: Annotated[bool, pydantic.Field(description="to the minute")] = False,
) -> str:
    """The weather somewhere.

    With a second paragraph.

    Args:
        place: where it is
            asked for
        unit (Unit): of the degrees
        count: not this, the hint says more

    Returns:
        words
    """
    return (
        f"{place.city} {unit.name} {mode} {span.start:%Y} {options} {levels} {count} {note} {limit} {anything} {exact}"
    )


ARGUMENTS: dict[str, Any] = {
    "place": {"city": "Köln"}, "unit": "celsius", "mode": "now", "span": {"start": "2026-05-04"}, "options": {"verbose": True},
    "levels": [1, 2],
}  # fmt: skip


def test_hints_and_docstring_become_a_schema() -> None:
    made = tool(weather)
    schema = made.parameters
    properties = schema["properties"]

    jsonschema.Draft202012Validator.check_schema(schema)
    assert (made.name, made.description) == ("weather", "The weather somewhere.\n\nWith a second paragraph.")
    assert schema["required"] == ["place", "unit", "mode", "span", "options", "levels"]
    assert list(properties)[:3] == ["place", "unit", "mode"]
    assert properties["place"]["description"] == "where it is asked for"
    assert properties["unit"]["description"] == "of the degrees" and set(properties["unit"]["enum"]) == {
        "celsius",
        "fahrenheit",
    }
    assert properties["count"] == {"type": "integer", "description": "how many", "default": 3}
    assert properties["exact"] == {"type": "boolean", "description": "to the minute", "default": False}
    assert properties["limit"]["default"] is None and {"type": "null"} in properties["limit"]["anyOf"]
    assert properties["anything"] == {"default": None}
    jsonschema.validate(ARGUMENTS, schema)
    assert made.spec()["function"]["name"] == "weather"


def test_arguments_become_what_the_hints_say() -> None:
    made = tool(weather)

    values, problems = made.read(ARGUMENTS)

    assert problems == []
    assert (values["place"], values["unit"], values["span"]) == (
        Place(city="Köln"),
        Unit.C,
        Span(datetime.date(2026, 5, 4)),
    )
    assert made.bound(values)() == "Köln C now 2026 {'verbose': True} [1, 2] 3 None None None False"


def test_a_model_that_follows_the_schema_can_call_it() -> None:
    made = tool(weather)
    for variant in range(4):
        values, problems = made.read(instance(made.parameters, variant=variant))
        assert problems == []
        made.bound(values)()


def test_what_is_wrong_with_arguments_is_said_all_at_once() -> None:
    wrong = {**ARGUMENTS, "place": {"city": "K"}, "unit": "kelvin", "levels": "x", "more": 1}
    del wrong["mode"]

    _, problems = tool(weather).read(wrong)

    text = "\n".join(problems)
    assert len(problems) == 5
    for words in ("place.city", "kelvin", "levels", "mode: it is missing", "no such argument"):
        assert words in text
    assert tool(weather).read([1])[1] == ["the arguments are no JSON object"]


def google(a, b):  # type: ignore[no-untyped-def]
    """Summary: with a colon.

    Parameters:
      a (int, optional): first: of all
        and more
      b: second

    Example:
        >>> google(1, 2)
    """


def numpy(a, b, c):  # type: ignore[no-untyped-def]
    """Summary.

    Parameters
    ----------
    a : int
        first
        and more
    b, c
        both

    Returns
    -------
    int
        not this
    """


def sphinx(a, b):  # type: ignore[no-untyped-def]
    """Summary.

    :param int a: first
        and more
    :type a: int
    :param b: second
    :returns: nothing
    :raises ValueError: never
    """


def test_docstrings_of_three_styles_are_read() -> None:
    assert read_docstring(google.__doc__) == (
        "Summary: with a colon.",
        {"a": "first: of all and more", "b": "second"},
    )
    assert read_docstring(numpy.__doc__) == ("Summary.", {"a": "first and more", "b": "both", "c": "both"})
    assert read_docstring(sphinx.__doc__) == ("Summary.", {"a": "first and more", "b": "second"})
    assert read_docstring(None) == ("", {})
    assert read_docstring("Only text:\n\nreally.") == ("Only text:\n\nreally.", {})


class Service:
    def __init__(self, name: str) -> None:
        self.name = name

    def greet(self, who: str) -> str:
        """Greets."""
        return f"{self.name} greets {who}"

    @tool
    def wave(self, times: int = 1) -> str:
        return f"{self.name} waves {times}"

    def __call__(self, x: int) -> int:
        """Called."""
        return x


def positional(a: int, b: int, /) -> int:
    return a - b


def test_methods_partials_objects_and_positional_parameters_are_tools() -> None:
    service = Service("S")
    greet, wave = tool(service.greet), service.wave
    partial = tool(functools.partial(weather, count=7))

    assert (greet.name, list(greet.parameters["properties"]), greet.bound({"who": "x"})()) == (
        "greet",
        ["who"],
        "S greets x",
    )
    assert (wave.name, list(wave.parameters["properties"]), wave(times=2)) == ("wave", ["times"], "S waves 2")
    assert partial.name == "weather" and partial.parameters["properties"]["count"]["default"] == 7
    assert (tool(service).name, tool(service).description, tool(service).bound({"x": 1})()) == ("Service", "Called.", 1)
    minus = tool(positional)
    assert minus.bound(minus.read({"b": 1, "a": 3})[0])() == 2
    assert (
        tool(name="other", description="d", timeout_s=1, needs_approval=True)(positional)
        .with_settings(name="x")
        .timeout_s
        == 1
    )


def test_the_seed_s_way_to_describe_a_parameter_works() -> None:
    def f(unit: Annotated[str, {"enum": ["day", "week"], "description": "of time"}]) -> None: ...

    assert tool(f).parameters["properties"]["unit"] == {
        "type": "string",
        "enum": ["day", "week"],
        "description": "of time",
    }


def test_injected_parameters_are_not_shown() -> None:
    def f(x: int, db: Injected[dict[str, int]], context: Injected[ToolContext], more: Injected[int] = 0) -> None: ...

    made = tool(f)

    assert list(made.parameters["properties"]) == ["x"]
    assert list(made.injected) == ["db", "context", "more"]
    with pytest.raises(InvalidRequest, match="needs db"):
        ToolSet(made).check_injection({})
    ToolSet(made).check_injection({"db": {}})


class Opaque:
    pass


def opaque(x: Opaque) -> None: ...


def stars(*args: int) -> None: ...


def keywords(**kwargs: int) -> None: ...


def items() -> Iterator[int]:
    yield 1


async def pieces() -> AsyncIterator[int]:
    yield 1


def unknown(x: Missing) -> None: ...  # type: ignore[name-defined]  # noqa: F821


@pytest.mark.parametrize(
    ("function", "words"),
    [
        (opaque, "parameter x.*Injected"),
        (stars, "name each parameter"),
        (keywords, "name each parameter"),
        (items, "generator.*list"),
        (pieces, "generator.*list"),
        (unknown, "means nothing here"),
        (lambda x: x, "no name for a tool"),
        (tool(positional), "a tool already"),
    ],
    ids=["opaque", "stars", "keywords", "items", "pieces", "unknown", "lambda", "twice"],
)
def test_what_cannot_be_told_to_a_model_is_an_error(function: Any, words: str) -> None:
    with pytest.raises(InvalidRequest, match=words):
        tool(function)


def test_tool_sets_are_flat_and_names_are_unique() -> None:
    def f() -> None: ...

    def g() -> None: ...

    inner = ToolSet(f)
    both = ToolSet(inner, [g, inner])
    assert both.names == ["f", "g"] and "f" in both and both["g"].function is g and both.get("h") is None
    assert both.only("g").names == ["g"] and both.prefixed("a_").names == ["a_f", "a_g"]
    assert [t.needs_approval for t in both.with_settings(needs_approval=True)] == [True, True]
    assert [spec["function"]["name"] for spec in both.specs()] == ["f", "g"]
    with pytest.raises(InvalidRequest, match="two tools have the name 'f'"):
        ToolSet(f, Tool(f))
    with pytest.raises(InvalidRequest, match="no tool h; there are: f, g"):
        both.only("h")
    with pytest.raises(InvalidRequest, match="is no tool"):
        ToolSet("f")  # type: ignore[arg-type]
