"""Instances of JSON schemas are valid, whatever the schema says, and other variants are other instances."""

from __future__ import annotations

import datetime
import decimal
import enum
import re
import uuid
from typing import Annotated, Any, Literal

import jsonschema
import pydantic
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from modelbus.errors import InvalidRequest
from modelbus.schemas import NoInstance, instance
from modelbus.schemas.patterns import text_matching


def check(schema: Any, variant: int = 0) -> Any:
    made = instance(schema, variant=variant)
    validator = jsonschema.Draft202012Validator(schema, format_checker=jsonschema.Draft202012Validator.FORMAT_CHECKER)
    validator.validate(made)
    return made


class Colour(enum.Enum):
    RED = "red"
    GREEN = "green"


class Tree(pydantic.BaseModel):
    value: int
    children: list[Tree] = []
    parent: Tree | None = None


class Cat(pydantic.BaseModel):
    kind: Literal["cat"]
    lives: int = pydantic.Field(ge=1, le=9)


class Dog(pydantic.BaseModel):
    kind: Literal["dog"]
    name: str = pydantic.Field(max_length=3)


class Everything(pydantic.BaseModel):
    whole: int = pydantic.Field(gt=10, lt=13, multiple_of=4)
    real: float = pydantic.Field(gt=0, lt=0.5)
    negative: float = pydantic.Field(le=-7.5)
    code: str = pydantic.Field(pattern=r"^[A-Z]{2}-\d{3}(-[a-f]+)?$", min_length=8)
    long: str = pydantic.Field(min_length=40, max_length=44)
    colour: Colour
    pairs: list[tuple[int, str]]
    counts: dict[str, int]
    tree: Tree
    choice: Literal["x", "y"] | None
    when: datetime.datetime
    day: datetime.date
    clock: datetime.time
    id: uuid.UUID
    flags: set[bool]
    three: Annotated[list[int], pydantic.Field(min_length=3, max_length=3)]
    pet: Cat | Dog = pydantic.Field(discriminator="kind")
    perhaps: int | str | None = None


@pytest.mark.parametrize("variant", range(6))
def test_a_model_of_everything_that_pydantic_can_say_takes_its_instance(variant: int) -> None:
    made = check(Everything.model_json_schema(), variant)

    read = Everything.model_validate(made)

    assert (read.whole, read.three.__len__(), read.choice is not None) == (12, 3, True)
    assert read.tree.children and read.counts
    assert instance(Everything.model_json_schema(), variant=variant) == made


def test_variants_take_other_choices() -> None:
    schema = Everything.model_json_schema()
    made = [instance(schema, variant=variant) for variant in range(2)]

    assert {one["colour"] for one in made} == {"red", "green"}
    assert {one["pet"]["kind"] for one in made} == {"cat", "dog"}
    assert made[0]["perhaps"] == 1 and made[1]["perhaps"] == "perhaps 2"


SCHEMAS: list[Any] = [
    True,
    {},
    {"const": None},
    {"enum": [3, "three"], "type": "string"},
    {"type": ["null", "integer"]},
    {"type": "integer", "minimum": -3, "maximum": -3},
    {"type": "integer", "exclusiveMinimum": 2, "exclusiveMaximum": 4},
    {"type": "integer", "multipleOf": 0.4, "minimum": 5},
    {"type": "number", "exclusiveMinimum": 0.5, "maximum": 0.75},
    {"type": "string", "minLength": 3, "maxLength": 3},
    {"type": "string", "format": "email"},
    {"type": "string", "pattern": "a+b|c"},
    {"minProperties": 2, "propertyNames": {"pattern": "^[a-z]+$"}, "type": "object"},
    {"type": "object", "required": ["a", "b"], "properties": {"a": {"type": "integer"}}, "additionalProperties": {"type": "boolean"}},
    {"type": "object", "properties": {"a": {}, "b": {}, "c": {}}, "required": ["c"], "maxProperties": 2},
    {"type": "object", "properties": {"a": {"type": "string"}}, "patternProperties": {"^a": {"minLength": 30}}},
    {"type": "object", "properties": {"a": {}, "b": {}}, "dependentRequired": {"a": ["b"]}},
    {"type": "object", "properties": {"a": {}}, "dependentSchemas": {"a": {"required": ["z"]}}},
    {"type": "array", "prefixItems": [{"type": "integer"}, {"type": "string"}], "items": False},
    {"type": "array", "items": {"enum": [1, 2, 3]}, "uniqueItems": True, "minItems": 3},
    {"type": "array", "items": {"type": "integer"}, "contains": {"minimum": 100}, "minItems": 2},
    {"allOf": [{"type": "object", "properties": {"a": {"minimum": 3}}}, {"properties": {"a": {"type": "integer", "maximum": 4}}, "required": ["a"]}]},
    {"properties": {"a": {"type": "integer"}}, "required": ["a"], "anyOf": [{"properties": {"a": {"maximum": 0}}}, {"properties": {"a": {"minimum": 10}}}]},
    {"if": {"properties": {"a": {"const": 1}}, "required": ["a"]}, "then": {"required": ["b"]}, "else": False},
    {"$defs": {"a/b": {"type": "integer"}}, "properties": {"x": {"$ref": "#/$defs/a~1b"}}, "required": ["x"], "type": "object"},
    {"$ref": "#/$defs/n", "$defs": {"n": {"type": "object", "properties": {"next": {"anyOf": [{"$ref": "#/$defs/n"}, {"type": "null"}]}}, "required": ["next"]}}},
    {"$defs": {"e": {"oneOf": [{"type": "object", "properties": {"not": {"$ref": "#/$defs/e"}}, "required": ["not"]}, {"type": "integer"}]}}, "$ref": "#/$defs/e"},
    {"oneOf": [{"type": "integer", "multipleOf": 6}, {"type": "string"}], "description": "either"},
    {"properties": {"exclusive": {"type": "number", "exclusiveMaximum": -0.001}}, "required": ["exclusive"]},
]  # fmt: skip


@pytest.mark.parametrize("schema", SCHEMAS, ids=str)
def test_an_instance_of_each_keyword_is_valid(schema: Any) -> None:
    for variant in range(5):
        check(schema, variant)


@pytest.mark.parametrize(
    ("schema", "words"),
    [
        (False, "allows nothing"),
        ({"not": {}}, "'not'"),
        ({"type": "integer", "minimum": 2, "maximum": 1}, "bounds"),
        ({"type": "number", "exclusiveMinimum": 1, "exclusiveMaximum": 1}, "bounds"),
        ({"enum": ["a"], "type": "integer"}, "no value"),
        ({"type": "array", "items": {"enum": [1]}, "uniqueItems": True, "minItems": 2}, "different items"),
        ({"$ref": "#/$defs/missing"}, "not in it"),
        ({"$ref": "https://example.org/schema"}, "not in it"),
        ({"type": "text"}, "no type"),
        ({"type": "string", "pattern": "("}, "matches"),
        ({"type": "string", "minLength": 3, "maxLength": 2}, "minLength"),
        ({"properties": {"a": False}, "required": ["a"]}, "'a'"),
        ({"$defs": {"n": {"type": "object", "properties": {"n": {"$ref": "#/$defs/n"}}, "required": ["n"]}}, "$ref": "#/$defs/n"}, "without end"),
        ({"allOf": [{"type": "integer"}, {"type": "string"}]}, "at once"),
        ({"type": "string", "minLength": 10**12}, "characters"),
        ({"type": "array", "minItems": 10**12}, "items"),
        ({"type": "object", "minProperties": 10**12}, "properties"),
        ({"type": "string", "pattern": "(a{60000}){60000}"}, "matches"),
        ({"type": "object", "minProperties": 2, "propertyNames": {"enum": ["a"]}}, "names"),
    ],
    ids=str,
)  # fmt: skip
def test_a_schema_without_instances_is_an_error_that_says_why(schema: Any, words: str) -> None:
    with pytest.raises(NoInstance, match=words) as error:
        instance(schema)
    assert isinstance(error.value, InvalidRequest)


def schemas() -> st.SearchStrategy[dict[str, Any]]:
    small = st.integers(0, 4)
    numbers = st.fixed_dictionaries(
        {"type": st.sampled_from(["integer", "number"])},
        optional={"minimum": st.integers(-20, 0), "maximum": st.integers(8, 20), "multipleOf": st.integers(1, 8)},
    )
    texts = st.builds(
        lambda least, more: {"type": "string", "minLength": least, "maxLength": least + more}, small, st.integers(0, 9)
    )
    leaves = st.one_of(
        numbers, texts, st.just({"type": "boolean"}), st.just({"type": "null"}),
        st.builds(lambda values: {"enum": values}, st.lists(st.integers() | st.text(), min_size=1, max_size=3)),
    )  # fmt: skip

    def more(inner: st.SearchStrategy[dict[str, Any]]) -> st.SearchStrategy[dict[str, Any]]:
        names = st.sampled_from("abcd")
        return st.one_of(
            st.builds(
                lambda properties, extra: {
                    "type": "object", "properties": properties, "required": list(properties), "additionalProperties": extra
                },
                st.dictionaries(names, inner, max_size=4), st.booleans(),
            ),
            st.builds(
                lambda items, least, more: {"type": "array", "items": items, "minItems": least, "maxItems": least + more},
                inner, small, small,
            ),
            st.builds(lambda branches: {"anyOf": branches}, st.lists(inner, min_size=1, max_size=3)),
            st.builds(lambda one: {"allOf": [one, {"description": "x"}]}, inner),
        )  # fmt: skip

    return st.recursive(leaves, more, max_leaves=8)


@settings(max_examples=150, deadline=None)
@given(schemas(), st.integers(0, 3))
def test_instances_of_any_ordinary_schema_are_valid(schema: dict[str, Any], variant: int) -> None:
    check(schema, variant)


@pytest.mark.parametrize(
    "pattern", [r"^\d{4}-\d{2}$", r"^(?:foo|bar)+[^a-z]?$", r"^\w+@\w+\.(com|org)$", r"[^\d\s]{3,}", r"^(a)b\1$", r"^.{5}$", "x*"]
)  # fmt: skip
def test_a_text_is_found_for_a_pattern(pattern: str) -> None:
    for variant in range(3):
        text = text_matching(pattern, variant=variant)
        assert text is not None and re.search(pattern, text)


def test_the_length_counts_as_well_as_the_pattern() -> None:
    assert len(text_matching("^[a-z]+$", least=7, most=7) or "") == 7
    assert text_matching("^abc$", least=4) is None
    assert decimal.Decimal(text_matching(r"^(?!^[-+.]*$)[+-]?0*\d*\.?\d*$") or "x") is not None
