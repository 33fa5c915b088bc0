"""Generated examples for prompts: small valid instances of a JSON Schema, the same ones every time. Pure."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from modelbus_broker.errors import InvalidRequest

from ..schemas import instance
from .schemas import Schema, mapped, parts, schema_reader

#: An example is small: a schema that asks for more gets none.
_MOST = {"minLength": 200, "minItems": 10, "minProperties": 10}
_LONGEST = 1500
_REPEATED = re.compile(r"\{(\d+)")
_SUCH_AS = re.compile(r"(?:such as|e\.g\.|for example|like) [\"'`]?([^\s,;()\"'`]+)", re.IGNORECASE)


def instances(schema: Mapping[str, Any], count: int = 2) -> list[Any]:
    """At most ``count`` different valid instances of a schema that is right, of those that are small.

    Where a description names an example ("a code, such as USD"), that is taken.
    """
    if any(part.get(name, 0) > most for part in parts(schema) for name, most in _MOST.items()):
        return []
    if any(int(times) > 200 for part in parts(schema) for times in _REPEATED.findall(str(part.get("pattern", "")))):
        return []
    reader, hinted = schema_reader(schema), mapped(schema, _hinted)
    found: list[Any] = []
    for variant in range(3 * count):
        if len(found) == count:
            break
        try:
            value = instance(hinted, variant=variant)
        except (InvalidRequest, RecursionError):
            continue
        if value not in found and len(str(value)) <= _LONGEST and not reader.problems(value):
            found.append(value)
    return found


def _hinted(part: Schema) -> Schema:
    named = _SUCH_AS.findall(str(part.get("description", ""))) if part.get("type") == "string" else []
    return {"examples": [named[0].rstrip(".")], **part} if named and "format" not in part else part
