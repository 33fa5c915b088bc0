"""What ``Annotated`` adds: descriptions, bounds and validators."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from ..partial import MISSING
from ..schemas import Schema
from .base import Definitions, Node, Reading, checked, kind_of


class AnnotatedNode(Node):
    """A node with a description, bounds or validators."""

    def __init__(self, node: Node, extra: Schema, checks: Iterable[Callable[[Any], Any]]) -> None:
        self._node, self._extra, self._checks = node, extra, list(checks)

    def schema(self, defs: Definitions) -> Schema:
        own = self._node.schema(defs)
        extra = dict(self._extra)
        for limit in ("min", "max"):
            length = extra.pop(f"{limit}Length", None)
            if length is not None:
                extra[f"{limit}Items" if own.get("type") == "array" else f"{limit}Length"] = length
        return {**own, **extra}

    def read(self, data: Any, at: str, reading: Reading) -> Any:
        value = self._node.read(data, at, reading)
        if value is MISSING:
            return MISSING
        for words in _out_of_bounds(value, self._extra):
            return reading.wrong(at, words)
        for check in self._checks:
            value = checked(lambda check=check, value=value: _kept(check, value), at, reading)  # type: ignore[misc]
            if value is MISSING:
                break
        return value


def _kept(check: Callable[[Any], Any], value: Any) -> Any:
    """What a validator returns takes the place of the value; one that returns nothing only looks at it."""
    changed = check(value)
    return value if changed is None else changed


#: Attributes of msgspec.Meta, of annotated_types and of pydantic's Field, and the keywords that they mean.
_BOUNDS = {
    "ge": "minimum", "gt": "exclusiveMinimum", "le": "maximum", "lt": "exclusiveMaximum", "multiple_of": "multipleOf",
    "min_length": "minLength", "max_length": "maxLength", "pattern": "pattern", "description": "description",
    "examples": "examples",
}  # fmt: skip


def annotated(node: Node, metadata: Iterable[Any]) -> Node:
    extra: Schema = {}
    checks: list[Callable[[Any], Any]] = []
    for item in metadata:
        if isinstance(item, str):
            extra["description"] = item
            continue
        for source in (item, *(getattr(item, "metadata", None) or ())):
            for name, keyword in _BOUNDS.items():
                value = getattr(source, name, None)
                if value is not None and not callable(value):
                    extra[keyword] = value
        if callable(func := getattr(item, "func", None)):
            checks.append(func)  # pydantic's AfterValidator, annotated_types.Predicate
        elif callable(item) and not isinstance(item, type):
            checks.append(item)
    return AnnotatedNode(node, extra, checks) if extra or checks else node


def _out_of_bounds(value: Any, bounds: Mapping[str, Any]) -> Iterable[str]:
    """Raises nothing: what has no order or no length is not compared."""
    compare: dict[str, tuple[Callable[[Any], bool], str]] = {
        "minimum": (lambda limit: value >= limit, "at least"),
        "exclusiveMinimum": (lambda limit: value > limit, "more than"),
        "maximum": (lambda limit: value <= limit, "at most"),
        "exclusiveMaximum": (lambda limit: value < limit, "less than"),
        "multipleOf": (lambda limit: value % limit == 0, "a multiple of"),
        "minLength": (lambda limit: len(value) >= limit, "of at least this length:"),
        "maxLength": (lambda limit: len(value) <= limit, "of at most this length:"),
    }
    for keyword, (fits, words) in compare.items():
        if keyword in bounds:
            try:
                right = fits(bounds[keyword])
            except TypeError:
                continue
            if not right:
                yield f"expected something {words} {bounds[keyword]}, got {kind_of(value)}"
    if "pattern" in bounds and isinstance(value, str):
        if not re.search(bounds["pattern"], value):
            yield f"expected a text that matches {bounds['pattern']}, got {kind_of(value)}"
