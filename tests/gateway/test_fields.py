"""The table of fields is complete: it names what the OpenAI API names, and what the structs decode."""

from __future__ import annotations

import typing
from pathlib import Path

import msgspec
import openai.types.chat.completion_create_params as chat_params
import openai.types.completion_create_params as completion_params
import openai.types.embedding_create_params as embedding_params
import pytest
from modelbus_broker.messages import Capabilities
from modelbus_gateway.fields import FIELDS, table
from modelbus_gateway.openai_types import ChatRequest, CompletionRequest, EmbeddingRequest

ROOT = Path(__file__).parents[2]


def fields_of(letter: str) -> set[str]:
    return {field.name for field in FIELDS if letter in field.routes}


def names_of(*types: type) -> set[str]:
    return {name for kind in types for name in kind.__annotations__}


@pytest.mark.parametrize(
    ("letter", "api"),
    [
        ("c", names_of(*typing.get_args(chat_params.CompletionCreateParams), chat_params.CompletionCreateParamsBase)),
        ("t", names_of(*typing.get_args(completion_params.CompletionCreateParams), completion_params.CompletionCreateParamsBase)),
        ("e", names_of(embedding_params.EmbeddingCreateParams)),
    ],
    ids=["chat", "completions", "embeddings"],
)  # fmt: skip
def test_every_field_of_the_openai_api_has_a_row(letter: str, api: set[str]) -> None:
    assert len(api) > 4
    assert api - fields_of(letter) == set()


@pytest.mark.parametrize(
    ("letter", "struct"), [("c", ChatRequest), ("t", CompletionRequest), ("e", EmbeddingRequest)], ids=["c", "t", "e"]
)
def test_every_decoded_field_has_a_row_and_every_row_is_decoded(letter: str, struct: type[msgspec.Struct]) -> None:
    assert fields_of(letter) == set(struct.__struct_fields__)


def test_rows_name_real_capabilities() -> None:
    named = {name for field in FIELDS for name in field.capability.split(", ") if name}
    assert named <= set(Capabilities.__struct_fields__)


def test_what_is_refused_or_has_no_effect_says_why() -> None:
    assert all(field.note for field in FIELDS if field.treatment in ("refused", "no effect"))


def test_the_documentation_shows_the_table() -> None:
    assert table() in (ROOT / "docs" / "gateway.md").read_text()
