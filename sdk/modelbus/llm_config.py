"""byzerllm's ``llm_config``: fields of a request under the names that it and other libraries have for them. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from modelbus_broker.errors import InvalidRequest

#: Names that the seed and other libraries have for fields of the OpenAI API.
_FIELD_NAMES = {
    "max_length": "max_tokens",
    "max_new_tokens": "max_tokens",
    "max_output_length": "max_tokens",
    "max_completion_tokens": "max_tokens",
    "stopping_sequences": "stop",
}


def request_fields(llm_config: Mapping[str, Any] | None, extra: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The seed's ``llm_config`` as fields of a request: ``gen.`` and ``generation.`` are cut, old names translated.

    Raises:
        InvalidRequest: two of its keys mean the same field and differ.
    """
    fields: dict[str, Any] = {}
    for key, value in {**(llm_config or {}), **(extra or {})}.items():
        name = key.removeprefix("generation.").removeprefix("gen.")
        name = _FIELD_NAMES.get(name, name)
        if name in fields and fields[name] != value:
            raise InvalidRequest(f"llm_config gives {name} twice, once as {key}", param=name)
        fields[name] = value
    return fields
