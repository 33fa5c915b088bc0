"""The vllm engine on a model that reads images. Run inside .venv-vllm; see test_vllm_environment.py."""

from __future__ import annotations

import io
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio
from modelbus_broker.errors import ContextLengthExceeded, InvalidRequest
from modelbus_workers.engines.base import EngineConfig
from modelbus_workers.engines.vllm import VllmEngine

from tests.helpers.pictures import data_url, picture, question, tiny_idefics
from tests.helpers.vllm_forks import vllm_forks
from tests.workers.engines.contract import ask, goes_on_anywhere

pytestmark = [
    pytest.mark.asyncio(loop_scope="module"),
    pytest.mark.timeout(300),
    pytest.mark.filterwarnings("ignore"),
]

PARAMS = {
    "dtype": "float32", "enforce_eager": "true", "kv_cache_memory_bytes": str(16 << 20), "max_model_len": "256",
    "max_num_seqs": "4", "max_images": "2",
}  # fmt: skip
RED, BLUE = data_url(picture("red")), data_url(picture("blue", "JPEG"), "jpeg")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_idefics(tmp_path_factory.mktemp("idefics"))


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def engine(folder: Path) -> AsyncIterator[VllmEngine]:
    engine = VllmEngine(EngineConfig(model="m", model_path=str(folder), params=PARAMS))
    with pytest.MonkeyPatch.context() as patch, vllm_forks():
        patch.setenv("TORCHDYNAMO_DISABLE", "1")
        await engine.start()
    yield engine
    await engine.close()


async def test_an_answer_is_that_of_the_library_and_depends_on_the_picture(engine: VllmEngine, folder: Path) -> None:
    import torch
    import transformers
    from PIL import Image

    assert engine.capabilities().vision
    plain, red = await ask(engine, question()), await ask(engine, question(RED))
    both = await ask(engine, question(RED, BLUE, text="And these?"))
    blue = await ask(engine, question(BLUE))
    assert red.prompt_tokens == red.usage.prompt_tokens == (plain.prompt_tokens or 0) + 4
    assert len({str(answer.token_ids) for answer in (plain, red, both, blue)}) == 4

    processor = transformers.AutoProcessor.from_pretrained(folder)
    model = transformers.Idefics3ForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    turn = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is this?"}]}
    text = processor.apply_chat_template([turn], add_generation_prompt=True)
    inputs = processor(text=[text], images=[Image.open(io.BytesIO(picture("red")))], return_tensors="pt")
    made = model.generate(**inputs, max_new_tokens=6, min_new_tokens=6, do_sample=False)
    assert red.token_ids[0] == made[0, inputs["input_ids"].shape[1] :].tolist()


async def test_answers_about_pictures_go_on(engine: VllmEngine) -> None:
    await goes_on_anywhere(engine, question(RED, BLUE))


async def test_what_is_no_picture_or_too_much_is_refused_by_name(engine: VllmEngine) -> None:
    for urls, param in (
        ((data_url(b"no picture"),), "messages[0].content[0].image_url"),
        (("http://127.0.0.1:9/cat.png",), "messages[0].content[0].image_url"),
        ((RED, RED, BLUE), "messages"),
    ):
        with pytest.raises(InvalidRequest) as refused:
            await ask(engine, question(*urls))
        assert refused.value.param == param
    with pytest.raises(ContextLengthExceeded, match="256"):
        await ask(engine, question(RED, max_tokens=250))
