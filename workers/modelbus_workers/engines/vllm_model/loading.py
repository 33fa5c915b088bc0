"""vLLM is started with a model, and what the prompts and the texts need of the model is gathered."""

from __future__ import annotations

import copy
import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast, get_args

from modelbus_broker.errors import ConfigurationError, DeploymentFailed

from ..base import EngineConfig
from ..torch_model.call_formats import ToolParser, choose_format
from ..torch_model.fingerprint import fingerprint
from ..torch_model.loading import Source, TextModel, template_text
from ..torch_model.text import TokenTexts
from .arguments import engine_arguments
from .last_words import LastWords

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Loaded:
    """A running vLLM; it ships no types that help here."""

    engine: Any  #: AsyncLLM
    text: TextModel  #: its tokenizer belongs to the thread that makes prompts
    tokenizer: Any  #: belongs to the event loop
    texts: TokenTexts
    slots: int
    max_logprobs: int
    adapters: bool


def load(config: EngineConfig) -> Loaded:
    """Starts vLLM; blocks for seconds to minutes.

    Raises:
        ConfigurationError: a parameter or the model path is wrong.
        DeploymentFailed: vLLM cannot run the model; the message has the root cause in its words.
    """
    if not config.model_path:
        raise ConfigurationError("the vllm engine needs --model_path: a folder with safetensors")
    folder = Path(config.model_path).expanduser()
    if not (folder / "config.json").is_file():
        raise ConfigurationError(f"model path {config.model_path} is no folder with a config.json on this node")
    params = dict(config.params)
    tool_parser = params.pop("tool_parser", "auto")
    if tool_parser not in get_args(ToolParser):
        raise ConfigurationError(f"tool_parser must be one of {', '.join(get_args(ToolParser))}")
    # A fork would inherit this process's threads and its connections to the bus.
    os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")

    from vllm import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    arguments = engine_arguments(AsyncEngineArgs, config, params)
    words = LastWords()
    try:
        with words.listen():
            engine = AsyncLLM.from_engine_args(AsyncEngineArgs(**arguments))
    except Exception as error:
        own = f"{type(error).__name__}: {error}"
        cause = words.cause() if "root cause" in str(error) else ""
        raise DeploymentFailed(f"vLLM cannot run {folder}: {cause or own}") from error
    return _gathered(engine, folder, cast(ToolParser, tool_parser))


def _gathered(engine: Any, folder: Path, tool_parser: ToolParser) -> Loaded:
    vllm_config = engine.vllm_config
    model = vllm_config.model_config
    if model.runner_type != "generate":
        engine.shutdown()
        raise ConfigurationError(f"{folder} is no text-generating model; the vllm engine runs no others yet")
    tokenizer = engine.get_tokenizer()
    if not hasattr(tokenizer, "apply_chat_template") or not hasattr(tokenizer, "convert_ids_to_tokens"):
        engine.shutdown()
        raise ConfigurationError("the vllm engine needs a tokenizer of Hugging Face's kind: set tokenizer_mode to hf")
    generation = _generation_config(model.try_get_generation_config())
    ends = _end_tokens(generation, model.hf_text_config, tokenizer)
    calls = choose_format(template_text(tokenizer), tool_parser)
    added = {token.content: number for number, token in tokenizer.added_tokens_decoder.items()}
    text = TextModel(
        model=SimpleNamespace(generation_config=generation),
        tokenizer=copy.deepcopy(tokenizer),
        device=str(vllm_config.device_config.device_type),
        context_length=int(model.max_model_len),
        vocabulary=int(model.get_vocab_size()),
        eos=ends,
        compat=_compat(folder, vllm_config, tokenizer, tool_parser),
        calls=calls,
        call_tokens={word: added[word] for word in (calls.markers if calls else ()) if word in added},
        grammars=None,  # vLLM holds answers to grammars itself
    )
    own = copy.deepcopy(tokenizer)
    return Loaded(
        engine=engine,
        text=text,
        tokenizer=own,
        texts=TokenTexts(own),
        slots=int(vllm_config.scheduler_config.max_num_seqs),
        max_logprobs=int(model.max_logprobs),
        adapters=vllm_config.lora_config is not None,
    )


def _generation_config(values: Mapping[str, Any]) -> Any:
    from transformers import GenerationConfig

    return GenerationConfig.from_dict(dict(values))


def _end_tokens(*holders: Any) -> frozenset[int]:
    ends: set[int] = set()
    for holder in holders:
        value = getattr(holder, "eos_token_id", None)
        ends.update(value if isinstance(value, list | tuple) else () if value is None else (value,))
    return frozenset(ends)


def _compat(folder: Path, vllm_config: Any, tokenizer: Any, tool_parser: str) -> str:
    import vllm

    model = vllm_config.model_config
    return fingerprint(
        Source(kind="text", folder=folder).files, "vllm", vllm.__version__, str(model.dtype), str(model.quantization),
        str(vllm_config.cache_config.cache_dtype), str(tokenizer.chat_template or ""), tool_parser,
    )  # fmt: skip
