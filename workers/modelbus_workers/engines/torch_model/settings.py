"""The parameters of a ``transformers`` deployment."""

from __future__ import annotations

from typing import Any, Literal

import msgspec

from .call_formats import ToolParser

DType = Literal["auto", "float32", "fp32", "float", "bfloat16", "bf16", "float16", "fp16", "half"]

_TORCH_NAMES = {
    "float32": "float32", "fp32": "float32", "float": "float32",
    "bfloat16": "bfloat16", "bf16": "bfloat16",
    "float16": "float16", "fp16": "float16", "half": "float16",
}  # fmt: skip


class TransformersSettings(msgspec.Struct, frozen=True, kw_only=True):
    """``backend.*`` of a deployment on the ``transformers`` engine."""

    #: auto: float32 on a CPU, what the weights are saved in on a GPU
    dtype: DType = "auto"
    #: cpu, cuda, cuda:1 ...; auto: the GPU if there is one
    device: str = "auto"
    #: linear layers in 4 or 8 bits, rounded while the model is loaded (bitsandbytes)
    load_in_4bit: bool = False
    load_in_8bit: bool = False
    #: the numbers that 4 bits stand for
    bnb_4bit_quant_type: Literal["nf4", "fp4"] = "nf4"
    #: ... and the scales of the blocks rounded too
    bnb_4bit_use_double_quant: bool = False
    #: tokens of prompt and output together; 0: what the model was made for
    max_model_len: int = 0
    #: eager, sdpa, flash_attention_2 ...; "": the library's choice
    attn_implementation: str = ""
    #: runs Python code that lies in the model's folder
    trust_remote_code: bool = False
    #: requests at once; 0: 8, or 1 where requests do not share forward passes
    slots: int = 0
    #: one forward pass for all requests; else each has its own, and feels nothing of the others, not in the last bit
    continuous_batching: bool = False
    #: the path of a smaller model with the same tokens, which guesses what this one will say
    assistant_model: str = ""
    #: it guesses so many tokens at once ...
    num_assistant_tokens: int = 5
    #: ... and stops where it is less sure than this
    assistant_confidence_threshold: float = 0.4
    #: guess so many tokens from what the text has had before; 0: do not
    prompt_lookup_num_tokens: int = 0
    #: LoRA adapters that stay loaded; more only while requests run with more
    max_adapters: int = 8
    #: of PyTorch on a CPU; 0: the CPUs that the deployment asks for, or all
    num_threads: int = 0
    #: how the model writes tool calls; auto: what its chat template shows
    tool_parser: ToolParser = "auto"
    #: images in one request
    max_images: int = 16
    #: of one image's file, MiB
    max_image_mb: int = 20
    #: hosts from which the worker fetches images, with commas between; *: any; "": none, images come in data URLs
    allowed_media_domains: str = ""
    #: texts embedded, scored or classified at once
    batch_size: int = 32

    def torch_dtype(self, device: str) -> Any:
        """What ``from_pretrained`` takes as ``dtype`` on this device."""
        import torch

        if self.dtype == "auto":
            return torch.float32 if device == "cpu" else "auto"
        return getattr(torch, _TORCH_NAMES[self.dtype])
