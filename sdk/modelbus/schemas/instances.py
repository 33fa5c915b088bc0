"""A valid instance of a JSON schema, for examples in prompts and for models that tests use."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from fractions import Fraction
from typing import Any

from .merging import NoInstance, both
from .patterns import text_matching

#: Bounds of what is made at all: a schema may ask for more than a process has memory.
_LONGEST_TEXT, _MOST_ITEMS, _MOST_PARTS = 100_000, 10_000, 100_000
#: How often a schema may stand inside itself before what is optional is left out.
_MOST_NESTED = 2
_ITEMS = 2
#: By format; ``{n}`` is 1 for the first variant.
_FORMATS = {
    "date-time": "2026-01-{n:02}T12:00:00Z", "date": "2026-01-{n:02}", "time": "12:{n:02}:00Z", "duration": "PT{n}H",
    "email": "user{n}@example.org", "idn-email": "user{n}@example.org", "hostname": "host{n}.example.org",
    "idn-hostname": "host{n}.example.org", "ipv4": "192.0.2.{n}", "ipv6": "2001:db8::{n}",
    "uri": "https://example.org/{n}", "uri-reference": "/{n}", "iri": "https://example.org/{n}", "iri-reference": "/{n}",
    "uri-template": "/{n}", "uuid": "00000000-0000-4000-8000-{n:012}", "json-pointer": "/{n}",
    "relative-json-pointer": "{n}", "regex": "a{n}", "binary": "data{n}", "byte": "ZGF0YQ==", "base64": "ZGF0YQ==",
}  # fmt: skip
_OBJECT = ("properties", "required", "additionalProperties", "minProperties", "patternProperties")
_ARRAY = ("items", "prefixItems", "minItems", "maxItems", "uniqueItems", "contains")
_STRING = ("pattern", "format", "minLength", "maxLength")
_NUMBER = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf")


def instance(schema: Mapping[str, Any] | bool, *, variant: int = 0) -> Any:
    """A value that is valid against a schema; the same one each time.

    Optional properties are there, lists have two items where they may, and where a schema offers a choice (``enum``,
    ``anyOf``) other variants take other ones; null is taken last. Understood are the keywords of JSON Schema 2020-12,
    references within the schema, and no ``not``.

    Args:
        variant: which of the many; 0, 1, 2, ... give different ones where the schema leaves room.

    Raises:
        NoInstance: the schema contradicts itself, or says what cannot be planned for (``not``, a pattern with
            conditions).
    """
    try:
        return _Maker(schema).value(schema, variant, "")
    except RecursionError:
        raise NoInstance("the schema is too deep") from None


class _TooDeep(NoInstance):
    """A schema inside itself, once more than is wanted."""


class _Maker:
    def __init__(self, root: Mapping[str, Any] | bool) -> None:
        self._root = root
        self._inside: list[str] = []  # the references that are being followed
        self._parts = 0

    def value(self, schema: Any, variant: int, name: str) -> Any:
        """
        Args:
            name: of the property that it is for, "" for none.
        """
        self._parts += 1
        if self._parts > _MOST_PARTS:
            raise NoInstance("the schema asks for too much")
        if isinstance(schema, bool):
            if not schema:
                raise NoInstance(f"the schema allows nothing{_at(name)}")
            return _words(name, variant)
        if not isinstance(schema, Mapping):
            raise NoInstance(f"a schema is an object, not {schema!r}")
        if "$ref" in schema:
            return self._followed(schema, variant, name)
        if "not" in schema:
            raise NoInstance(f"what a schema says with 'not' cannot be planned for{_at(name)}")
        rest = {key: part for key, part in schema.items() if key not in ("allOf", "if", "then", "else")}
        if "allOf" in schema or "if" in schema:
            parts = [*schema.get("allOf", ())]
            parts += [schema[key] for key in ("if", "then") if key in schema]
            for part in parts:
                rest = both(rest, self._resolved(part))
            return self.value(rest, variant, name)
        if "const" in schema:
            return schema["const"]
        if "enum" in schema:
            allowed = [item for item in schema["enum"] if _has_type(item, schema.get("type"))]
            if not allowed:
                raise NoInstance(f"the schema allows no value{_at(name)}")
            return allowed[variant % len(allowed)]
        for key in ("anyOf", "oneOf"):
            if key in schema:
                outer = {other: part for other, part in schema.items() if other != key}
                branches = [both(outer, self._resolved(branch)) for branch in schema[key]]
                return self._first(branches, variant, name)
        kind = schema.get("type") or _implied_type(schema)
        if isinstance(kind, list):
            return self._first([{**schema, "type": one} for one in kind], variant, name)
        makers: dict[str, Callable[[Mapping[str, Any], int, str], Any]] = {
            "object": self._object, "array": self._array, "string": _string, "integer": _number, "number": _number,
            "boolean": lambda *_: variant % 2 == 0, "null": lambda *_: None,
        }  # fmt: skip
        if kind not in makers:
            raise NoInstance(f"there is no type {kind!r} in JSON Schema{_at(name)}")
        return makers[kind]({**schema, "type": kind}, variant, name)

    def _first(self, branches: list[dict[str, Any]], variant: int, name: str) -> Any:
        """Of the first branch that has an instance; which is the first one depends on the variant."""
        real = [branch for branch in branches if branch.get("type") != "null"]
        turn = variant % len(real) if real else 0
        order = [*real[turn:], *real[:turn], *(branch for branch in branches if branch.get("type") == "null")]
        failure: NoInstance = NoInstance(f"the schema offers nothing to choose from{_at(name)}")
        for branch in order:
            try:
                return self.value(branch, variant, name)
            except NoInstance as error:
                failure = error
        raise failure

    def _followed(self, schema: Mapping[str, Any], variant: int, name: str) -> Any:
        reference = schema["$ref"]
        if self._inside.count(reference) >= _MOST_NESTED:
            raise _TooDeep(f"the schema contains itself without end{_at(name)}")
        self._inside.append(reference)
        try:
            rest = {key: part for key, part in schema.items() if key != "$ref"}
            return self.value(both(rest, self._target(reference)), variant, name)
        finally:
            self._inside.pop()

    def _resolved(self, schema: Any) -> Any:
        """A part of a schema as it can be merged: a reference is looked up unless that would go round in circles."""
        if isinstance(schema, Mapping) and set(schema) == {"$ref"} and schema["$ref"] not in self._inside:
            target = self._target(schema["$ref"])
            # What contains itself keeps the reference, which counts how deep it is.
            return schema if _mentions(target, schema["$ref"]) else target
        return schema

    def _target(self, reference: str) -> Any:
        if not reference.startswith("#"):
            raise NoInstance(f"the schema refers to {reference!r}, which is not in it")
        found: Any = self._root
        for part in reference[1:].split("/")[1:]:
            key = part.replace("~1", "/").replace("~0", "~")
            try:
                found = found[int(key)] if isinstance(found, list) else found[key]
            except (KeyError, IndexError, ValueError, TypeError):
                raise NoInstance(f"the schema refers to {reference!r}, which is not in it") from None
        return found

    def _object(self, schema: Mapping[str, Any], variant: int, name: str) -> dict[str, Any]:
        properties = schema.get("properties", {})
        others = schema.get("additionalProperties", True)
        patterns = schema.get("patternProperties", {})
        required = {*schema.get("required", ())}
        for trigger, needed in schema.get("dependentRequired", {}).items():
            required |= {*needed} if trigger in required else set()
        most = schema.get("maxProperties")
        made: dict[str, Any] = {}
        for key in [*properties, *(key for key in schema.get("required", ()) if key not in properties)]:
            if key not in required and most is not None and len(required | made.keys()) >= most:
                continue
            part = properties.get(key, others)
            for pattern, inner in patterns.items():
                if _found(pattern, key):
                    part = both(part, inner)
            try:
                made[key] = self.value(part, variant, key)
            except NoInstance:
                if key in required:
                    raise
        for trigger, inner in schema.get("dependentSchemas", {}).items():
            if trigger in made:
                rest = {key: part for key, part in schema.items() if key != "dependentSchemas"}
                return self._object(both(rest, self._resolved(inner)), variant, name)
        number, least = 0, schema.get("minProperties", 0)
        if not made and isinstance(others, Mapping) and most != 0:
            least = max(least, 1)  # a dictionary with an entry says more
        if least > _MOST_ITEMS:
            raise NoInstance(f"more than {_MOST_ITEMS} properties are asked for{_at(name)}")
        while len(made) < least:
            key = self.value(both({"type": "string"}, schema.get("propertyNames", True)), number, "name")
            if key not in made:
                made[key] = self.value(others, variant + number, key)
            number += 1
            if number > 1000:
                raise NoInstance(f"there are not enough names for properties{_at(name)}")
        return made

    def _array(self, schema: Mapping[str, Any], variant: int, name: str) -> list[Any]:
        first, others = schema.get("prefixItems", []), schema.get("items", True)
        if isinstance(others, list):  # the older form of prefixItems
            first, others = others, schema.get("additionalItems", True)
        least, most = schema.get("minItems", 0), schema.get("maxItems")
        if least > _MOST_ITEMS:
            raise NoInstance(f"more than {_MOST_ITEMS} items are asked for{_at(name)}")
        made: list[Any] = []
        for index, part in enumerate(first[:most]):
            made.append(self.value(part, variant + index, name))
        wanted = max(least, _ITEMS if most is None else min(_ITEMS, most), len(first[:most]))
        if "contains" in schema and (most is None or len(made) < most):
            for _ in range(max(1, schema.get("minContains", 1))):
                made.append(self.value(both(others, schema["contains"]), variant + len(made), name))
        tries = 0
        while len(made) < wanted and others is not False:
            tries += 1
            try:
                item = self.value(others, variant + len(made) + tries - 1, name)
            except NoInstance:
                if len(made) >= least:
                    break
                raise
            if not schema.get("uniqueItems") or item not in made:
                made.append(item)
                tries = 0
            elif tries > 100:
                break
        if len(made) < least:
            raise NoInstance(f"there are not {least} different items{_at(name)}")
        return made


def _string(schema: Mapping[str, Any], variant: int, name: str) -> str:
    least, most = schema.get("minLength", 0), schema.get("maxLength")
    if most is not None and least > most:
        raise NoInstance(f"minLength is more than maxLength{_at(name)}")
    if least > _LONGEST_TEXT:
        raise NoInstance(f"more than {_LONGEST_TEXT} characters are asked for{_at(name)}")
    if "pattern" in schema:
        matching = text_matching(schema["pattern"], least=least, most=most, variant=variant)
        if matching is None:
            raise NoInstance(f"no text was found that matches {schema['pattern']!r}{_at(name)}")
        return matching
    if schema.get("format") in _FORMATS:
        return _FORMATS[schema["format"]].format(n=variant % 28 + 1)
    examples = [text for text in schema.get("examples", ()) if isinstance(text, str)]
    text: str = examples[variant % len(examples)] if examples else _words(name, variant)
    if most is not None:
        text = text[:most]
    return text.ljust(least, "x")


def _number(schema: Mapping[str, Any], variant: int, name: str) -> int | float:
    """Exact arithmetic; the smallest multiple in the bounds, or a number near 1 that moves with the variant."""
    low, high = _bound(schema, "minimum", "exclusiveMinimum"), _bound(schema, "maximum", "exclusiveMaximum")
    whole = schema["type"] == "integer"
    step = Fraction(str(schema["multipleOf"])) if "multipleOf" in schema else None
    if whole:
        step = Fraction(1) if step is None else Fraction(math.lcm(step.numerator, step.denominator), step.denominator)
    if step is not None:
        smallest = math.ceil(low[0] / step) if low else None
        if low and smallest is not None and low[1] and smallest * step == low[0]:
            smallest += 1
        largest = math.floor(high[0] / step) if high else None
        if high and largest is not None and high[1] and largest * step == high[0]:
            largest -= 1
        if smallest is not None and largest is not None and smallest > largest:
            raise NoInstance(f"no number is within the bounds{_at(name)}")
        count = variant + 1
        if largest is not None and count > largest:
            span = largest - smallest + 1 if smallest is not None else variant + 1
            count = largest - variant % span
        if smallest is not None and count < smallest:
            span = largest - smallest + 1 if largest is not None else variant + 1
            count = smallest + variant % span
        value = count * step
        return int(value) if value.denominator == 1 else float(value)
    value = Fraction(2 * variant + 3, 2)
    if low and high and not low[0] <= value <= high[0]:
        if low[0] > high[0] or (low[0] == high[0] and (low[1] or high[1])):
            raise NoInstance(f"no number is within the bounds{_at(name)}")
        value = low[0] + (high[0] - low[0]) * Fraction(variant % 7 + 1, 8)
    elif low and value <= low[0]:
        value = low[0] + variant + 1
    elif high and value >= high[0]:
        value = high[0] - variant - 1
    if (low and low[1] and value == low[0]) or (high and high[1] and value == high[0]):
        value = (low[0] + high[0]) / 2 if low and high else value + (1 if low else -1)
    return float(value)


def _bound(schema: Mapping[str, Any], inclusive: str, exclusive: str) -> tuple[Fraction, bool] | None:
    """The stricter of two keywords, and whether the number itself is out; a boolean is the older form."""
    bounds = []
    if inclusive in schema:
        bounds.append((Fraction(str(schema[inclusive])), schema.get(exclusive) is True))
    if not isinstance(schema.get(exclusive, True), bool):
        bounds.append((Fraction(str(schema[exclusive])), True))
    if not bounds:
        return None
    return max(bounds) if inclusive == "minimum" else min(bounds, key=lambda bound: (bound[0], not bound[1]))


def _implied_type(schema: Mapping[str, Any]) -> str:
    for kind, keywords in (("object", _OBJECT), ("array", _ARRAY), ("string", _STRING), ("number", _NUMBER)):
        if any(keyword in schema for keyword in keywords):
            return kind
    return "string"


def _has_type(value: Any, kinds: Any) -> bool:
    if kinds is None:
        return True
    types: dict[str, tuple[type, ...]] = {
        "object": (dict,), "array": (list,), "string": (str,), "integer": (int,), "number": (int, float),
        "boolean": (bool,), "null": (type(None),),
    }  # fmt: skip
    for kind in [kinds] if isinstance(kinds, str) else kinds:
        if isinstance(value, types.get(kind, ())) and (kind == "boolean" or not isinstance(value, bool)):
            return True
    return False


def _mentions(schema: Any, reference: str) -> bool:
    if isinstance(schema, Mapping):
        return schema.get("$ref") == reference or any(_mentions(part, reference) for part in schema.values())
    return isinstance(schema, list) and any(_mentions(part, reference) for part in schema)


def _found(pattern: str, text: str) -> bool:
    try:
        return re.search(pattern, text) is not None
    except re.error:
        raise NoInstance(f"{pattern!r} is no regular expression") from None


def _words(name: str, variant: int) -> str:
    return f"{name.replace('_', ' ') or 'text'} {variant + 1}"


def _at(name: str) -> str:
    return f" (property {name!r})" if name else ""
