"""Values that are no list and no object: texts, numbers, dates, Literal, Enum."""

from __future__ import annotations

import datetime
import decimal
import uuid
from collections.abc import Callable, Iterable
from typing import Any

import msgspec

from ..schemas import Schema
from .base import Definitions, Node, Reading, kind_of


class ScalarNode(Node):
    """A value that is no list and no object."""

    def __init__(self, name: str, schema: Schema, convert: Callable[[Any, bool], Any]) -> None:
        """``convert(data, strict)`` gives the value or raises ValueError."""
        self._name, self._schema, self._convert = name, schema, convert

    def schema(self, defs: Definitions) -> Schema:
        return dict(self._schema)

    def read(self, data: Any, at: str, reading: Reading) -> Any:
        try:
            return self._convert(data, reading.strict)
        except (ValueError, TypeError, ArithmeticError):
            return reading.wrong(at, f"expected {self._name}, got {kind_of(data)}")


def _is_number(data: Any) -> bool:
    return isinstance(data, int | float) and not isinstance(data, bool)


def _integer(data: Any, strict: bool) -> int:
    if isinstance(data, float) and data.is_integer():
        return int(data)
    if isinstance(data, str) and not strict:
        return int(data.strip().replace(",", ""))
    if isinstance(data, int) and not isinstance(data, bool):
        return data
    raise ValueError


def _float(data: Any, strict: bool) -> float:
    if isinstance(data, str) and not strict:
        number = float(data.strip().replace(",", ""))
        if number - number != 0:
            raise ValueError
        return number
    if _is_number(data):
        return float(data)
    raise ValueError


def _boolean(data: Any, strict: bool) -> bool:
    if isinstance(data, bool):
        return data
    if isinstance(data, str) and not strict and data.strip().lower() in ("true", "false"):
        return data.strip().lower() == "true"
    raise ValueError


def _text(data: Any, strict: bool) -> str:
    if isinstance(data, str):
        return data
    if _is_number(data) and not strict:
        return str(data)
    raise ValueError


def _nothing(data: Any, strict: bool) -> None:
    if data is not None:
        raise ValueError


def _decimal(data: Any, strict: bool) -> decimal.Decimal:
    if isinstance(data, str) or _is_number(data):
        number = decimal.Decimal(str(data).strip().replace(",", ""))
        if number.is_finite():
            return number
    raise ValueError


def _from_text(convert: Callable[[str], Any]) -> Callable[[Any, bool], Any]:
    def converted(data: Any, strict: bool) -> Any:
        if not isinstance(data, str):
            raise ValueError
        return convert(data if strict else data.strip())

    return converted


def _duration(text: str) -> datetime.timedelta:
    return msgspec.convert(text, datetime.timedelta)


def _string(format: str) -> Schema:
    return {"type": "string", "format": format}


SCALARS: dict[type[Any], Node] = {
    str: ScalarNode("a text", {"type": "string"}, _text),
    bool: ScalarNode("true or false", {"type": "boolean"}, _boolean),
    int: ScalarNode("a whole number", {"type": "integer"}, _integer),
    float: ScalarNode("a number", {"type": "number"}, _float),
    type(None): ScalarNode("null", {"type": "null"}, _nothing),
    decimal.Decimal: ScalarNode("a decimal number", {"type": "string", "pattern": r"^-?\d{1,20}(\.\d{1,20})?$"}, _decimal),
    datetime.datetime: ScalarNode(
        "a date and time like 2025-01-31T14:30:00Z", _string("date-time"), _from_text(datetime.datetime.fromisoformat)
    ),
    datetime.date: ScalarNode("a date like 2025-01-31", _string("date"), _from_text(datetime.date.fromisoformat)),
    datetime.time: ScalarNode("a time like 14:30:00", _string("time"), _from_text(datetime.time.fromisoformat)),
    datetime.timedelta: ScalarNode("a duration like PT1H30M", _string("duration"), _from_text(_duration)),
    uuid.UUID: ScalarNode("a UUID", _string("uuid"), _from_text(uuid.UUID)),
}  # fmt: skip


class AnyNode(Node):
    """Any JSON."""

    def schema(self, defs: Definitions) -> Schema:
        return {}

    def read(self, data: Any, at: str, reading: Reading) -> Any:
        return data


class ChoiceNode(Node):
    """One of some values: a Literal, or an Enum by its members' values.

    Args:
        choices: each value as it stands in JSON, with what it means. Not a dict: 1 and true are two values there.
    """

    def __init__(self, choices: Iterable[tuple[Any, Any]], doc: str | None = "") -> None:
        self.choices = list(choices)
        self._doc = doc

    @property
    def texts(self) -> list[str]:
        """The values that are texts."""
        return [value for value, _ in self.choices if isinstance(value, str)]

    def schema(self, defs: Definitions) -> Schema:
        values = [value for value, _ in self.choices]
        described = {"description": self._doc.strip()} if self._doc else {}
        return {"const": values[0], **described} if len(values) == 1 else {"enum": values, **described}

    def read(self, data: Any, at: str, reading: Reading) -> Any:
        for value, meant in self.choices:
            if type(value) is type(data) and value == data:
                return meant
        if not reading.strict:
            # Another case, blanks around it, a number as a text: one value only may be meant.
            said = str(data).strip().casefold()
            same = [meant for value, meant in self.choices if str(value).strip().casefold() == said]
            if len(same) == 1:
                return same[0]
        options = ", ".join(_json(value) for value, _ in self.choices)
        return reading.wrong(at, f"expected one of {options}, got {kind_of(data)}")


def _json(value: object) -> str:
    return msgspec.json.encode(value).decode()
