"""Reads the parameters of a deployment, which are texts, into an engine's typed settings."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TypeVar

import msgspec
from modelbus_broker.errors import ConfigurationError

S = TypeVar("S", bound=msgspec.Struct)


def read_params(settings: type[S], params: Mapping[str, str], *, engine: str, also: Iterable[str] = ()) -> S:
    """The settings struct with these parameters; the others keep their defaults.

    Args:
        also: known names beyond the struct's fields, for the error text only.

    Raises:
        ConfigurationError: a name is not known (the message lists the known ones) or a value has the wrong type
            (the message names the parameter, never its value, which may be a secret).
    """
    fields = {field.encode_name: field.type for field in msgspec.structs.fields(settings)}
    unknown = sorted(params.keys() - fields.keys())
    if unknown:
        raise ConfigurationError(
            f"engine {engine!r} has no parameter {', '.join(unknown)}; known are: {', '.join([*sorted(fields), *also])}"
        )
    values: dict[str, object] = {}
    for name, text in params.items():
        try:
            values[name] = msgspec.convert(text, fields[name], strict=False)
        except msgspec.ValidationError as error:
            raise ConfigurationError(f"parameter {name} of engine {engine!r}: {error}") from None
    return msgspec.convert(values, settings)
