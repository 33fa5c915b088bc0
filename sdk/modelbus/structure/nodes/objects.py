"""Objects with members of their own: dataclasses, TypedDicts, NamedTuples, msgspec Structs, pydantic models."""

from __future__ import annotations

import enum
import typing
from collections.abc import Iterable, Mapping
from typing import Any

import msgspec
from modelbus_broker.errors import InvalidRequest

from ..partial import MISSING
from ..schemas import Schema
from .base import Definitions, Node, Reading, checked, kind_of, member


def own_doc(cls: type[Any]) -> bool:
    """A docstring that its author wrote."""
    doc = cls.__doc__ or ""
    made = doc.startswith(f"{cls.__name__}(") or (
        issubclass(cls, enum.Enum) and doc in ("An enumeration.", enum.Enum.__doc__)
    )
    return bool(doc) and not made and doc != next((base.__doc__ for base in cls.__mro__[1:] if base.__doc__), None)


def is_pydantic(cls: type[Any]) -> bool:
    # Without importing pydantic where nobody uses it.
    return hasattr(cls, "__pydantic_validator__") and hasattr(cls, "__pydantic_core_schema__")


class ObjectNode(Node):
    """A dataclass, a TypedDict or a NamedTuple."""

    def __init__(self, cls: type[Any]) -> None:
        self._cls = cls
        self.fields: list[tuple[str, Node, bool]] = []  #: name, node, required

    def schema(self, defs: Definitions) -> Schema:
        name = self._cls.__name__
        if name not in defs:
            described = {"description": str(self._cls.__doc__).strip()} if own_doc(self._cls) else {}
            own: Schema = {"title": name, **described, "type": "object"}
            defs[name], defs.owners[name] = own, self._cls
            own["properties"] = {field: node.schema(defs) for field, node, _ in self.fields}
            own["required"] = [field for field, _, required in self.fields if required]
            own["additionalProperties"] = False
        elif defs.owners.get(name) is not self._cls:
            raise InvalidRequest(f"two classes of an answer have the same name {name}: rename one of them")
        return {"$ref": f"#/$defs/{name}"}

    def read(self, data: Any, at: str, reading: Reading) -> Any:
        if not isinstance(data, dict):
            return reading.wrong(
                at, f"expected an object with {', '.join(n for n, *_ in self.fields)}, got {kind_of(data)}"
            )
        values: dict[str, Any] = {}
        before = len(reading.problems)
        for name, node, required in self.fields:
            if name in data:
                values[name] = node.read(data[name], member(at, name), reading)
            elif required:
                reading.wrong(member(at, name), "it is missing")
        unknown = data.keys() - {name for name, *_ in self.fields}
        if unknown and reading.strict:
            reading.wrong(at, f"it has no member {', '.join(sorted(unknown))}")
        if len(reading.problems) > before:
            return MISSING
        if typing.is_typeddict(self._cls):
            return values
        return checked(lambda: self._cls(**values), at, reading)


class StructNode(Node):
    """A msgspec Struct: msgspec itself reads it, pydantic models inside included."""

    def __init__(self, cls: Any) -> None:
        self._cls = cls

    def schema(self, defs: Definitions) -> Schema:
        try:
            (own,), found = msgspec.json.schema_components(
                [self._cls], schema_hook=_hooked_schema, ref_template="#/$defs/{name}"
            )
        except TypeError as error:
            raise _no_schema(self._cls, error) from error
        _merge(defs, found)
        return own

    def read(self, data: Any, at: str, reading: Reading) -> Any:
        try:
            return msgspec.convert(data, self._cls, strict=reading.strict, dec_hook=_hooked_value)
        except msgspec.ValidationError as error:
            words, _, path = str(error).partition(" - at `$")
            inner = path.rstrip("`")
            place = f"{at}{inner}" if at else inner.lstrip(".")
            return reading.wrong(place, words[0].lower() + words[1:])
        except (ValueError, TypeError) as error:
            return reading.wrong(at, str(error))


def _hooked_schema(cls: type[Any]) -> Schema:
    if is_pydantic(cls):
        from pydantic import TypeAdapter

        return TypeAdapter(cls).json_schema()
    raise NotImplementedError


def _hooked_value(cls: type[Any], data: Any) -> Any:
    if is_pydantic(cls):
        from pydantic import TypeAdapter, ValidationError

        try:
            return TypeAdapter(cls).validate_json(msgspec.json.encode(data))
        except ValidationError as error:
            words = [f"{place.lstrip('.')}: {words}" if place else words for place, words in _pydantic_words(error)]
            raise ValueError("; ".join(words)) from None
    raise NotImplementedError


class PydanticNode(Node):
    """A pydantic model or pydantic dataclass: pydantic itself reads it."""

    def __init__(self, cls: Any) -> None:
        from pydantic import TypeAdapter

        self._cls = cls
        self._adapter: TypeAdapter[Any] = TypeAdapter(cls)

    def schema(self, defs: Definitions) -> Schema:
        from pydantic.errors import PydanticUserError

        try:
            own = self._adapter.json_schema(ref_template="#/$defs/{model}")
        except PydanticUserError as error:  # it has a function among its fields, for instance
            raise _no_schema(self._cls, error) from error
        _merge(defs, own.pop("$defs", {}))
        return own

    def read(self, data: Any, at: str, reading: Reading) -> Any:
        from pydantic import ValidationError

        try:
            # As JSON, so that dates and decimals are read from texts and numbers.
            return self._adapter.validate_json(msgspec.json.encode(data))
        except ValidationError as error:
            for place, words in _pydantic_words(error):
                reading.wrong(f"{at}{place}" if at or not place.startswith(".") else place[1:], words)
            return MISSING


def _pydantic_words(error: Any) -> Iterable[tuple[str, str]]:
    """The places, as ``.items[0].price``, and what is wrong there."""
    for problem in error.errors(include_url=False, include_context=False):
        place = "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in problem["loc"])
        words = problem["msg"].removeprefix("Value error, ").removeprefix("Assertion failed, ")
        own = problem["type"] in ("value_error", "assertion_error")  # words of the user's validator
        yield place, words if own else words[:1].lower() + words[1:]


def _no_schema(cls: Any, error: Exception) -> InvalidRequest:
    name = getattr(cls, "__qualname__", repr(cls))
    return InvalidRequest(f"an answer cannot become {name}: {str(error).splitlines()[0]}")


def _merge(defs: Definitions, found: Mapping[str, Schema]) -> None:
    for name, schema in found.items():
        if defs.setdefault(name, schema) != schema:
            raise InvalidRequest(f"two classes of an answer have the same name {name}: rename one of them")
