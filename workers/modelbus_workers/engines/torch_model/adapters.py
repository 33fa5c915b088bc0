"""LoRA adapters over one model: loaded when they are first asked for, switched between forward passes, bounded in number."""

from __future__ import annotations

import functools
import logging
import warnings
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from modelbus_broker.errors import AdapterUnavailable
from modelbus_broker.messages import Adapter

from ..adapters import AdapterReader

log = logging.getLogger(__name__)

#: What says how the weights of plain LoRA are laid over a model.
_READ = (
    "r", "lora_alpha", "target_modules", "exclude_modules", "use_rslora", "fan_in_fan_out", "rank_pattern", "alpha_pattern",
    "layers_to_transform", "layers_pattern", "lora_bias",
)  # fmt: skip
#: What makes no difference to trained weights.
_IRRELEVANT = {
    "auto_mapping", "base_model_name_or_path", "ensure_weight_tying", "ephemeral_gpu_offload", "inference_mode", "lora_dropout",
    "megatron_core", "peft_type", "peft_version", "qalora_group_size", "revision", "runtime_config", "task_type",
}  # fmt: skip
#: Ways to begin a training after which the model itself is the one that the weights belong to.
_PLAIN_BEGINNINGS = (None, True, False, "gaussian", "orthogonal", "eva")


@dataclass(frozen=True)
class AdapterWeights:
    """An adapter that has been read. Two with one fingerprint are the same."""

    fingerprint: str
    config: Mapping[str, Any] = field(compare=False)  #: fields of ``peft.LoraConfig``
    tensors: dict[str, Any] = field(compare=False, repr=False)
    refuse: Callable[[str], AdapterUnavailable] = field(compare=False, repr=False)  #: the error that says why


def read_weights(reader: AdapterReader, adapter: Adapter) -> AdapterWeights:
    """The weights of a folder.

    Raises:
        AdapterUnavailable: it is not here, asks for more than plain LoRA, or is damaged.
    """
    from safetensors.torch import load

    files = reader.read(adapter)
    refuse, said = functools.partial(reader.refuse, adapter), files.config
    beginning = said.get("init_lora_weights")
    if beginning not in _PLAIN_BEGINNINGS:
        raise refuse(
            f"it was begun with init_lora_weights={beginning!r}, which changes the model: save it converted to plain LoRA"
        )
    more = [
        key
        for key, value in said.items()
        if value not in (None, False, "none", {}, []) and key not in (*_READ, *_IRRELEVANT, "init_lora_weights")
    ]
    if more:
        raise refuse(f"it asks for {', '.join(sorted(more))}; only plain LoRA is laid over a model")
    try:
        tensors = load(files.weights)
    except Exception as error:  # the library has no class of its own for damaged files
        raise refuse(f"its weights cannot be read: {error}") from error
    config = {key: said[key] for key in _READ if said.get(key) is not None}
    return AdapterWeights(files.fingerprint, config, tensors, refuse)


class Adapters:
    """The adapters over a model. For the thread that runs it: one forward pass has one adapter, or none.

    Attributes:
        loads: how many were laid over the model, again after they had to go included.
    """

    def __init__(self, model: Any, limit: int) -> None:
        """At most ``limit`` stay, and more only while requests run with more."""
        self._model, self._limit = model, limit
        self._over: Any = None  #: the library's object around the model, made with the first adapter
        self._layers: list[Any] = []  #: that have adapters
        self._names: OrderedDict[str, str] = OrderedDict()  #: fingerprint -> the library's name; used last is last
        self._holders: dict[str, int] = {}
        self._active = ""
        self.loads = 0

    def __len__(self) -> int:
        return len(self._names)

    def __contains__(self, fingerprint: str) -> bool:
        return fingerprint in self._names

    def hold(self, weights: AdapterWeights) -> None:
        """Lays it over the model if it is not, and keeps it until ``release``.

        Raises:
            AdapterUnavailable: it does not fit the model.
        """
        key = weights.fingerprint
        if key not in self._names:
            self._load(weights)
        self._names.move_to_end(key)
        self._holders[key] = self._holders.get(key, 0) + 1
        for other in list(self._names):
            if len(self._names) <= self._limit:
                break
            if other not in self._holders:
                self._remove(other)

    def release(self, weights: AdapterWeights) -> None:
        self._holders[weights.fingerprint] -= 1
        if not self._holders[weights.fingerprint]:
            del self._holders[weights.fingerprint]

    def use(self, weights: AdapterWeights | None) -> None:
        """The next forward pass is with this one, which is held, or with none."""
        name = "" if weights is None else self._names[weights.fingerprint]
        if name == self._active:
            return
        for layer in self._layers:
            if name and not self._active:
                layer.enable_adapters(True)
            if name:
                layer.set_adapter(name, inference_mode=True)
            else:
                layer.enable_adapters(False)
        self._active = name

    def _load(self, weights: AdapterWeights) -> None:
        import torch
        from peft import LoraConfig, PeftModel, set_peft_model_state_dict
        from peft.tuners.tuners_utils import BaseTunerLayer

        # A name of its own, also if the same one could not be laid before and left something behind.
        self.loads += 1
        name = f"{weights.fingerprint}-{self.loads}"
        self.use(None)
        try:
            config = LoraConfig(**weights.config, inference_mode=True)
            # Parameters that are made in inference mode cannot be worked with outside of it.
            with torch.inference_mode(False), torch.no_grad(), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # the libraries tell each other of what they will change
                if self._over is None:
                    self._over = PeftModel(
                        self._model, config, adapter_name=name, autocast_adapter_dtype=False, low_cpu_mem_usage=True
                    )
                else:
                    self._over.add_adapter(name, config, low_cpu_mem_usage=True, autocast_adapter_dtype=False)
                found = set_peft_model_state_dict(
                    self._over, dict(weights.tensors), adapter_name=name, low_cpu_mem_usage=True
                )
                missing = [key for key in found.missing_keys if f".{name}." in key]
                if missing or found.unexpected_keys:
                    raise ValueError(_difference(missing, found.unexpected_keys, name))
                self._layers = [module for module in self._model.modules() if isinstance(module, BaseTunerLayer)]
                for layer in self._layers:
                    if name in layer.lora_A or name in layer.lora_embedding_A:
                        # Where the layer computes, and in its type.
                        layer._move_adapter_to_device_of_base_layer(name)
        except Exception as error:
            self._forget(name)
            raise weights.refuse(f"it does not fit this model: {' '.join(str(error).split())[:400]}") from error
        self._disable()
        self._names[weights.fingerprint] = name
        log.info("adapter %s is laid over the model; %d are", weights.fingerprint, len(self._names))

    def _remove(self, fingerprint: str) -> None:
        name = self._names.pop(fingerprint)
        self.use(None)
        self._forget(name)

    def _forget(self, name: str) -> None:
        for layer in self._layers:
            layer.set_adapter([])  # the library warns if what it deletes is active
        if self._over is not None and name in self._over.peft_config:
            self._over.delete_adapter(name)
        self._disable()

    def _disable(self) -> None:
        """Whatever the library thinks is active: nothing is."""
        for layer in self._layers:
            layer.enable_adapters(False)
        self._active = ""


def _difference(missing: list[str], unexpected: list[str], name: str) -> str:
    shown = [f"no weights for {key.replace(f'.{name}', '')}" for key in missing[:2]]
    shown += [f"no place for {key}" for key in unexpected[:2]]
    return f"{'; '.join(shown)} ({len(missing)} missing, {len(unexpected)} too many)"
