"""JSON Schemas: whether one is right, what of a value does not fit it, and bounds for grammars."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Any, NoReturn

from modelbus_broker.errors import InvalidRequest

Schema = dict[str, Any]

#: Where a schema holds schemas by name, and where as a list or alone.
_NAMED = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")
_LISTED = ("anyOf", "oneOf", "allOf", "prefixItems")
_SINGLE = (
    "items", "additionalProperties", "not", "if", "then", "else", "contains", "propertyNames", "additionalItems",
    "unevaluatedItems", "unevaluatedProperties", "contentSchema",
)  # fmt: skip
#: Beyond any number that a model means: a grammar must end somewhere.
_LARGEST = 10**15
#: Several schemas that one value has to fit, wherever these stand, and where they stand beside properties.
_COMBINED = {"allOf", "not", "if", "then", "else", "dependentSchemas", "unevaluatedProperties"}
_BESIDE = {"anyOf", "oneOf", "$ref"}
_MOST_PROBLEMS = 8


class SchemaReader:
    """A schema that is known to be right, ready to judge values."""

    def __init__(self, schema: Mapping[str, Any], param: str = "schema") -> None:
        """
        Raises:
            InvalidRequest: it is no JSON Schema, or refers to something outside of itself; ``param`` names the field.
        """
        import jsonschema_rs

        check_references(schema, param)
        try:
            self._validator = jsonschema_rs.validator_for(dict(schema), retriever=_nothing_outside)
        except (jsonschema_rs.ValidationError, jsonschema_rs.ReferencingError, ValueError, TypeError) as error:
            at = path_words(getattr(error, "instance_path", ()), "the schema")
            words = getattr(error, "message", None) or str(error).partition("\n")[0]
            raise InvalidRequest(f"Invalid schema for '{param}': {at}: {words}", param=param) from None

    def problems(self, value: Any) -> list[str]:
        """What does not fit, each with its place, in words for a model and for people; [] if all does."""
        found: list[str] = []
        for error in self._validator.iter_errors(value):
            found.append(_words(error))
            if len(found) >= _MOST_PROBLEMS:
                break
        return found


def schema_reader(schema: Mapping[str, Any], param: str = "schema") -> SchemaReader:
    """The reader of a schema; the last ones are remembered. Raises InvalidRequest as :class:`SchemaReader`."""
    try:
        text = json.dumps(schema)
    except (TypeError, ValueError) as error:
        raise InvalidRequest(f"Invalid schema for '{param}': {error}", param=param) from None
    return _remembered(text, param)


@lru_cache(maxsize=256)
def _remembered(text: str, param: str) -> SchemaReader:
    return SchemaReader(json.loads(text), param)


def _nothing_outside(uri: str) -> NoReturn:
    raise ValueError(f"{uri} lies outside of the schema")


def check_references(schema: object, param: str) -> None:
    """Raises InvalidRequest for a ``$ref`` that leads out of the schema: nothing is fetched."""
    for part in parts(schema):
        reference = part.get("$ref", part.get("$dynamicRef"))
        if isinstance(reference, str) and not reference.startswith("#"):
            raise InvalidRequest(
                f"Invalid schema for '{param}': $ref {reference!r} leads out of the schema; put what it means in $defs",
                param=param,
            )


def parts(schema: object) -> Iterable[Schema]:
    """The schema and all schemas in it."""
    waiting = [schema]
    while waiting:
        part = waiting.pop()
        if not isinstance(part, dict):
            continue
        yield part
        for name in _NAMED:
            if isinstance(part.get(name), dict):
                waiting.extend(part[name].values())
        for name in (*_LISTED, *_SINGLE):
            inner = part.get(name)
            waiting.extend(inner if isinstance(inner, list) else [inner])


def path_words(path: Sequence[str | int], whole: str = "the answer") -> str:
    """``items[2].price``; ``whole`` for the empty path."""
    words = ""
    for step in path:
        words += f"[{step}]" if isinstance(step, int) else f".{step}" if words else str(step)
    return words or whole


def _words(error: Any) -> str:
    kind = error.kind
    branches = getattr(kind, "context", None)
    message = error.message
    if branches and type(kind).__name__ in ("AnyOf", "OneOfNotValid"):
        # The branch that fits best says most about what is wrong.
        closest = min(
            branches, key=lambda errors: (-max((len(e.instance_path) for e in errors), default=0), len(errors))
        )
        if closest:
            message = f"fits none of the {len(branches)} forms it may have; of the closest: {'; '.join(map(_words, closest[:2]))}"
            return f"{path_words(error.instance_path)}: {message}"
    if len(message) > 300:
        message = message[:150] + " ... " + message[-150:]
    return f"{path_words(error.instance_path)}: {message}"


# Making schemas ready for grammars and for prompts


def mapped(schema: Any, change: Any) -> Any:
    """A copy in which every schema, the inner ones first, went through ``change``."""
    if not isinstance(schema, dict):
        return schema
    copy = dict(schema)
    for name in _NAMED:
        if isinstance(copy.get(name), dict):
            copy[name] = {key: mapped(inner, change) for key, inner in copy[name].items()}
    for name in (*_LISTED, *_SINGLE):
        inner = copy.get(name)
        if isinstance(inner, list):
            copy[name] = [mapped(one, change) for one in inner]
        elif isinstance(inner, dict):
            copy[name] = mapped(inner, change)
    return change(copy)


def bounded(schema: Schema, max_string: int, max_items: int) -> Schema:
    """The schema with an end to everything: a grammar alone lets a model go on inside a string until its tokens are used up, or
    think of one more member after the other.

    Only what the schema leaves open is bounded, and members that it does not name are let in where it says so; the order of the
    properties stays. 0 means no bound.
    """
    # Objects that are put together of several schemas have members that not each of these names.
    closes = not any(
        part.keys() & _COMBINED or ("properties" in part and part.keys() & _BESIDE) for part in parts(schema)
    )

    def change(part: Schema) -> Schema:
        if closes and part.get("properties") and not part.keys() & {"additionalProperties", "patternProperties"}:
            part["additionalProperties"] = False
        kinds = part.get("type")
        kinds = kinds if isinstance(kinds, list) else [kinds]
        fixed = part.keys() & {"enum", "const"}
        if "string" in kinds and max_string and not fixed and not part.keys() & {"maxLength", "pattern", "format"}:
            part["maxLength"] = max(max_string, part.get("minLength", 0))
        if "array" in kinds and max_items and not fixed and "maxItems" not in part:
            part["maxItems"] = max(max_items, part.get("minItems", 0))
        if ("integer" in kinds or "number" in kinds) and not fixed:
            if not part.keys() & {"maximum", "exclusiveMaximum"}:
                part["maximum"] = max(_LARGEST, part.get("minimum", 0), part.get("exclusiveMinimum", 0) + 1)
            if not part.keys() & {"minimum", "exclusiveMinimum"}:
                part["minimum"] = min(-_LARGEST, part.get("maximum", 0), part.get("exclusiveMaximum", 0) - 1)
        return part

    changed: Schema = mapped(schema, change)
    return changed


def plain(schema: Schema) -> Schema:
    """The schema with its references put in their places, where they do not run in a circle, and without titles of members:
    shorter to read, for small models above all."""
    definitions = {**schema.get("definitions", {}), **schema.get("$defs", {})}
    circular = {name for name in definitions if _reaches(name, name, definitions)}

    def change(part: Schema) -> Schema:
        if isinstance(part.get("title"), str):
            del part["title"]
        name = _name(part)
        if name not in definitions or name in circular:
            return part
        rest = {key: value for key, value in part.items() if key != "$ref"}
        target: Schema = mapped(definitions[name], change)
        return {**target, **rest}

    title = schema.get("title")
    body = {key: value for key, value in schema.items() if key not in ("$defs", "definitions")}
    result: Schema = mapped(body, change)
    if isinstance(title, str):
        result = {"title": title, **result}
    if circular:
        result["$defs"] = {name: mapped(definitions[name], change) for name in definitions if name in circular}
        text = json.dumps(result).replace('"#/definitions/', '"#/$defs/')
        result = json.loads(text)
    return result


def _name(part: Mapping[str, Any]) -> str:
    reference = part.get("$ref")
    if not isinstance(reference, str):
        return ""
    for head in ("#/$defs/", "#/definitions/"):
        if reference.startswith(head):
            return reference.removeprefix(head).replace("~1", "/").replace("~0", "~")
    return ""


def _reaches(start: str, goal: str, definitions: Mapping[str, Any]) -> bool:
    seen: set[str] = set()
    waiting = [start]
    while waiting:
        for part in parts(definitions.get(waiting.pop(), {})):
            name = _name(part)
            if name == goal:
                return True
            if name and name not in seen:
                seen.add(name)
                waiting.append(name)
    return False


def is_strict(schema: Schema) -> bool:
    """Whether OpenAI's strict mode takes it: every object closed, with all of its members required."""
    objects = [part for part in parts(schema) if part.get("type") == "object" or "properties" in part]
    closed = all(
        part.get("additionalProperties") is False and set(part.get("required", ())) == set(part.get("properties", ()))
        for part in objects
    )
    return schema.get("type") == "object" and closed


def coerced(schema: Any, value: Any) -> Any:
    """The value with numbers and truth values that stand there as texts read as such, where the schema wants them.

    Whole numbers that are written as decimals (3.0) become whole. Nothing else is changed.
    """
    if not isinstance(schema, dict):
        return value
    kind = schema.get("type")
    if isinstance(value, dict) and isinstance(schema.get("properties"), dict):
        return {name: coerced(schema["properties"].get(name), inner) for name, inner in value.items()}
    if isinstance(value, list) and isinstance(schema.get("items"), dict):
        return [coerced(schema["items"], inner) for inner in value]
    if isinstance(value, str):
        text = value.strip()
        if kind == "boolean" and text.lower() in ("true", "false"):
            return text.lower() == "true"
        if kind in ("integer", "number"):
            try:
                number = float(text) if kind == "number" else int(text)
            except ValueError:
                return value
            return number if number - number == 0 else value
    if kind == "string" and isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    return value
