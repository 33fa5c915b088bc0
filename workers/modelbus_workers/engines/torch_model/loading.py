"""A folder or a file becomes a model and a tokenizer, or an error that says what is wrong with it."""

from __future__ import annotations

import importlib.util
import logging
import math
import os
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import msgspec
from modelbus_broker.errors import ConfigurationError, DeploymentFailed, MissingExtra

from ..base import EngineConfig
from .call_formats import CallFormat, choose_format, knows_tools
from .fingerprint import fingerprint
from .grammar import Grammars
from .quantizing import asked, quantization_options
from .settings import TransformersSettings

log = logging.getLogger(__name__)

#: Types of the seed that are one and the same here: the architecture stands in the model's own files.
_TEXT_TYPES = (
    "auto", "llama", "llama2", "chatglm2", "chatglm6b", "zephyr", "starcode", "moss", "alpha_moss", "dolly", "baichuan",
    "falcon", "qwen",
)  # fmt: skip
_EMBEDDING_TYPES = ("bge", "m3e")


class Source(msgspec.Struct, frozen=True, kw_only=True):
    """Where the weights are and what they are."""

    kind: Literal["text", "embedding", "head"]
    folder: Path
    gguf: str = ""  #: the file inside the folder
    normalize: bool = False  #: embeddings get length 1 even if the folder does not say so

    @property
    def files(self) -> list[Path]:
        if self.gguf:
            return [self.folder / self.gguf]
        return [file for file in self.folder.rglob("*") if file.is_file() and not file.name.startswith(".")]


@dataclass(frozen=True)
class TextModel:
    """A loaded language model; torch and transformers ship no types that help here."""

    model: Any
    tokenizer: Any
    device: str
    context_length: int
    vocabulary: int
    eos: frozenset[int]
    compat: str
    calls: CallFormat | None  #: how it writes tool calls; None: not known
    #: words of that format that are tokens of their own
    call_tokens: dict[str, int]
    grammars: Grammars | None  #: None: its tokenizer is not one that grammars can be made for
    processor: Any = None  #: makes what the model reads of images; None: it reads text only

    @property
    def template(self) -> str:
        """All of the chat template, to look for words in; "" if there is none."""
        return template_text(self.tokenizer)

    @property
    def native_tools(self) -> bool:
        """The model was made to call tools: its own template shows them."""
        return self.calls is not None and knows_tools(self.template)


def find_source(config: EngineConfig) -> Source:
    """What lies at the deployment's model path.

    Raises:
        ConfigurationError: no path, nothing there, a type that this engine does not know, or an unclear folder.
    """
    kind = config.pretrained_model_type.lower().removeprefix("custom/") or "auto"
    if kind not in _TEXT_TYPES + _EMBEDDING_TYPES:
        known = ", ".join(f"custom/{name}" for name in _TEXT_TYPES + _EMBEDDING_TYPES)
        raise ConfigurationError(
            f"the transformers engine has no type {config.pretrained_model_type!r}; known are: {known}"
        )
    if not config.model_path:
        raise ConfigurationError("the transformers engine needs --model_path: a folder with safetensors or a GGUF file")
    path = Path(config.model_path).expanduser()
    if not path.exists():
        raise ConfigurationError(f"model path {config.model_path} does not exist on this node")
    if path.is_file():
        if path.suffix != ".gguf":
            raise ConfigurationError(f"model path {path} is a file that is no .gguf; give the model's folder")
        return Source(kind="text", folder=path.parent, gguf=path.name)
    if _has_head(path / "config.json"):
        return Source(kind="head", folder=path)
    if (path / "modules.json").is_file() or kind in _EMBEDDING_TYPES:
        return Source(kind="embedding", folder=path, normalize=kind == "bge")
    if (path / "config.json").is_file():
        return Source(kind="text", folder=path)
    ggufs = sorted(file.name for file in path.glob("*.gguf"))
    if len(ggufs) > 1:
        raise ConfigurationError(f"{path} has several GGUF files; name one as the model path: {', '.join(ggufs)}")
    if not ggufs:
        raise ConfigurationError(f"{path} has no model: neither config.json nor modules.json nor a .gguf file")
    return Source(kind="text", folder=path, gguf=ggufs[0])


def _has_head(config: Path) -> bool:
    """Whether it is the config of a model that scores or classifies. What cannot be read is told of by the library."""
    try:
        said = msgspec.json.decode(config.read_bytes(), type=_Architectures)
    except (OSError, msgspec.DecodeError):
        return False
    return any(name.endswith("ForSequenceClassification") for name in said.architectures or ())


class _Architectures(msgspec.Struct):
    architectures: list[str] | None = None


def choose_device(settings: TransformersSettings, gpus: tuple[int, ...]) -> str:
    """The torch device to load on.

    Raises:
        ConfigurationError: a GPU is asked for and torch sees none.
    """
    import torch

    available = torch.cuda.is_available()
    wanted = settings.device
    if wanted == "auto":
        wanted = "cuda" if gpus or available else "cpu"
    if wanted.startswith("cuda") and not available:
        raise ConfigurationError(f"device {wanted!r} is asked for, but PyTorch {torch.__version__} sees no GPU here")
    try:
        torch.device(wanted)
    except RuntimeError as error:
        raise ConfigurationError(f"parameter device: {error}") from None
    return wanted


def set_threads(settings: TransformersSettings, cpus: float) -> None:
    """How many threads PyTorch computes with; process wide."""
    import torch

    threads = settings.num_threads or (math.ceil(cpus) if cpus >= 1 else 0)
    if threads:
        torch.set_num_threads(threads)


def load_text_model(source: Source, settings: TransformersSettings, device: str, gpus: int) -> TextModel:
    """Loads a language model; blocks for seconds to minutes.

    Raises:
        ConfigurationError: the folder is not one of a text model, or a setting does not fit the model.
        MissingExtra: a library that these weights need is not installed.
        DeploymentFailed: the library refused; its own words are in the message.
    """
    began = time.monotonic()
    size = sum(file.stat().st_size for file in source.files) >> 20
    log.info("loading %s (%d MB) on %s", source.folder / source.gguf, size, device)
    if source.gguf:
        log.info("GGUF weights are unpacked at every start; this takes up to a minute")
    with loading_errors(source):
        model, tokenizer, processor = _from_pretrained(source, settings, device, gpus)
    text_config = model.config.get_text_config()
    log.info("loaded %s on %s in %.1f s", type(model).__name__, device, time.monotonic() - began)
    vocabulary = int(model.get_output_embeddings().weight.shape[0])
    ends = _end_tokens(model, tokenizer)
    calls = choose_format(template_text(tokenizer), settings.tool_parser)
    return TextModel(
        model=model,
        tokenizer=tokenizer,
        device=device,
        context_length=context_length(text_config, tokenizer, settings.max_model_len),
        vocabulary=vocabulary,
        eos=ends,
        compat=_compat(source, model, tokenizer, settings),
        calls=calls,
        call_tokens=_tokens_of(tokenizer, calls.markers) if calls else {},
        processor=processor,
        grammars=_grammars(tokenizer, vocabulary, ends),
    )


def load_assistant(settings: TransformersSettings, device: str) -> tuple[Any, Any]:
    """The model that guesses for another one, and its tokenizer.

    Raises what ``load_text_model`` raises.
    """
    config = EngineConfig(model="assistant", model_path=settings.assistant_model)
    try:
        source = find_source(config)
    except ConfigurationError as error:
        raise ConfigurationError(f"assistant_model: {error.message}") from None
    if source.kind != "text":
        raise ConfigurationError(f"assistant_model {settings.assistant_model} is no language model")
    with loading_errors(source):
        return _from_pretrained(source, settings, device, 1)[:2]


def template_text(tokenizer: Any) -> str:
    """The chat template of a tokenizer; all of them if it has several; "" if it has none."""
    template = tokenizer.chat_template or ""
    return template if isinstance(template, str) else " ".join(template.values())


def _tokens_of(tokenizer: Any, words: Sequence[str]) -> dict[str, int]:
    added = {token.content: number for number, token in tokenizer.added_tokens_decoder.items()}
    return {word: added[word] for word in words if word in added}


def _grammars(tokenizer: Any, vocabulary: int, ends: frozenset[int]) -> Grammars | None:
    try:
        return Grammars.of_tokenizer(tokenizer, vocabulary, frozenset(end for end in ends if end < vocabulary))
    except Exception as error:  # a tokenizer with code of its own, or of an unknown kind
        log.warning("no grammars for this model: %s: %s", type(error).__name__, error)
        return None


def _from_pretrained(source: Source, settings: TransformersSettings, device: str, gpus: int) -> tuple[Any, Any, Any]:
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    known: dict[str, Any] = {"trust_remote_code": settings.trust_remote_code, "local_files_only": True}
    kind, processor = AutoModelForCausalLM, None
    if source.gguf:
        known["gguf_file"] = source.gguf
    else:
        model_config = AutoConfig.from_pretrained(source.folder, **known)
        names = list(model_config.architectures or ())
        causal = set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values())
        if _reads_images(source.folder, names):
            kind, processor = _image_classes(source.folder, known)
        elif names and not causal.intersection(names) and not getattr(model_config, "auto_map", None):
            raise ConfigurationError(
                f"{source.folder} holds a {names[0]}, which is no text-generating model that the transformers engine runs"
            )
    tokenizer = processor.tokenizer if processor else AutoTokenizer.from_pretrained(source.folder, **known)
    if processor and not tokenizer.chat_template:
        tokenizer.chat_template = processor.chat_template
    options = dict(known)
    if settings.attn_implementation:
        options["attn_implementation"] = settings.attn_implementation
    if device != "cpu":
        options["device_map"] = "auto" if gpus > 1 else device
    dtype = settings.torch_dtype(device)
    options |= quantization_options(settings, device, dtype)
    model = kind.from_pretrained(source.folder, dtype=dtype, **options)
    return model.eval(), tokenizer, processor


def _reads_images(folder: Path, architectures: Sequence[str]) -> bool:
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

    # Some architectures are both: then it depends on whether the folder says how images are made ready.
    known = set(MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.values())
    ready = any((folder / name).is_file() for name in ("preprocessor_config.json", "processor_config.json"))
    return ready and bool(known.intersection(architectures))


def _image_classes(folder: Path, known: dict[str, Any]) -> tuple[Any, Any]:
    """The class of the model, and the processor."""
    if importlib.util.find_spec("PIL") is None:
        raise MissingExtra("models that read images need pillow: pip install 'modelbus[transformers]'")
    from transformers import AutoModelForImageTextToText, AutoProcessor

    return AutoModelForImageTextToText, AutoProcessor.from_pretrained(folder, **known)


@contextmanager
def loading_errors(source: Source) -> Iterator[None]:
    """Turns what the libraries raise while they load into errors with their words and ours."""
    from transformers.utils import logging as library_logging

    # Its bars would be the last thing on stderr, where a failed worker's last words are looked for.
    library_logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except (ConfigurationError, MissingExtra):
        raise
    except ImportError as error:
        raise MissingExtra(f"{source.folder} cannot be loaded: {error}") from error
    except Exception as error:
        if is_out_of_memory(error):
            raise DeploymentFailed(f"out of memory while loading {source.folder}: {error}") from error
        raise DeploymentFailed(f"{source.folder} cannot be loaded: {type(error).__name__}: {error}") from error


def is_out_of_memory(error: BaseException) -> bool:
    import torch

    if isinstance(error, (MemoryError, torch.cuda.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)


def context_length(config: Any, tokenizer: Any, wanted: int) -> int:
    """How many tokens the model takes: ``wanted``, or if that is 0 what it was made for.

    Raises:
        ConfigurationError: more is wanted.
    """
    names = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length")
    limits = [value for name in names if (value := getattr(config, name, None))]
    # A tokenizer that does not know says 10^30.
    limits += [tokenizer.model_max_length] if 0 < tokenizer.model_max_length < 10**9 else []
    made_for = min(limits, default=0)
    if wanted < 0 or (made_for and wanted > made_for):
        raise ConfigurationError(f"max_model_len is {wanted}, but the model was made for 1 to {made_for} tokens")
    return wanted or made_for or 2048


def _end_tokens(model: Any, tokenizer: Any) -> frozenset[int]:
    ends: set[int] = set()
    for holder in (model.generation_config, model.config.get_text_config(), tokenizer):
        value = getattr(holder, "eos_token_id", None)
        ends.update(value if isinstance(value, list | tuple) else () if value is None else (value,))
    return frozenset(ends)


def _compat(source: Source, model: Any, tokenizer: Any, settings: TransformersSettings) -> str:
    import transformers

    # Another version may allow other tokens where a grammar leaves a choice.
    grammars = ".".join(version("llguidance").split(".")[:2])
    return fingerprint(
        source.files, "transformers", transformers.__version__.split(".")[0], str(model.dtype),
        str(tokenizer.chat_template or ""), os.fspath(settings.attn_implementation), settings.tool_parser, grammars,
        *((asked(settings), settings.bnb_4bit_quant_type, str(settings.bnb_4bit_use_double_quant)) if asked(settings) else ()),
    )  # fmt: skip
