"""One forward pass for all requests: the same tokens as alone, in fewer steps, and only with models where that is so."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest
import pytest_asyncio
from modelbus_broker.messages import Chat
from modelbus_workers.engines.base import EngineConfig

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from modelbus_workers.engines.torch_model.batch import Decoder  # noqa: E402
from modelbus_workers.engines.transformers import TransformersEngine  # noqa: E402

from tests.helpers.smollm2 import smollm2  # noqa: E402
from tests.workers.engines.contract import Answer, ask, chat, outputs_of  # noqa: E402

pytestmark = [
    pytest.mark.asyncio(loop_scope="module"),
    pytest.mark.timeout(300),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def engine() -> AsyncIterator[TransformersEngine]:
    params = {"num_threads": "1", "dtype": "float32", "device": "cpu", "continuous_batching": "true"}
    made = TransformersEngine(EngineConfig(model="m", model_path=str(smollm2()), params=params))
    await made.start()
    yield made
    await made.close()


async def test_requests_that_join_and_leave_get_the_tokens_they_get_alone_in_fewer_steps(
    engine: TransformersEngine,
) -> None:
    tasks = [
        chat("What is the capital of France?", max_tokens=9),
        chat("Repeat exactly: 🦙🎉 日本語 é", max_tokens=5, logprobs=2),
        chat("Name a colour.", max_tokens=7, temperature=1.0, seed=3, n=2),
    ]

    async def at(steps: int, task: Chat) -> Answer:
        while engine.steps < steps:
            await asyncio.sleep(0.001)
        return await ask(engine, task)

    begun = engine.steps
    alone = [await ask(engine, task) for task in tasks]
    between = engine.steps
    together = await asyncio.gather(*(at(between + 2 * place, task) for place, task in enumerate(tasks)))

    assert engine.slots == 8
    assert [answer.token_ids for answer in together] == [answer.token_ids for answer in alone]
    assert engine.steps - between < between - begun


async def test_one_that_leaves_early_does_not_disturb_the_others(engine: TransformersEngine) -> None:
    task = chat("What is the capital of France?", max_tokens=8)
    alone = await ask(engine, task)
    leaving = outputs_of(engine, chat("Tell me a very long story.", max_tokens=400))

    staying = asyncio.create_task(ask(engine, task))
    for _ in range(4):
        await anext(leaving)
    await leaving.aclose()

    assert (await staying).token_ids == alone.token_ids
    assert engine._stepper is not None and not engine._stepper._decoder._batches


def tiny(name: str, **config: Any) -> Any:
    import transformers

    torch.manual_seed(0)
    made = getattr(transformers, f"{name}Config")(vocab_size=64, **config)
    return getattr(transformers, f"{name}ForCausalLM" if name != "GPT2" else "GPT2LMHeadModel")(made).eval()


SMALL: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
}  # fmt: skip
DYNAMIC = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}


@pytest.mark.parametrize(
    ("name", "config", "together"),
    [
        ("Llama", SMALL, True),
        ("GPT2", {"n_embd": 32, "n_layer": 2, "n_head": 4}, True),
        ("Mistral", SMALL | {"sliding_window": 8}, False),
        ("Llama", SMALL | {"rope_parameters": DYNAMIC}, False),
        ("Bloom", {"hidden_size": 32, "n_layer": 2, "n_head": 4}, False),
    ],
)
async def test_only_models_whose_sequences_do_not_feel_each_other_are_read_together(
    name: str, config: dict[str, Any], together: bool
) -> None:
    assert Decoder(tiny(name, **config), lambda: None).together is together
