"""vLLM is started with a model, and what the prompts and the texts need of the model is gathered."""

from __future__ import annotations

import copy
import json
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast, get_args

import msgspec
from modelbus_broker.errors import ConfigurationError, DeploymentFailed

from ..base import EngineConfig
from ..torch_model.call_formats import ToolParser, choose_format
from ..torch_model.fingerprint import fingerprint
from ..torch_model.loading import Source, TextModel, template_text
from ..torch_model.text import TokenTexts
from .adapters import Adapters
from .arguments import OwnParams, engine_arguments, own_params
from .last_words import LastWords
from .pooling import Pooler
from .reading import Names, Readers, choose_names

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Loaded:
    """A running vLLM; it ships no types that help here."""

    engine: Any  #: AsyncLLM
    own: OwnParams
    text: TextModel  #: its tokenizer belongs to the thread that makes prompts
    tokenizer: Any  #: belongs to the event loop
    texts: TokenTexts
    slots: int
    max_logprobs: int
    adapters: Adapters | None  #: None: it takes none
    grammars_go_on: bool  #: they can read an earlier run's tokens
    obeys_biases: bool  #: of the logits
    readers: Readers


@dataclass(frozen=True)
class Started:
    """vLLM runs; what kind of model it is decides over the rest."""

    engine: Any  #: AsyncLLM
    folder: Path
    tokenizer: Any
    own: OwnParams
    names: Names

    @property
    def pools(self) -> bool:
        """Whether it is a model that embeds, scores or classifies."""
        return str(self.engine.vllm_config.model_config.runner_type) == "pooling"


def start(config: EngineConfig, count_step: Callable[[], object]) -> Started:
    """Starts vLLM; blocks for seconds to minutes.

    Args:
        count_step: called for each step of its engine core.

    Raises:
        ConfigurationError: a parameter or the model path is wrong.
        DeploymentFailed: vLLM cannot run the model; the message has the root cause in its words.
    """
    if not config.model_path:
        raise ConfigurationError("the vllm engine needs --model_path: a folder with safetensors")
    folder = Path(config.model_path).expanduser()
    if not (folder / "config.json").is_file():
        raise ConfigurationError(f"model path {config.model_path} is no folder with a config.json on this node")
    own, params = own_params(config.params)
    template = own.chat_template or _template_in(folder)
    names = choose_names(folder, template, own.reasoning_parser, own.tool_parser)
    if names.reasoning:
        # The engine core holds an answer to its form only when the reasoning has ended.
        params["reasoning_parser"] = names.reasoning
    # A fork would inherit this process's threads and its connections to the bus.
    os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")

    from vllm import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    arguments = engine_arguments(AsyncEngineArgs, config, params)
    words = LastWords()
    try:
        with words.listen():
            engine = _started(AsyncLLM, AsyncEngineArgs(**arguments), count_step)
    except Exception as error:
        own_words = f"{type(error).__name__}: {error}"
        cause = words.cause() if "root cause" in str(error) else ""
        raise DeploymentFailed(f"vLLM cannot run {folder}: {cause or own_words}") from error
    tokenizer = engine.get_tokenizer()
    if not hasattr(tokenizer, "apply_chat_template") or not hasattr(tokenizer, "convert_ids_to_tokens"):
        engine.shutdown()
        raise ConfigurationError("the vllm engine needs a tokenizer of Hugging Face's kind: set tokenizer_mode to hf")
    return Started(engine=engine, folder=folder, tokenizer=tokenizer, own=own, names=names)


def _started(kind: Any, arguments: Any, count_step: Callable[[], object]) -> Any:
    """As ``from_engine_args`` does, but for what ``settled`` does."""
    from vllm.usage.usage_lib import UsageContext

    from .steps import step_counter

    return kind.from_vllm_config(
        settled(arguments),
        usage_context=UsageContext.OPENAI_API_SERVER,
        stat_loggers=[step_counter(count_step)],
        enable_log_requests=arguments.enable_log_requests,
        disable_log_stats=arguments.disable_log_stats,
    )


def settled(arguments: Any) -> Any:
    """vLLM's whole configuration from its ``AsyncEngineArgs``, with what it settles itself where they say nothing.

    That is as for ``vllm serve``: how many requests and tokens a step takes depends on what an engine is for, and one that
    says nothing of it gets an eighth of the requests and a quarter of the tokens on a large GPU. The scheduler, if it is
    not chosen, can be set only when the rest is known.
    """
    from vllm.usage.usage_lib import UsageContext

    made = arguments.create_engine_config(UsageContext.OPENAI_API_SERVER)
    if made.scheduler_config.scheduler_cls is None and made.model_config.runner_type == "generate":
        from .schedulers import scheduler_name

        made.scheduler_config.scheduler_cls = scheduler_name(made.scheduler_config.async_scheduling)
    return made


def text_model(started: Started) -> Loaded:
    """What a language model's answers need."""
    engine, tokenizer, own = started.engine, started.tokenizer, started.own
    vllm_config = engine.vllm_config
    model = vllm_config.model_config
    if own.chat_template:
        tokenizer = copy.deepcopy(tokenizer)
        tokenizer.chat_template = own.chat_template
    generation = _generation_config(model.try_get_generation_config())
    ends = _end_tokens(generation, model.hf_text_config, tokenizer)
    ours = cast(ToolParser, own.tool_parser) if own.tool_parser in get_args(ToolParser) else "none"
    calls = choose_format(template_text(tokenizer), ours)
    # What both can read is read by us: that also goes on in the middle of a call, and can be held to its form.
    names = msgspec.structs.replace(started.names, calls="" if calls else started.names.calls)
    added = {token.content: number for number, token in tokenizer.added_tokens_decoder.items()}
    text = TextModel(
        model=SimpleNamespace(generation_config=generation),
        tokenizer=copy.deepcopy(tokenizer),
        device=str(vllm_config.device_config.device_type),
        context_length=int(model.max_model_len),
        vocabulary=int(model.get_vocab_size()),
        eos=ends,
        compat=_compat(started, tokenizer),
        calls=calls,
        call_tokens={word: added[word] for word in (calls.markers if calls else ()) if word in added},
        processor=_image_processor(model),
        grammars=None,  # vLLM holds answers to grammars itself
    )
    texts = copy.deepcopy(tokenizer)
    return Loaded(
        engine=engine,
        own=own,
        text=text,
        tokenizer=texts,
        texts=TokenTexts(texts),
        slots=int(vllm_config.scheduler_config.max_num_seqs),
        max_logprobs=int(model.max_logprobs),
        adapters=Adapters(engine) if vllm_config.lora_config is not None else None,
        grammars_go_on=str(vllm_config.scheduler_config.scheduler_cls).startswith(__package__ or "-"),
        obeys_biases=vllm_config.speculative_config is None,
        readers=Readers(names, texts, model),
    )


def pooling_model(started: Started, supported: Sequence[str]) -> Pooler:
    """What a model that embeds, scores or classifies needs; ``supported``: vLLM's tasks of it.

    Raises:
        ConfigurationError: it is for other things.
    """
    tokenizer = copy.deepcopy(started.tokenizer)
    compat = _compat(started, tokenizer)
    return Pooler(started.engine, started.folder, supported, tokenizer, compat, started.own.chat_template)


def _image_processor(model: Any) -> Any:
    """What makes vLLM's images ready; None: the model reads none."""
    if not model.is_multimodal_model:
        return None
    from vllm.transformers_utils.processor import cached_processor_from_config

    processor: Any = cached_processor_from_config(model)
    return processor if getattr(processor, "image_processor", None) is not None else None


def _template_in(folder: Path) -> str:
    """The text of the chat template as it lies in the folder, to look for words in."""
    found = []
    for file in (*folder.glob("*.jinja"), folder / "tokenizer_config.json"):
        try:
            text = file.read_text()
            found.append(text if file.suffix == ".jinja" else str(json.loads(text).get("chat_template") or ""))
        except (OSError, ValueError, AttributeError):
            continue  # what is wrong with it vLLM tells in its own words
    return " ".join(found)


def _generation_config(values: Mapping[str, Any]) -> Any:
    from transformers import GenerationConfig

    return GenerationConfig.from_dict(dict(values))


def _end_tokens(*holders: Any) -> frozenset[int]:
    ends: set[int] = set()
    for holder in holders:
        value = getattr(holder, "eos_token_id", None)
        ends.update(value if isinstance(value, list | tuple) else () if value is None else (value,))
    return frozenset(ends)


def _compat(started: Started, tokenizer: Any) -> str:
    import vllm

    vllm_config = started.engine.vllm_config
    model = vllm_config.model_config
    return fingerprint(
        Source(kind="text", folder=started.folder).files, "vllm", vllm.__version__, str(model.dtype),
        str(model.quantization), str(vllm_config.cache_config.cache_dtype), str(tokenizer.chat_template or ""),
        started.own.tool_parser, started.names.reasoning, started.names.calls,
    )  # fmt: skip
