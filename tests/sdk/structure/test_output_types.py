"""What return annotations mean: schemas, examples, values, and what is said of wrong ones."""

from __future__ import annotations

import dataclasses
import datetime
import decimal
import enum
import uuid
from collections.abc import Callable
from typing import Annotated, Any, Literal, NamedTuple, NotRequired, Optional, TypedDict

import msgspec
import pydantic
import pytest
from modelbus.structure import Ladder, OutputError, Retry, instances, output_type, schema_reader
from modelbus.structure.schemas import bounded
from modelbus_broker.errors import InvalidRequest


class Color(enum.Enum):
    RED = "red"
    BLUE = "blue"


@dataclasses.dataclass
class Item:
    """A thing that is sold."""

    name: Annotated[str, "as it stands on the label"]
    price: Annotated[float, msgspec.Meta(ge=0)]
    tags: list[str] = dataclasses.field(default_factory=list)


@dataclasses.dataclass
class Tree:
    label: str
    children: list[Tree]


@dataclasses.dataclass
class Span:
    start: int
    end: int

    def __post_init__(self) -> None:
        if self.end < self.start:
            raise Retry("end must not be before start")


class Point(TypedDict):
    x: int
    label: NotRequired[str]


class Pair(NamedTuple):
    left: int
    right: str = "none"


class Visit(pydantic.BaseModel):
    guests: int
    when: datetime.date

    @pydantic.field_validator("guests")
    @classmethod
    def some(cls, guests: int) -> int:
        if guests < 1:
            raise Retry("nobody comes: name at least one guest")
        return guests


class Trip(msgspec.Struct):
    visit: Visit
    days: int = 3


ANNOTATIONS: list[tuple[Any, str, Any]] = [
    (int, "3", 3),
    (float, "2.5", 2.5),
    (bool, "true", True),
    (None, "null", None),
    (datetime.date, '"2025-01-31"', datetime.date(2025, 1, 31)),
    (datetime.datetime, '"2025-01-31T14:30:00Z"', datetime.datetime(2025, 1, 31, 14, 30, tzinfo=datetime.UTC)),
    (decimal.Decimal, '"12.30"', decimal.Decimal("12.30")),
    (uuid.UUID, '"8c5f2d1e-4b3a-4c6d-9e7f-0a1b2c3d4e5f"', uuid.UUID("8c5f2d1e-4b3a-4c6d-9e7f-0a1b2c3d4e5f")),
    (datetime.timedelta, '"PT1H30M"', datetime.timedelta(minutes=90)),
    (Literal["a", "b", 3], '"b"', "b"),
    (Literal[1, True, "1"], "1", 1),
    (Literal[1, True, "1"], "true", True),
    (Color, '"blue"', Color.BLUE),
    (Item, '{"name": "pen", "price": 2, "tags": ["x"]}', Item("pen", 2.0, ["x"])),
    (Tree, '{"label": "a", "children": [{"label": "b", "children": []}]}', Tree("a", [Tree("b", [])])),
    (Point, '{"x": 1}', {"x": 1}),
    (Pair, '{"left": 1}', Pair(1)),
    (Visit, '{"guests": 2, "when": "2025-01-31"}', Visit(guests=2, when=datetime.date(2025, 1, 31))),
    (Trip, '{"visit": {"guests": 2, "when": "2025-01-31"}}', Trip(Visit(guests=2, when=datetime.date(2025, 1, 31)))),
    (list[Item], '[{"name": "pen", "price": 0}]', [Item("pen", 0.0)]),
    (tuple[int, str], '[1, "a"]', (1, "a")),
    (tuple[int, ...], "[1, 2]", (1, 2)),
    (set[str], '["a"]', {"a"}),
    (dict[str, int], '{"a": 1}', {"a": 1}),
    (dict[Color, int], '{"red": 1}', {Color.RED: 1}),
    (dict[int, bool], '{"7": true}', {7: True}),
    (Item | Point, '{"x": 1}', {"x": 1}),
    (Optional[Item], "null", None),  # noqa: UP045  # both spellings are met
    (int | str, '"42"', "42"),
    (list[Item | str], '["a"]', ["a"]),
    (Any, "[1]", [1]),
]


@pytest.mark.parametrize(("annotation", "text", "value"), ANNOTATIONS, ids=lambda part: str(part)[:30])
def test_every_annotation_has_a_schema_and_reads_what_fits_it(annotation: Any, text: str, value: Any) -> None:
    output = output_type(annotation)

    assert output.parse(text) == value and type(output.parse(text)) is type(value)
    assert output.parse(f"Sure:\n```json\n{text}\n```") == value
    assert schema_reader(output.schema).problems(msgspec.json.decode(text)) == []
    assert output_type(annotation) is output, "it is understood once"


@pytest.mark.parametrize("annotation", [annotation for annotation, *_ in ANNOTATIONS], ids=str)
def test_generated_examples_are_valid_the_same_every_time_and_different(annotation: Any) -> None:
    output = output_type(annotation)
    examples = output.examples(2)

    assert examples == output.examples(2)
    assert 1 <= len(set(examples)) == len(examples)
    for example in examples:
        output.parse(example)  # raises if it does not fit


def test_any_text_is_a_text() -> None:
    output = output_type(str)

    assert (output.kind, output.parse(' {"a": 1} ')) == ("text", ' {"a": 1} ')


@pytest.mark.parametrize(
    ("annotation", "text", "value"),
    [
        (int, "I think that it is 42.", 42),
        (int, "1,234", 1234),
        (float, "about -2.5 degrees", -2.5),
        (bool, "Yes, it is.", True),
        (Color, "The answer is Red!", Color.RED),
        (Literal["spam", "not spam"], "This is not spam.", "not spam"),
        (datetime.date, "2025-01-31", datetime.date(2025, 1, 31)),
        (int | str, "neither", "neither"),
        (list[int], "<think>[9]</think>[1, 2]", [1, 2]),
        (Item, '{"name": "pen", "price": "2.50", "more": 1}', Item("pen", 2.5)),
    ],
    ids=str,
)
def test_what_can_only_mean_one_thing_is_read(annotation: Any, text: str, value: Any) -> None:
    assert output_type(annotation).parse(text) == value


@pytest.mark.parametrize(
    ("annotation", "text", "problems"),
    [
        (int, "between 3 and 4", ["the answer is no JSON: it has no JSON value"]),
        (bool, "yes and no", ["the answer is no JSON: it has no JSON value"]),
        (Literal["a", "b"], "c", ["the answer is no JSON: it has no JSON value"]),
        (Item, '{"price": "cheap"}', ["name: it is missing", "price: expected a number, got the text 'cheap'"]),
        (list[Item], '[{"name": "a", "price": -1}]', ["[0].price: expected something at least 0, got -1.0"]),
        (Item, '{"name": "pen", "pri', ["the answer ends in the middle of the JSON"]),
        (list[int], "[1, 2", ["the answer ends in the middle of the JSON"]),
        (Visit, '{"guests": 0, "when": "soon"}', [
            "guests: nobody comes: name at least one guest",
            "when: input should be a valid date or datetime, input is too short",
        ]),
        (Trip, '{"visit": {"guests": 0, "when": "2025-01-31"}}', ["visit: guests: nobody comes: name at least one guest"]),
        (Trip, '{"visit": {"guests": 1, "when": "2025-01-31"}, "days": "x"}', ["days: expected `int`, got `str`"]),
        (Span, '{"start": 2, "end": 1}', ["the answer: end must not be before start"]),
        (Item | Span, '{"start": 2}', ["the answer: fits none of the 2 forms it may have; of the closest: end: it is missing"]),
        (Color, '"green"', ["the answer: expected one of \"red\", \"blue\", got the text 'green'"]),
        (tuple[int, str], "[1]", ["the answer: expected a list of 2 items, got one of 1"]),
    ],
    ids=str,
)  # fmt: skip
def test_what_is_wrong_is_said_with_its_place(annotation: Any, text: str, problems: list[str]) -> None:
    with pytest.raises(OutputError) as caught:
        output_type(annotation).parse(text)

    assert caught.value.problems == problems
    assert caught.value.raw == text


def test_validators_are_run_and_may_change_the_value() -> None:
    def even(value: int) -> int:
        if value % 2:
            raise Retry("take an even number")
        return value * 10

    assert output_type(int).with_validators(even).parse("4") == 40
    with pytest.raises(OutputError, match="take an even number"):
        output_type(int).with_validators(even).parse("3")
    assert output_type(Annotated[int, even]).parse("4") == 40


@pytest.mark.parametrize(
    "annotation",
    [
        object(), bytes, complex, print, pydantic.create_model("Caller", call=(Callable[[], int], ...)),
        msgspec.defstruct("Opaque", [("raw", msgspec.Raw, msgspec.Raw(b"1"))]),
    ],
    ids=["object", "bytes", "complex", "function", "pydantic", "struct"],
)  # fmt: skip
def test_types_that_json_cannot_become_are_refused(annotation: Any) -> None:
    with pytest.raises(InvalidRequest, match="an answer cannot become"):
        output_type(annotation)


def test_what_goes_to_a_grammar_is_an_object_with_an_end_in_the_order_of_the_fields() -> None:
    form = output_type(list[Item]).response_format(Ladder(max_string=50, max_items=7))["json_schema"]
    schema = form["schema"]
    item = schema["properties"]["value"]["items"]

    assert (schema["required"], schema["properties"]["value"]["maxItems"]) == (["value"], 7)
    assert list(item["properties"]) == ["name", "price", "tags"]
    assert item["properties"]["name"]["maxLength"] == 50
    assert form["strict"] is False, "a member is not required"
    assert output_type(list[Item]).parse('{"value": []}') == []
    assert output_type(Span).response_format(Ladder())["json_schema"]["strict"] is True


def test_an_example_that_would_be_endless_large_or_wrong_is_left_out() -> None:
    assert instances({"$ref": "#"}) == []
    assert instances({"type": "string", "minLength": 10**9}) == []
    assert instances({"type": "array", "minItems": 10**9}) == []
    assert instances({"type": "string", "pattern": "(?=a)b"}) == []
    assert instances({"type": "string", "pattern": "a{1000000000}"}) == []
    assert instances({"type": "string", "description": "a code, such as USD."}) == ["USD"]
    assert len(instances({"type": "string", "pattern": "^[A-Z]{2}-\\d{3}$"})) >= 1


def test_a_grammar_lets_in_no_members_that_a_type_does_not_name() -> None:
    class Inner(pydantic.BaseModel):
        x: int

    class Open(pydantic.BaseModel):
        model_config = pydantic.ConfigDict(extra="allow")
        x: int

    class Outer(pydantic.BaseModel):
        inner: Inner
        open: Open
        any: dict[str, int]

    class Record(msgspec.Struct):
        x: int

    asked = output_type(Outer).response_format(Ladder())["json_schema"]
    members = asked["schema"]["properties"]
    assert asked["schema"]["additionalProperties"] is False
    assert members["inner"]["additionalProperties"] is False
    assert members["open"]["additionalProperties"] is True, "it says so"
    assert members["any"]["additionalProperties"]["type"] == "integer"
    assert not asked["strict"] and output_type(Inner).response_format(Ladder())["json_schema"]["strict"]
    assert output_type(Record).response_format(Ladder())["json_schema"]["strict"]


@pytest.mark.parametrize(
    "schema",
    [
        {"allOf": [{"properties": {"a": {}}}, {"properties": {"b": {}}}]},
        {"properties": {"a": {}}, "anyOf": [{"properties": {"b": {}}}, {"properties": {"c": {}}}]},
        {"properties": {"a": {}}, "$ref": "#/$defs/b", "$defs": {"b": {"properties": {"b": {}}}}},
        {"properties": {"a": {}}, "patternProperties": {"^x": {}}},
    ],
)
def test_what_is_put_together_of_several_schemas_stays_open(schema: dict[str, Any]) -> None:
    assert bounded(schema, 100, 100) == schema
