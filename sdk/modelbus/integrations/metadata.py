"""Metadata of other frameworks as attributes of chunks: what a filter can compare stands by its name, the rest as JSON. Pure."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from modelbus_broker.messages.search import Value

#: Limits of an attribute, as ``docs/search.md`` lists them.
MAX_NAME_CHARS, MAX_STRING_CHARS, MAX_INTEGER = 64, 4096, 2**53
#: What is not an attribute stands in ``json-0``, ``json-1``, ...
_PART = re.compile(r"json-\d+")
_BAD_IN_NAME = re.compile(r'["\\.*$\x00-\x1f\x7f]')


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
    if not name or len(name) > MAX_NAME_CHARS or _BAD_IN_NAME.search(name) or _PART.fullmatch(name):
        return False
    if isinstance(value, str):
        return len(value) <= MAX_STRING_CHARS and "\0" not in value
    if isinstance(value, bool | float):
        return value == value and abs(value) != float("inf")
    return isinstance(value, int) and abs(value) <= MAX_INTEGER
