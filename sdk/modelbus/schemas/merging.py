"""Schemas that say together what several say: ``allOf``, references with words beside them, branches within a whole."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

from modelbus_broker.errors import InvalidRequest


class NoInstance(InvalidRequest):
    """Nothing satisfies this schema, or nothing that can be made without solving it."""


def both(one: Any, other: Any) -> Any:
    """A schema that says what two say."""
    if isinstance(one, bool) or isinstance(other, bool):
        if one is False or other is False:
            return False
        return other if one is True else one
    merged = dict(one)
    for key, part in other.items():
        if key not in merged or merged[key] == part:
            merged[key] = part
        elif key in ("properties", "patternProperties", "$defs", "dependentSchemas"):
            merged[key] = {
                **merged[key],
                **{
                    name: both(merged[key][name], inner) if name in merged[key] else inner
                    for name, inner in part.items()
                },
            }
        elif key == "required":
            merged[key] = [*merged[key], *(name for name in part if name not in merged[key])]
        elif key in ("minimum", "exclusiveMinimum", "minLength", "minItems", "minProperties"):
            merged[key] = max(merged[key], part)
        elif key in ("maximum", "exclusiveMaximum", "maxLength", "maxItems", "maxProperties"):
            merged[key] = min(merged[key], part)
        elif key == "enum":
            merged[key] = [item for item in merged[key] if item in part]
        elif key == "type":
            merged[key] = _common_type(merged[key], part)
        elif key in ("items", "additionalProperties", "contains", "propertyNames"):
            merged[key] = both(merged[key], part)
        elif key == "allOf":
            merged[key] = [*merged[key], *part]
        elif key == "multipleOf":
            merged[key] = _common_multiple(merged[key], part)
        elif key in ("anyOf", "oneOf", "$ref", "pattern", "not", "const", "format", "if"):
            merged["allOf"] = [*merged.get("allOf", ()), {key: part}]
    return merged


def _common_type(one: Any, other: Any) -> Any:
    mine, theirs = ([kind] if isinstance(kind, str) else kind for kind in (one, other))
    common = [kind for kind in mine if kind in theirs or (kind == "integer" and "number" in theirs)]
    common += [kind for kind in theirs if kind == "integer" and "number" in mine and kind not in common]
    if not common:
        raise NoInstance(f"the schema wants {one} and {other} at once")
    return common[0] if len(common) == 1 else common


def _common_multiple(one: float, other: float) -> float:
    first, second = Fraction(str(one)), Fraction(str(other))
    common = Fraction(
        math.lcm(first.numerator * second.denominator, second.numerator * first.denominator),
        first.denominator * second.denominator,
    )
    return int(common) if common.denominator == 1 else float(common)
