"""The texts of a deployment's parameters become vLLM's own engine arguments."""

from __future__ import annotations

import dataclasses
import difflib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_type_hints

import msgspec
from modelbus_broker.errors import ConfigurationError

from ..base import EngineConfig
from ..params import read_params

#: Arguments that would take from this engine what it does itself, and why.
_REFUSED = {
    "model": "the model is the deployment's --model_path",
    "skip_tokenizer_init": "this engine needs the tokenizer",
}


class OwnParams(msgspec.Struct, frozen=True, kw_only=True):
    """Parameters of this engine's own."""

    tool_parser: str = "auto"  #: one of ``ToolParser``, or the name of one of vLLM's
    tool_call_parser: str = ""  #: the same, by the name that ``vllm serve`` has for it
    reasoning_parser: str = "auto"  #: the name of one of vLLM's, or ``none``
    max_images: int = 16  #: of one request
    max_image_mb: int = 20  #: of one file
    allowed_media_domains: str = ""  #: hosts that images are fetched from, separated by commas; "": data URLs only
    chat_template: str = ""  #: its text, or the path of a file with it; "": the model's own


def own_params(params: Mapping[str, str]) -> tuple[OwnParams, dict[str, str]]:
    """This engine's own parameters, and those that are vLLM's.

    Raises:
        ConfigurationError: one of our own has a value that it cannot have.
    """
    names = OwnParams.__struct_fields__
    own = read_params(OwnParams, {name: text for name, text in params.items() if name in names}, engine="vllm")
    if own.tool_call_parser:
        if own.tool_parser not in ("auto", own.tool_call_parser):
            raise ConfigurationError("tool_parser and tool_call_parser are the same parameter; set one of them")
        own = msgspec.structs.replace(own, tool_parser=own.tool_call_parser)
    if own.chat_template and "{" not in own.chat_template:
        try:
            text = Path(own.chat_template).expanduser().read_text()
        except OSError as error:
            raise ConfigurationError(
                f"chat_template is neither a template nor a file that can be read: {error}"
            ) from None
        own = msgspec.structs.replace(own, chat_template=text)
    return own, {name: text for name, text in params.items() if name not in names}


def engine_arguments(kind: type[Any], config: EngineConfig, params: Mapping[str, str]) -> dict[str, Any]:
    """Keyword arguments for ``AsyncEngineArgs``.

    Args:
        kind: that dataclass.
        params: of the deployment, without those that are this engine's own.

    Raises:
        ConfigurationError: a name is not known (the message has near ones) or a value has the wrong type.
    """
    from vllm.config import StructuredOutputsConfig

    types = {field.name: field.type for field in dataclasses.fields(kind)}
    values: dict[str, Any] = {}
    for name, text in params.items():
        if name in _REFUSED:
            raise ConfigurationError(f"parameter {name} of engine 'vllm' cannot be set: {_REFUSED[name]}")
        if name not in types:
            near = difflib.get_close_matches(name, [*types, *OwnParams.__struct_fields__])
            like = f"; did you mean {', '.join(near)}?" if near else ": it has those of vLLM's AsyncEngineArgs"
            raise ConfigurationError(f"engine 'vllm' has no parameter {name}{like}")
        values[name] = _value(name, _hint(kind, types[name]), text)
    values["model"] = config.model_path
    values.setdefault("served_model_name", config.model)
    # The whole of an answer's form, calls of tools included, is one grammar that only this backend reads.
    forms = values.get("structured_outputs_config", {"backend": "guidance"})
    if isinstance(forms, dict):
        values["structured_outputs_config"] = _configuration(StructuredOutputsConfig, forms)
    if config.gpus:
        _spread(values, len(config.gpus))
    if config.slots:
        values.setdefault("max_num_seqs", config.slots)
    return values


def _spread(values: dict[str, Any], gpus: int) -> None:
    """Over the GPUs that the replica has claimed: tensor parallel, unless the deployment says otherwise.

    Raises:
        ConfigurationError: what it says does not fit them.
    """
    others = values.get("pipeline_parallel_size", 1) * values.get("data_parallel_size", 1)
    if "tensor_parallel_size" not in values:
        if gpus % others:
            raise ConfigurationError(
                f"pipeline_parallel_size times data_parallel_size is {others}, which does not divide the {gpus} GPUs of "
                f"this replica: set --gpus_per_worker to a multiple of {others}"
            )
        values["tensor_parallel_size"] = gpus // others
    wanted = values["tensor_parallel_size"] * others
    if wanted > gpus:
        raise ConfigurationError(
            f"the model is to be spread over {wanted} GPUs (tensor_parallel_size times pipeline_parallel_size times "
            f"data_parallel_size), but this replica has {gpus}: set --gpus_per_worker {wanted}"
        )


def _configuration(kind: Any, values: Mapping[str, Any]) -> Any:
    """A configuration of vLLM's that it wants as its own type."""
    try:
        return kind(**values)
    except (TypeError, ValueError) as error:
        raise ConfigurationError(f"parameter structured_outputs_config of engine 'vllm': {error}") from None


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
