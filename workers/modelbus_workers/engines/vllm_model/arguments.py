"""The texts of a deployment's parameters become vLLM's own engine arguments."""

from __future__ import annotations

import dataclasses
import difflib
import json
from collections.abc import Mapping
from typing import Any, get_type_hints

from modelbus_broker.errors import ConfigurationError

from ..base import EngineConfig

#: Arguments that would take from this engine what it does itself, and why.
_REFUSED = {
    "model": "the model is the deployment's --model_path",
    "skip_tokenizer_init": "this engine needs the tokenizer",
    "reasoning_parser": "this engine does not tell reasoning from content yet",
}


def engine_arguments(kind: type[Any], config: EngineConfig, params: Mapping[str, str]) -> dict[str, Any]:
    """Keyword arguments for ``AsyncEngineArgs``.

    Args:
        kind: that dataclass.
        params: of the deployment, without those that are this engine's own.

    Raises:
        ConfigurationError: a name is not known (the message has near ones) or a value has the wrong type.
    """
    types = {field.name: field.type for field in dataclasses.fields(kind)}
    values: dict[str, Any] = {}
    for name, text in params.items():
        if name in _REFUSED:
            raise ConfigurationError(f"parameter {name} of engine 'vllm' cannot be set: {_REFUSED[name]}")
        if name not in types:
            near = difflib.get_close_matches(name, [*types, "tool_parser"])
            like = f"; did you mean {', '.join(near)}?" if near else ": it has those of vLLM's AsyncEngineArgs"
            raise ConfigurationError(f"engine 'vllm' has no parameter {name}{like}")
        values[name] = _value(name, _hint(kind, types[name]), text)
    values["model"] = config.model_path
    values.setdefault("served_model_name", config.model)
    # The whole of an answer's form, calls of tools included, is one grammar that only this backend reads.
    values.setdefault("structured_outputs_config", {"backend": "guidance"})
    if config.gpus:
        values.setdefault("tensor_parallel_size", len(config.gpus))
    if config.slots:
        values.setdefault("max_num_seqs", config.slots)
    return values


def _hint(kind: type[Any], written: Any) -> Any:
    """The type of one field. All at once they cannot be had: some are imported for type checkers only."""
    one = type("One", (), {"__annotations__": {"field": written}, "__module__": kind.__module__})
    return get_type_hints(one)["field"]


def _value(name: str, hint: Any, text: str) -> Any:
    from pydantic import ConfigDict, TypeAdapter, ValidationError

    value: Any = text
    if text[:1] in ("{", "["):
        try:
            value = json.loads(text)
        except ValueError as error:
            raise ConfigurationError(f"parameter {name} of engine 'vllm' is no JSON: {error}") from None
        if isinstance(value, dict):
            return value  # a configuration of vLLM's own, which it checks itself
    try:
        return _adapter(TypeAdapter, ConfigDict, hint).validate_python(value)
    except ValidationError as error:
        # Never the value: it may be a secret.
        words = "; ".join(sorted({problem["msg"] for problem in error.errors(include_input=False)}))
        raise ConfigurationError(f"parameter {name} of engine 'vllm': {words}") from None


def _adapter(adapter: Any, config: Any, hint: Any) -> Any:
    try:
        return adapter(hint, config=config(arbitrary_types_allowed=True))
    except Exception:  # pydantic takes no configuration for types that have their own
        return adapter(hint)
