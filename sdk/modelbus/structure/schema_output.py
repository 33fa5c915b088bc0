"""A JSON Schema that somebody else made as the form of an answer: ``response_format`` of the OpenAI API."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from modelbus_broker.errors import InvalidRequest, OutputError
from modelbus_broker.messages import Ladder

from .nodes.scalars import AnyNode
from .output_types import OutputType
from .schemas import Schema, coerced, plain, schema_reader


class SchemaOutput(OutputType[Any]):
    """Answers that fit a schema, as decoded JSON."""

    def __init__(self, schema: Mapping[str, Any], *, name: str = "answer", param: str = "schema") -> None:
        """
        Raises:
            InvalidRequest: the schema is wrong; ``param`` names its field.
        """
        self._reader = schema_reader(schema, param)
        self._given = dict(schema)
        super().__init__(Any, AnyNode(), "any")
        self.schema = plain(self._given)
        self.name = name

    def response_format(self, ladder: Ladder) -> dict[str, Any]:
        # As it was given: whoever made it meant it so.
        return {"type": "json_schema", "json_schema": {"name": self.name, "schema": self._given}}

    def examples(self, count: int) -> list[str]:
        # An example of "any object" would be an empty one, and models copy.
        says_nothing = self.schema.get("type") == "object" and not self.schema.keys() & {
            "properties",
            "$ref",
            "anyOf",
            "oneOf",
            "allOf",
        }
        return [] if says_nothing else super().examples(count)

    def _shown(self) -> Schema:
        return {key: value for key, value in super()._shown().items() if key != "$schema"}

    def accepts(self, data: Any) -> bool:
        return not self._reader.problems(coerced(self.schema, data))

    def _validated(self, data: Any, raw: str) -> Any:
        if self._reader.problems(data):
            data = coerced(self.schema, data)
        problems = self._reader.problems(data)
        if problems:
            raise OutputError(f"the answer does not fit the schema: {'; '.join(problems)}", raw=raw, problems=problems)
        return data


def asked_schema(response_format: Mapping[str, Any] | None) -> SchemaOutput | None:
    """The form that an OpenAI ``response_format`` asks for; None: none.

    Raises:
        InvalidRequest: it makes no sense, or its schema is wrong.
    """
    kind = (response_format or {}).get("type", "text")
    if response_format is None or kind == "text":
        return None
    if kind == "json_object":
        return SchemaOutput({"type": "object"})
    inner = response_format.get("json_schema")
    schema = inner.get("schema") if isinstance(inner, Mapping) else None
    if kind != "json_schema" or not isinstance(inner, Mapping) or not isinstance(schema, Mapping):
        raise InvalidRequest(
            "Missing required parameter: 'response_format.json_schema.schema'.", param="response_format"
        )
    return SchemaOutput(schema, name=str(inner.get("name") or "answer"), param="response_format")
