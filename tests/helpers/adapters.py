"""Folders with adapters, as PEFT saves them."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any


def empty_adapter(folder: Path, *, note: str = "") -> Path:
    """A LoRA adapter without weights, for engines that lay nothing over anything. ``note`` tells files apart."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))
    header = json.dumps({"__metadata__": {"note": note}}).encode()
    (folder / "adapter_model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)
    return folder


def smollm2_adapter(folder: Path, *, seed: int, scale: float = 0.055, rank: int = 4, **config: Any) -> Path:
    """Weights that lie over SmolLM2-135M and visibly change what it says: random ones, the same for a seed."""
    import torch
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    random = torch.Generator().manual_seed(seed)
    weights = {}
    for layer in range(30):
        for name, size in (("q_proj", 576), ("v_proj", 192)):
            place = f"base_model.model.model.layers.{layer}.self_attn.{name}"
            weights[f"{place}.lora_A.weight"] = torch.randn(rank, 576, generator=random) * scale
            weights[f"{place}.lora_B.weight"] = torch.randn(size, rank, generator=random) * scale
    save_file(weights, folder / "adapter_model.safetensors")
    said = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": 2 * rank, "target_modules": ["q_proj", "v_proj"],
        "bias": "none", "lora_dropout": 0.05, "init_lora_weights": True, "inference_mode": True, "megatron_core": "megatron.core",
    }  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(said | config))
    return folder
