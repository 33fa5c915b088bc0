"""Filters and sorts as SQL on the tables ``chunks`` and ``attributes``. Pure; every value is a parameter."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import msgspec
from modelbus_broker.messages.search import Filter, Sort, Value, ValueKind

from ..checks import BUILT_IN, kind_of

Sql = tuple[str, list[Any]]

_COLUMNS = {"$id": "id", "$file_id": "file_id", "$ordinal": "ordinal"}
_TYPES: dict[ValueKind, str] = {"string": "'text'", "number": "'integer', 'real'", "boolean": "'true', 'false'"}
_SIGNS = {"gt": ">", "gte": ">=", "lt": "<", "lte": "<="}


def where(condition: Filter) -> Sql:
    """An expression that is 1 or 0, never null."""
    match condition.type:
        case "and" | "or":
            parts = [where(item) for item in condition.filters]
            joined = f" {condition.type.upper()} ".join(text for text, _ in parts)
            return f"({joined})", [value for _, values in parts for value in values]
        case "not":
            return _negated(where(condition.filters[0]))
        case "ne" | "nin":
            return _negated(_one_of(condition.key, _values(condition)))
        case "eq" | "in":
            return _one_of(condition.key, _values(condition))
        case _:
            (value,) = _values(condition)
            return _compared(condition.key, kind_of(value), lambda of: (f"{of} {_SIGNS[condition.type]} ?", [value]))


def order_by(sort: Sequence[Sort]) -> Sql:
    """Numbers, then texts, then truth values, then chunks without the attribute; what is equal by id."""
    terms: list[str] = []
    values: list[Any] = []
    for item in sort:
        direction = "DESC" if item.descending else "ASC"
        if item.key in _COLUMNS:
            terms.append(f"{_COLUMNS[item.key]} {direction}")
            continue
        kinds: tuple[ValueKind, ...] = ("number", "string", "boolean")
        for kind in kinds:
            value = f"CASE WHEN json_type(attributes, ?) IN ({_TYPES[kind]}) THEN json_extract(attributes, ?) END"
            terms += [f"({value}) IS NULL", f"({value}) {direction}"]
            values += [_path(item.key)] * 4
    return ", ".join([*terms, "id"]), values


def _negated(sql: Sql) -> Sql:
    return f"(NOT {sql[0]})", sql[1]


def _values(condition: Filter) -> list[Value]:
    value = condition.value
    assert value is not None
    return value if isinstance(value, list) else [value]


def _one_of(key: str, values: list[Value]) -> Sql:
    """Whether the key's value is among these: for each kind by itself, since SQLite's true is 1."""
    parts: list[Sql] = []
    for kind in dict.fromkeys(map(kind_of, values)):
        wanted = [value for value in values if kind_of(value) == kind]
        parts.append(_compared(key, kind, partial(_among, wanted)))
    if not parts:
        return "0", []
    return "(" + " OR ".join(text for text, _ in parts) + ")", [value for _, found in parts for value in found]


def _among(wanted: list[Value], of: str) -> Sql:
    if len(wanted) == 1:
        return f"{of} = ?", [wanted[0]]
    return f"{of} IN (SELECT value FROM json_each(?))", [msgspec.json.encode(wanted).decode()]


def _compared(key: str, kind: ValueKind, compare: Callable[[str], Sql]) -> Sql:
    if key in BUILT_IN:
        text, values = compare(_COLUMNS[key])
        return f"({text})", values
    # By the index on names and values: reading each chunk's JSON took fifty times as long.
    text, values = compare("value")
    return f"(rid IN (SELECT rid FROM attributes WHERE name = ? AND kind = ? AND {text}))", [key, kind, *values]


def _path(key: str) -> str:
    # Names of attributes have no quotes and no backslashes (see ``checks``).
    return f'$."{key}"'
