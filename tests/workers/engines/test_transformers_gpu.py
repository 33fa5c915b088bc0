"""The transformers engine on an NVIDIA GPU. Without one these tests are expected not to run, in CI too."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
import pytest_asyncio
from modelbus_workers.engines.base import EngineConfig

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from modelbus_workers.engines.transformers import TransformersEngine  # noqa: E402

from tests.helpers.smollm2 import smollm2  # noqa: E402
from tests.workers.engines.contract import CHECKS, Check, ask, chat, goes_on_anywhere  # noqa: E402

pytestmark = [
    pytest.mark.asyncio(loop_scope="module"),
    pytest.mark.timeout(300),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    # Not a skip: that would be a failure in CI, where every part but the hardware is installed.
    pytest.mark.xfail(not torch.cuda.is_available(), reason="PyTorch sees no GPU here", run=False),
]


async def started(dtype: str) -> TransformersEngine:
    params = {"device": "cuda", "dtype": dtype}
    engine = TransformersEngine(EngineConfig(model="m", model_path=str(smollm2()), params=params, slots=4))
    await engine.start()
    return engine


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def engine() -> AsyncIterator[TransformersEngine]:
    made = await started("float32")
    yield made
    await made.close()


async def test_the_weights_are_on_the_gpu(engine: TransformersEngine) -> None:
    assert engine._text is not None
    assert engine._text.model.device.type == "cuda"


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
async def test_the_engine_keeps_the_contract_on_a_gpu(check: Check, engine: TransformersEngine) -> None:
    await check(engine)


async def test_an_answer_made_on_a_gpu_goes_on_token_for_token(engine: TransformersEngine) -> None:
    await goes_on_anywhere(engine, chat("Repeat exactly: 🦙🎉 日本語 é", max_tokens=20, stop=["語x"]))


async def test_bfloat16_weights_know_the_capital_of_france() -> None:
    engine = await started("bfloat16")
    try:
        assert engine._text is not None and engine._text.model.dtype == torch.bfloat16
        answer = await ask(engine, chat("What is the capital of France?", max_tokens=24))
    finally:
        await engine.close()

    assert "Paris" in answer.texts[0]
