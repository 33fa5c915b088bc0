"""The library's log, and loading a model and its context."""

from __future__ import annotations

import ctypes
import logging
import math
import os
from collections import deque
from importlib.metadata import version
from pathlib import Path
from typing import Any

import llama_cpp
import psutil
from modelbus_broker.errors import ConfigurationError, DeploymentFailed

from ..base import EngineConfig
from ..torch_model.fingerprint import fingerprint
from .settings import LlamaSettings

log = logging.getLogger(__name__)

_WARNING, _ERROR, _GOES_ON = 3, 4, 5
_MEAN, _RANK = 1, 4
#: Tokens of an earlier run that are read at once, where that is exact. llama.cpp's attention goes another way from 64 on.
REPLAY_PIECE = 32


class LibraryLog:
    """Keeps what the library complains of, so that errors have its words; nothing of it goes to stderr."""

    def __init__(self) -> None:
        self.verbose = False
        self._complaints: deque[str] = deque(maxlen=8)
        self._level = 0
        self._callback = llama_cpp.llama_log_callback(self._take)
        llama_cpp.llama_log_set(self._callback, ctypes.c_void_p(0))

    def _take(self, level: int, text: bytes, _data: object) -> None:
        self._level = level = self._level if level == _GOES_ON else level
        line = text.decode("utf-8", "replace").strip()
        if not line or line == ".":
            return
        if level in (_WARNING, _ERROR):
            self._complaints.append(line)
        if self.verbose:
            log.info("llama.cpp: %s", line)

    def words(self) -> str:
        """The last complaints; they are forgotten then."""
        found = "; ".join(dict.fromkeys(self._complaints))
        self._complaints.clear()
        return found or "it does not say why"


_log: LibraryLog | None = None


def library_log() -> LibraryLog:
    """The one of this process; the first call prepares the library."""
    global _log
    if _log is None:
        _log = LibraryLog()
        llama_cpp.llama_backend_init()
    return _log


def find_file(config: EngineConfig) -> Path:
    """The GGUF file at the deployment's model path.

    Raises:
        ConfigurationError: no path, nothing there, or a folder that does not have exactly one model.
    """
    if not config.model_path:
        raise ConfigurationError("the llama_cpp engine needs --model_path: a GGUF file or a folder with one")
    path = Path(config.model_path).expanduser()
    if not path.exists():
        raise ConfigurationError(f"model path {config.model_path} does not exist on this node")
    if path.is_file():
        return path
    # Of a model in several files the library wants the first, and finds the others.
    files = sorted(f for f in path.glob("*.gguf") if "-of-" not in f.name or "-00001-of-" in f.name)
    if not files:
        raise ConfigurationError(f"the llama_cpp engine finds no .gguf file in {path}")
    if len(files) > 1:
        names = ", ".join(file.name for file in files)
        raise ConfigurationError(f"{path} has several GGUF files; name one as the model path: {names}")
    return files[0]


def check_memory(model: Any, settings: LlamaSettings, tokens: int) -> None:
    """Refuses a context that is larger than this host's memory: the library would take it, and the system end the worker.

    Only of models that keep the same for each token of each layer it is known what they need.

    Raises:
        DeploymentFailed: it is too large; the message has the numbers.
    """
    if (
        llama_cpp.llama_model_is_recurrent(model)
        or llama_cpp.llama_model_is_hybrid(model)
        or llama_cpp.llama_model_n_swa(model)
    ):
        return
    heads = int(llama_cpp.llama_model_n_head(model)) or 1
    values = int(llama_cpp.llama_model_n_embd(model)) // heads * int(llama_cpp.llama_model_n_head_kv(model))
    size = sum({None: 2.0, 0: 4.0, 1: 2.0}.get(kind, 0.5) for kind in (settings.type_k, settings.type_v))
    needed = int(tokens * values * size * int(llama_cpp.llama_model_n_layer(model)))
    there = int(psutil.virtual_memory().total)
    if needed > there or tokens >= 1 << 31:
        raise DeploymentFailed(
            f"a context of {tokens} tokens (n_ctx times slots) needs {needed >> 20} MiB beside the weights, and this host "
            f"has {there >> 20} MiB: lower n_ctx or slots"
        )


class Loaded:
    """A model and one context with a sequence for each slot. The library's objects have no types that help."""

    def __init__(self, config: EngineConfig, settings: LlamaSettings, slots: int) -> None:
        """Blocks for seconds to minutes.

        Raises:
            ConfigurationError: there is no such file, or a setting does not fit the model.
            DeploymentFailed: the library refuses; its own words are in the message.
        """
        file = find_file(config)
        self._log = library_log()
        self._log.verbose = settings.verbose
        self._log.words()
        if settings.numa:
            llama_cpp.llama_numa_init(settings.numa)
        if settings.pooling_type == _RANK:
            raise ConfigurationError("pooling_type 4 is for rerankers, which the llama_cpp engine does not serve")
        self._keep: list[Any] = []
        self.context: Any = None
        self.model: Any = llama_cpp.llama_model_load_from_file(str(file).encode(), self._model_params(settings))
        if not self.model:
            raise DeploymentFailed(f"llama.cpp cannot load {file}: {self._log.words()}")
        if llama_cpp.llama_model_has_encoder(self.model):
            raise ConfigurationError(f"{file} is a model with an encoder, which the llama_cpp engine does not serve")
        made_for = int(llama_cpp.llama_model_n_ctx_train(self.model))
        #: tokens of one slot
        self.context_length = min(settings.n_ctx, made_for) if settings.n_ctx == 4096 else settings.n_ctx or made_for
        self.slots = slots
        if not settings.n_gpu_layers:
            check_memory(self.model, settings, self.context_length * (1 if settings.embedding else slots))
        self.n_batch = self.context_length if settings.embedding else max(settings.prompt_piece, slots * REPLAY_PIECE)
        self.context = self._context(config, settings)
        if settings.embedding and llama_cpp.llama_pooling_type(self.context) == _RANK:
            raise ConfigurationError(f"{file} is a reranker, which the llama_cpp engine does not serve")
        if not settings.embedding and not llama_cpp.llama_get_memory(self.context):
            raise ConfigurationError(f"{file} is a model that makes vectors: deploy it with backend.embedding=true")
        if settings.embedding and llama_cpp.llama_pooling_type(self.context) == 0:
            llama_cpp.llama_free(self.context)
            self.context = self._context(config, settings, pooling=_MEAN)
        if settings.lora_path:
            self._add_lora(settings)
        self.vocab: Any = llama_cpp.llama_model_get_vocab(self.model)
        self.vocabulary = int(llama_cpp.llama_vocab_n_tokens(self.vocab))
        lora = [Path(settings.lora_path)] if settings.lora_path else []
        # Another version may compute with other sums, or allow other tokens where a grammar leaves a choice.
        versions = [llama_cpp.__version__, *version("llguidance").split(".")[:2]]
        self.compat = fingerprint([file, *lora], "llama_cpp", *versions, settings.identity(), str(settings.embedding))

    def _model_params(self, settings: LlamaSettings) -> Any:
        params = llama_cpp.llama_model_default_params()
        if settings.n_gpu_layers and not llama_cpp.llama_supports_gpu_offload():
            raise ConfigurationError(
                "n_gpu_layers asks for a GPU, or the deployment does, but llama-cpp-python was compiled without: install it "
                'again with CMAKE_ARGS="-DGGML_CUDA=on", or set backend.n_gpu_layers=0'
            )
        params.n_gpu_layers = 0x7FFFFFFF if settings.n_gpu_layers == -1 else settings.n_gpu_layers
        params.split_mode, params.main_gpu = settings.split_mode, settings.main_gpu
        params.load_mode = int(settings.use_mmap and not settings.lora_path) + 2 * int(settings.use_mlock)
        extra = settings.use_extra_bufts
        # The library's AMX kernels were seen to end the process at the first prompt, on CPUs that say they have AMX.
        params.use_extra_bufts = b"AMX_INT8 = 1" not in llama_cpp.llama_print_system_info() if extra is None else extra
        if splits := settings.splits():
            most = int(llama_cpp.llama_max_devices())
            if len(splits) > most:
                raise ConfigurationError(
                    f"tensor_split has {len(splits)} numbers, but there are at most {most} devices"
                )
            params.tensor_split = (ctypes.c_float * most)(*splits)
            self._keep.append(params.tensor_split)
        if overrides := settings.overrides():
            params.kv_overrides = self._overrides(overrides)
        return params

    def _overrides(self, overrides: dict[str, bool | int | float | str]) -> Any:
        array = (llama_cpp.llama_model_kv_override * (len(overrides) + 1))()  # the last one is empty: the end
        for entry, (key, value) in zip(array, overrides.items(), strict=False):
            entry.key = key.encode()
            if isinstance(value, bool):
                entry.tag, entry.value.val_bool = llama_cpp.LLAMA_KV_OVERRIDE_TYPE_BOOL, value
            elif isinstance(value, int):
                entry.tag, entry.value.val_i64 = llama_cpp.LLAMA_KV_OVERRIDE_TYPE_INT, value
            elif isinstance(value, float):
                entry.tag, entry.value.val_f64 = llama_cpp.LLAMA_KV_OVERRIDE_TYPE_FLOAT, value
            else:
                raw = value.encode()
                if len(raw) > 127:
                    raise ConfigurationError(f"kv_overrides: the text of {key} is longer than 127 bytes")
                entry.tag = llama_cpp.LLAMA_KV_OVERRIDE_TYPE_STR
                place = ctypes.addressof(entry.value) + llama_cpp.llama_model_kv_override_value.val_str.offset
                ctypes.memmove(place, raw + b"\0", len(raw) + 1)
        self._keep.append(array)
        return array

    def _context(self, config: EngineConfig, settings: LlamaSettings, pooling: int | None = None) -> Any:
        params = llama_cpp.llama_context_default_params()
        # llama.cpp rounds a sequence's share up to 256 tokens
        each = -(-self.context_length // 256) * 256
        params.n_ctx = each if settings.embedding else each * self.slots
        params.n_seq_max = 1 if settings.embedding else self.slots
        params.n_batch = self.n_batch
        params.n_ubatch = self.n_batch if settings.embedding else min(settings.n_ubatch, self.n_batch)
        own = math.ceil(config.cpus) if config.cpus >= 1 else len(os.sched_getaffinity(0))
        params.n_threads = settings.n_threads or own
        params.n_threads_batch = settings.n_threads_batch or settings.n_threads or own
        params.pooling_type = settings.pooling_type if pooling is None else pooling
        params.embeddings = settings.embedding
        params.flash_attn_type = -1 if settings.flash_attn is None else int(settings.flash_attn)
        # Each sequence has cells of its own, so what is computed for it does not depend on its neighbours.
        params.kv_unified = False
        for name in (
            "rope_scaling_type", "attention_type", "rope_freq_base", "rope_freq_scale", "yarn_ext_factor",
            "yarn_attn_factor", "yarn_beta_fast", "yarn_beta_slow", "yarn_orig_ctx", "offload_kqv",
        ):  # fmt: skip
            setattr(params, name, getattr(settings, name))
        for name in ("op_offload", "swa_full", "type_k", "type_v"):
            if (value := getattr(settings, name)) is not None:
                setattr(params, name, value)
        context = llama_cpp.llama_init_from_model(self.model, params)
        if not context:
            raise DeploymentFailed(f"llama.cpp cannot make a context of {params.n_ctx} tokens: {self._log.words()}")
        return context

    def _add_lora(self, settings: LlamaSettings) -> None:
        if not Path(settings.lora_path).is_file():
            raise ConfigurationError(f"lora_path {settings.lora_path} does not exist on this node")
        adapter = llama_cpp.llama_adapter_lora_init(self.model, settings.lora_path.encode())
        if not adapter:
            raise DeploymentFailed(f"llama.cpp cannot load the LoRA {settings.lora_path}: {self._log.words()}")
        adapters = (llama_cpp.llama_adapter_lora_p_ctypes * 1)(adapter)
        if llama_cpp.llama_set_adapters_lora(self.context, adapters, 1, (ctypes.c_float * 1)(settings.lora_scale)):
            raise DeploymentFailed(f"llama.cpp cannot use the LoRA {settings.lora_path}: {self._log.words()}")

    def words(self) -> str:
        return self._log.words()

    def close(self) -> None:
        """Lets the memory go; nothing may use the model any more."""
        llama_cpp.llama_free(self.context)
        llama_cpp.llama_model_free(self.model)
