"""Metadata of other frameworks as attributes of chunks: what a filter can compare stands by its name, the rest as JSON. Pure."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from modelbus_broker.attributes import MAX_STRING_CHARS, name_problem, value_problem
from modelbus_broker.messages.search import Value

#: What is not an attribute stands in ``json-0``, ``json-1``, ...
_PART = re.compile(r"json-\d+")


def attributes_of(metadata: Mapping[str, Any], more: Mapping[str, Any] | None = None) -> dict[str, Value]:
    """Attributes that :func:`metadata_of` makes the same metadata of.

    Args:
        more: what comes back with it and is nothing to compare.

    Raises:
        TypeError: a value is nothing that JSON has.
    """
    fit = {name: value for name, value in metadata.items() if _fits(name, value)}
    rest = {name: value for name, value in metadata.items() if name not in fit} | dict(more or {})
    if not rest:
        return fit
    text = json.dumps(rest, ensure_ascii=False)
    parts = [text[start : start + MAX_STRING_CHARS] for start in range(0, len(text), MAX_STRING_CHARS)]
    return fit | {f"json-{number}": part for number, part in enumerate(parts)}


def metadata_of(attributes: Mapping[str, Value]) -> dict[str, Any]:
    """What :func:`attributes_of` was given, both parts together."""
    metadata: dict[str, Any] = {name: value for name, value in attributes.items() if not _PART.fullmatch(name)}
    parts = sorted((name for name in attributes if _PART.fullmatch(name)), key=lambda name: int(name[5:]))
    if parts:
        metadata |= json.loads("".join(str(attributes[name]) for name in parts))
    return metadata


def _fits(name: str, value: Any) -> bool:
    if name_problem(name) or _PART.fullmatch(name):
        return False
    return isinstance(value, str | bool | int | float) and not value_problem(name, value)
