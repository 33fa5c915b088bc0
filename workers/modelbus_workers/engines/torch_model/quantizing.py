"""Weights in fewer bits: made from a full model while it is loaded, or as the folder has them."""

from __future__ import annotations

import importlib.util
import logging
from pathlib import Path
from typing import Any

import msgspec
from modelbus_broker.errors import ConfigurationError, MissingExtra

from .settings import TransformersSettings


class _Config(msgspec.Struct):
    quantization_config: dict[str, Any] | None = None


def check_quantization(settings: TransformersSettings, kind: str, gguf: str, folder: Path) -> None:
    """Whether what is asked for can be done with what lies there.

    Raises:
        ConfigurationError: it cannot.
        MissingExtra: a library is not installed.
    """
    if settings.load_in_4bit and settings.load_in_8bit:
        raise ConfigurationError("load_in_4bit and load_in_8bit exclude each other")
    if not asked(settings):
        return
    if kind != "text":
        raise ConfigurationError(f"{asked(settings)} is for language models; {folder} holds another kind")
    if gguf:
        raise ConfigurationError(
            f"{asked(settings)} needs a folder with safetensors: GGUF weights are unpacked to full size"
        )
    if method := quant_method(folder):
        raise ConfigurationError(f"{folder} is quantized already ({method}): leave {asked(settings)} out")
    if importlib.util.find_spec("bitsandbytes") is None:
        raise MissingExtra(f"{asked(settings)} needs bitsandbytes: pip install 'modelbus[quantization]'")


def asked(settings: TransformersSettings) -> str:
    """The parameter that asks for fewer bits; "" if none does."""
    return "load_in_4bit" if settings.load_in_4bit else "load_in_8bit" if settings.load_in_8bit else ""


def quant_method(folder: Path) -> str:
    """How the weights in a folder are quantized (``gptq``, ``awq``, ``bitsandbytes``, ...); "" if they are not."""
    try:
        said = msgspec.json.decode((folder / "config.json").read_bytes(), type=_Config)
    except (OSError, msgspec.DecodeError):
        return ""
    return str((said.quantization_config or {}).get("quant_method", ""))


def quantization_options(settings: TransformersSettings, device: str, dtype: Any) -> dict[str, Any]:
    """What ``from_pretrained`` takes more."""
    if not asked(settings):
        return {}
    import torch
    from transformers import BitsAndBytesConfig

    # It tells of every matrix of every forward pass that its inputs are rounded.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    if settings.load_in_8bit:
        config = BitsAndBytesConfig(load_in_8bit=True)
    else:
        config = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=settings.bnb_4bit_quant_type,
            bnb_4bit_use_double_quant=settings.bnb_4bit_use_double_quant,
            bnb_4bit_compute_dtype=dtype if isinstance(dtype, torch.dtype) else torch.bfloat16,
        )
    options: dict[str, Any] = {"quantization_config": config}
    if device == "cpu":
        options["device_map"] = {"": "cpu"}
    return options
