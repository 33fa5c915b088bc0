"""The vllm engine over several devices: what a replica has claimed spreads the model, and the answer stays the same."""

from __future__ import annotations

from pathlib import Path

import pytest
from modelbus_workers.engines.base import EngineConfig
from modelbus_workers.engines.vllm import VllmEngine

from tests.helpers.smollm2 import smollm2
from tests.helpers.vllm_forks import vllm_forks
from tests.workers.engines.contract import ask, chat, goes_on_anywhere

pytestmark = [pytest.mark.asyncio, pytest.mark.timeout(300), pytest.mark.filterwarnings("ignore")]

PARAMS = {
    "dtype": "float32", "enforce_eager": "true", "kv_cache_memory_bytes": str(16 << 20), "max_model_len": "256",
    "max_num_seqs": "4",
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two layers of random weights with heads that two devices can share: SmolLM2 has nine."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("tiny") / "model"
    folder.mkdir()
    for file in smollm2().iterdir():
        if file.suffix != ".safetensors" and file.name != "config.json":
            (folder / file.name).symlink_to(file)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=49152, hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, initializer_range=0.3, tie_word_embeddings=True,
        bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


async def answer(folder: Path, gpus: int) -> tuple[int, list[int]]:
    """How many processes hold a part of the model, and what it says."""
    engine = VllmEngine(EngineConfig(model="m", model_path=str(folder), params=PARAMS, gpus=tuple(range(gpus))))
    task = chat("What is the capital of France?", max_tokens=12, ignore_eos=True)
    with pytest.MonkeyPatch.context() as patch, vllm_forks():
        patch.setenv("TORCHDYNAMO_DISABLE", "1")
        # On a CPU vLLM wants to be told which cores each of its processes has.
        patch.setenv("VLLM_CPU_OMP_THREADS_BIND", "|".join(["0"] * max(1, gpus)))
        await engine.start()
    try:
        said = (await ask(engine, task)).token_ids[0]
        await goes_on_anywhere(engine, task, cuts=(5,))
        return int(engine._running.engine.vllm_config.parallel_config.world_size), said
    finally:
        await engine.close()


async def test_a_model_in_parts_says_what_it_says_in_one_piece(folder: Path) -> None:
    """Two devices that were claimed are tensor parallel by themselves. (vLLM 0.32 for CPUs has no pipeline in eager mode.)"""
    _, alone = await answer(folder, 0)

    assert await answer(folder, 2) == (2, alone)
