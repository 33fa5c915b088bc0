"""Lists, tuples, dicts and unions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from ..partial import MISSING
from ..schemas import Schema
from .base import Definitions, Node, Reading, kind_of, member
from .scalars import SCALARS


class ListNode(Node):
    """A list of one kind of item; it becomes a list, a tuple or a set."""

    def __init__(self, item: Node, make: Callable[[list[Any]], Any]) -> None:
        self.item, self._make = item, make

    def schema(self, defs: Definitions) -> Schema:
        # A set asks for no uniqueItems: grammars and OpenAI's strict mode have no such word, and what is said twice is
        # in a set once.
        return {"type": "array", "items": self.item.schema(defs)}

    def read(self, data: Any, at: str, reading: Reading) -> Any:
        if not isinstance(data, list):
            return reading.wrong(at, f"expected a list, got {kind_of(data)}")
        items = [self.item.read(item, f"{at}[{index}]", reading) for index, item in enumerate(data)]
        if any(item is MISSING for item in items):
            return MISSING
        try:
            return self._make(items)
        except TypeError:
            return reading.wrong(at, "its items cannot be members of a set")


class TupleNode(Node):
    """A list of so many items, each of its own kind."""

    def __init__(self, items: Sequence[Node]) -> None:
        self._items = items

    def schema(self, defs: Definitions) -> Schema:
        count = len(self._items)
        items = {"prefixItems": [item.schema(defs) for item in self._items]} if count else {}
        return {"type": "array", **items, "items": False, "minItems": count, "maxItems": count}

    def read(self, data: Any, at: str, reading: Reading) -> Any:
        if not isinstance(data, list) or len(data) != len(self._items):
            got = f"one of {len(data)}" if isinstance(data, list) else kind_of(data)
            return reading.wrong(at, f"expected a list of {len(self._items)} items, got {got}")
        items = [
            node.read(item, f"{at}[{n}]", reading) for n, (node, item) in enumerate(zip(self._items, data, strict=True))
        ]
        return MISSING if any(item is MISSING for item in items) else tuple(items)


class DictNode(Node):
    """An object with any names."""

    def __init__(self, key: Node, value: Node) -> None:
        self._key, self._value = key, value

    def schema(self, defs: Definitions) -> Schema:
        key = self._key.schema(defs)
        if key.get("type") == "integer":
            key = {"pattern": r"^-?\d{1,15}$"}  # names are texts
        names = {"propertyNames": key} if key.keys() & {"enum", "const", "pattern", "format"} else {}
        return {"type": "object", **names, "additionalProperties": self._value.schema(defs)}

    def read(self, data: Any, at: str, reading: Reading) -> Any:
        if not isinstance(data, dict):
            return reading.wrong(at, f"expected an object, got {kind_of(data)}")
        # The names of JSON are texts, whatever they are read into.
        names = Reading()
        keys = [self._key.read(name, member(at, name), names) for name in data]
        reading.problems += names.problems
        values = [self._value.read(value, member(at, name), reading) for name, value in data.items()]
        if any(found is MISSING for found in (*keys, *values)):
            return MISSING
        return dict(zip(keys, values, strict=True))


class UnionNode(Node):
    """One of several kinds: the first that fits as it is, else the first that fits after conversion."""

    def __init__(self, options: Sequence[Node]) -> None:
        self.options = options

    def schema(self, defs: Definitions) -> Schema:
        return {"anyOf": [option.schema(defs) for option in self.options]}

    def read(self, data: Any, at: str, reading: Reading) -> Any:
        closest: list[str] | None = None
        for strict in (True, False) if not reading.strict else (True,):
            for option in self.options:
                tried = Reading(strict=strict)
                value = option.read(data, at, tried)
                if value is not MISSING and not tried.problems:
                    return value
                if closest is None or _distance(tried.problems, at) < _distance(closest, at):
                    closest = tried.problems
        assert closest is not None
        if len(self.options) == 2 and any(option is SCALARS[type(None)] for option in self.options):
            reading.problems += closest
        else:
            reading.wrong(
                at, f"fits none of the {len(self.options)} forms it may have; of the closest: {'; '.join(closest[:3])}"
            )
        return MISSING


def _distance(problems: Sequence[str], at: str) -> tuple[bool, int]:
    """What is wrong in a member is closer than what is wrong as a whole."""
    return any(problem.startswith(f"{at or 'the answer'}: expected") for problem in problems), len(problems)
