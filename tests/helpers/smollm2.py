"""The real chat model that the tests use, converted once and kept between runs."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path

from modelbus_workers.smollm2 import packaged_gguf, smollm2_folder


@lru_cache(maxsize=1)
def smollm2() -> Path:
    """The folder of SmolLM2-135M-Instruct; in ``$MODELBUS_TEST_CACHE`` or ``.cache/models`` of the repository."""
    cache = os.environ.get("MODELBUS_TEST_CACHE") or Path(__file__).parents[2] / ".cache" / "models"
    return smollm2_folder(Path(cache))


def smollm2_gguf() -> Path:
    """The file that the package carries: weights of 4 and 8 bits."""
    return packaged_gguf()


def unpacked_gguf(file: Path, into: Path) -> Path:
    """The same model with weights of 16 bits, which lose next to nothing of what those of 4 bits say."""
    import gguf
    import numpy

    packed = gguf.GGUFReader(file)
    architecture = packed.fields["general.architecture"].contents()
    writer = gguf.GGUFWriter(into, architecture)
    for name, field in packed.fields.items():
        if not name.startswith("GGUF.") and name != "general.architecture":
            value = int(gguf.LlamaFileType.MOSTLY_F16) if name == "general.file_type" else field.contents()
            of_items = field.types[-1] if len(field.types) > 1 else None
            writer.add_key_value(name, value, field.types[0], sub_type=of_items)
    for tensor in packed.tensors:
        weights = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        writer.add_tensor(tensor.name, weights.astype(numpy.float16) if weights.ndim > 1 else weights)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return into


def smollm2_with(folder: Path, *, template: str, words: Mapping[str, bool]) -> Path:
    """The same weights with another chat template, and with words that are tokens of their own.

    ``words``: each takes the place of a special token that the model does not need; True: it stays special.
    """
    original = smollm2()
    folder.mkdir(parents=True)
    for file in original.iterdir():
        if file.name not in ("tokenizer.json", "chat_template.jinja"):
            (folder / file.name).symlink_to(file)
    tokenizer = json.loads((original / "tokenizer.json").read_text())
    unneeded = [token for token in tokenizer["added_tokens"] if not token["content"].startswith("<|")]
    for token, (word, special) in zip(unneeded, words.items(), strict=False):
        del tokenizer["model"]["vocab"][token["content"]]
        tokenizer["model"]["vocab"][word] = token["id"]
        token |= {"content": word, "special": special}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    (folder / "chat_template.jinja").write_text(template)
    return folder
