"""Weights in fewer bits, on the CPU: bitsandbytes while loading; and what is said where a library is missing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from modelbus_broker.errors import ConfigurationError, MissingExtra, ModelBusError
from modelbus_broker.messages import Adapter
from modelbus_workers.engines.base import EngineConfig

pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("bitsandbytes")

from modelbus_workers.engines.transformers import TransformersEngine

from tests.helpers.adapters import smollm2_adapter
from tests.helpers.smollm2 import smollm2
from tests.workers.engines.contract import ask, chat

pytestmark = [
    pytest.mark.timeout(300),
    # The libraries' own deprecations are not ours to repair.
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

FULL_MB = 513


async def started(path: Path, **params: str) -> TransformersEngine:
    params = {"num_threads": "1", "dtype": "float32", "device": "cpu"} | params
    engine = TransformersEngine(EngineConfig(model="m", model_path=str(path), params=params))
    try:
        await engine.start()
    except ModelBusError:
        await engine.close()
        raise
    return engine


def size_mb(engine: TransformersEngine) -> int:
    assert engine._text is not None
    return int(engine._text.model.get_memory_footprint()) >> 20


async def test_four_bits_answer_and_carry_an_adapter(tmp_path: Path) -> None:
    engine = await started(smollm2(), load_in_4bit="true")
    plain = await ask(engine, chat("What is the capital of France?", max_tokens=6))
    assert "Paris" in plain.texts[0]
    assert size_mb(engine) < FULL_MB / 3
    adapter = Adapter(name="pirate", path=str(smollm2_adapter(tmp_path / "pirate", seed=2)))
    assert (await ask(engine, chat("What is the capital of France?", max_tokens=2), adapter=adapter)).texts[0] != ""
    assert engine._adapters is not None and len(engine._adapters) == 1
    four_bits = engine.compat()
    await engine.close()

    engine = await started(smollm2(), load_in_8bit="true")
    assert "The capital" in (await ask(engine, chat("What is the capital of France?", max_tokens=2))).texts[0]
    assert size_mb(engine) < FULL_MB / 2
    # Others than four bits go on from other tokens.
    assert engine.compat() != four_bits
    await engine.close()


def quantized_by(folder: Path, method: str, **said: Any) -> Path:
    folder.mkdir()
    for file in smollm2().iterdir():
        if file.name != "config.json":
            (folder / file.name).symlink_to(file)
    config = json.loads((smollm2() / "config.json").read_text())
    config["quantization_config"] = {"quant_method": method, **said}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


async def test_what_cannot_be_is_said_in_words_that_help(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gptq = quantized_by(tmp_path / "gptq", "gptq", bits=4)
    awq = quantized_by(tmp_path / "awq", "awq", bits=4, group_size=128, version="gemm", zero_point=True)
    fp8 = quantized_by(tmp_path / "fp8", "fbgemm_fp8")
    wrong: list[tuple[Path, dict[str, str], type[ModelBusError], str]] = [
        (gptq, {}, MissingExtra, "GPTQ quantized model requires optimum .*pip install optimum"),
        (awq, {}, MissingExtra, "AWQ quantized model requires gptqmodel.*pip install gptqmodel"),
        (awq, {"load_in_4bit": "true"}, ConfigurationError, r"quantized already \(awq\): leave load_in_4bit out"),
        (smollm2(), {"load_in_4bit": "true", "load_in_8bit": "true"}, ConfigurationError, "exclude each other"),
    ]
    import torch

    if not torch.cuda.is_available():
        wrong.append((fp8, {}, MissingExtra, "fp8 quantization requires a GPU"))
    for path, params, kind, words in wrong:
        with pytest.raises(kind, match=words):
            await started(path, **params)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingExtra, match=r"load_in_8bit needs bitsandbytes: pip install 'modelbus\[quantization\]'"):
        await started(smollm2(), load_in_8bit="true")
