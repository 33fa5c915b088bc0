"""The parameters of a ``llama_cpp`` deployment."""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping

import msgspec
from modelbus_broker.errors import ConfigurationError

from ..params import read_params
from ..torch_model.call_formats import ToolParser


class LlamaSettings(msgspec.Struct, frozen=True, kw_only=True):
    """``backend.*`` of a deployment; most names are those of ``llama_cpp.Llama``, and mean the same."""

    n_gpu_layers: int | None = None  #: -1: all; None: all if the replica claimed GPUs, else none
    split_mode: int = 1
    main_gpu: int = 0
    tensor_split: str = ""  #: numbers with commas between them
    use_mmap: bool = True
    use_mlock: bool = False
    kv_overrides: str = ""  #: a JSON object
    use_extra_bufts: bool | None = None  #: weights in the order that this CPU likes; None: where that is known to work
    numa: int = 0
    #: tokens of prompt and output together, of each slot; 0: all that the model was made for
    n_ctx: int = 4096
    n_batch: int = 0  #: tokens of a prompt in one step; 0: 512 on a GPU, 128 on a CPU
    n_ubatch: int = 512
    n_threads: int = 0
    n_threads_batch: int = 0
    rope_scaling_type: int = -1
    rope_freq_base: float = 0.0
    rope_freq_scale: float = 0.0
    yarn_ext_factor: float = -1.0
    yarn_attn_factor: float = 1.0
    yarn_beta_fast: float = 32.0
    yarn_beta_slow: float = 1.0
    yarn_orig_ctx: int = 0
    offload_kqv: bool = True
    flash_attn: bool | None = None  #: None: where the library can
    op_offload: bool | None = None
    swa_full: bool | None = None
    type_k: int | None = None
    type_v: int | None = None
    lora_path: str = ""
    lora_scale: float = 1.0
    chat_format: str = ""  #: "": the template in the file
    embedding: bool = False
    pooling_type: int = -1
    attention_type: int = -1
    seed: int | None = None  #: of requests that name none
    last_n_tokens_size: int = 64  #: how far back repetition_penalty looks
    verbose: bool = False  #: the library's log lines become log lines of the worker
    slots: int = 0  #: requests at once; 0: 4
    tool_parser: ToolParser = "auto"
    logits_all: bool = False  #: without effect: log probabilities of prompts are there for any request that wants them

    @property
    def prompt_piece(self) -> int:
        """Tokens of a prompt in one step: other requests wait for so long, and an abort takes so long."""
        return self.n_batch or (512 if self.n_gpu_layers else 128)

    def on(self, gpus: int) -> LlamaSettings:
        """With all that depends on how many GPUs the replica has claimed."""
        if self.n_gpu_layers is not None:
            return self
        return msgspec.structs.replace(self, n_gpu_layers=-1 if gpus else 0)

    def splits(self) -> list[float]:
        try:
            return [float(part) for part in self.tensor_split.strip("[] ").split(",") if part.strip()]
        except ValueError:
            raise ConfigurationError("tensor_split must be numbers with commas between them, such as 0.6,0.4") from None

    def overrides(self) -> dict[str, bool | int | float | str]:
        try:
            found = json.loads(self.kv_overrides or "{}")
        except ValueError:
            found = None
        if not isinstance(found, dict) or not all(
            isinstance(value, bool | int | float | str) for value in found.values()
        ):
            raise ConfigurationError("kv_overrides must be a JSON object of numbers, texts, true and false")
        return found

    def identity(self) -> str:
        """What of them decides over the tokens."""
        names = (
            "kv_overrides", "rope_scaling_type", "rope_freq_base", "rope_freq_scale", "yarn_ext_factor",
            "yarn_attn_factor", "yarn_beta_fast", "yarn_beta_slow", "yarn_orig_ctx", "type_k", "type_v", "lora_scale",
            "chat_format", "pooling_type", "attention_type", "seed", "last_n_tokens_size", "n_ctx",
        )  # fmt: skip
        return json.dumps([getattr(self, name) for name in names])


#: Parameters of ``llama_cpp.Llama`` that cannot be parameters here, and why.
_NOT_HERE = {
    "vocab_only": "a model without weights answers nothing",
    "lora_base": "the library has none any more",
    "spm_infill": "prompts with a suffix are not served",
    "chat_handler": "it is a Python object; images are not served",
    "draft_model": "it is a Python object",
    "tokenizer": "it is a Python object; the file has its own",
    "model_path": "the deployment's --model_path says it",
}


def read_settings(params: Mapping[str, str]) -> LlamaSettings:
    """The settings of these parameters.

    Raises:
        ConfigurationError: a name is not known (the message has the ones that are spelled alike), or a value is wrong.
    """
    known = [field.name for field in msgspec.structs.fields(LlamaSettings)]
    for name in params:
        if name in _NOT_HERE:
            raise ConfigurationError(f"engine 'llama_cpp' takes no parameter {name}: {_NOT_HERE[name]}")
        near = difflib.get_close_matches(name, known, n=3)
        if name not in known and near:
            raise ConfigurationError(f"engine 'llama_cpp' has no parameter {name}; did you mean {' or '.join(near)}?")
    settings = read_params(LlamaSettings, params, engine="llama_cpp")
    settings.splits()
    settings.overrides()
    least = {"n_ctx": 0, "n_batch": 0, "n_ubatch": 1, "n_threads": 0, "n_threads_batch": 0, "slots": 0}
    for name, number in least.items():
        if getattr(settings, name) < number:
            raise ConfigurationError(f"parameter {name} of engine 'llama_cpp' must be at least {number}")
    return settings
