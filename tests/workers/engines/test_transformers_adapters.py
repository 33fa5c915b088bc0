"""LoRA adapters over SmolLM2: each request its own, at the same time, and the model itself unharmed."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio
from modelbus_broker.errors import AdapterUnavailable
from modelbus_broker.messages import Adapter, Chat
from modelbus_workers.engines.base import EngineConfig

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("peft")

from modelbus_workers.engines.transformers import TransformersEngine  # noqa: E402

from tests.helpers.adapters import smollm2_adapter  # noqa: E402
from tests.helpers.smollm2 import smollm2  # noqa: E402
from tests.workers.engines.contract import (  # noqa: E402
    Answer,
    ask,
    chat,
    check_an_adapter_that_is_not_here_is_told_of_with_the_host,
    goes_on_anywhere,
    outputs_of,
)

pytestmark = [
    pytest.mark.asyncio(loop_scope="module"),
    pytest.mark.timeout(300),
    # The libraries' own deprecations are not ours to repair.
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

PARIS = chat("What is the capital of France?", max_tokens=6, logprobs=2)
SHORT = chat("What is the capital of France?", max_tokens=2, logprobs=2)
NAMES = ("pirate", "poet", "cook")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def engine() -> AsyncIterator[TransformersEngine]:
    params = {
        "num_threads": "1",
        "dtype": "float32",
        "device": "cpu",
        "continuous_batching": "true",
        "max_adapters": "2",
    }
    made = TransformersEngine(EngineConfig(model="m", model_path=str(smollm2()), params=params))
    await made.start()
    yield made
    await made.close()


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("adapters")
    return {name: smollm2_adapter(folder / name, seed=seed) for seed, name in zip((1, 2, 6), NAMES, strict=True)}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def adapters(engine: TransformersEngine, folders: dict[str, Path]) -> dict[str, Adapter]:
    found = {}
    for name, folder in folders.items():
        adapter = Adapter(name=name, path=str(folder))
        found[name] = Adapter(name=name, path=str(folder), fingerprint=await engine.check_adapter(adapter))
    return found


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def plain(engine: TransformersEngine) -> Answer:
    """What the model says before any adapter was near it."""
    return await ask(engine, PARIS)


async def test_an_answer_with_an_adapter_is_what_the_library_gives_and_without_one_nothing_has_changed(
    engine: TransformersEngine, plain: Answer, adapters: dict[str, Adapter]
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    assert engine.capabilities().adapters
    pirate = await ask(engine, PARIS, adapter=adapters["pirate"])
    again = await ask(engine, PARIS)
    assert again == plain and plain.texts[0].startswith("The capital of France is Paris")
    assert pirate.texts != plain.texts
    assert pirate.finished and adapters["pirate"].fingerprint in pirate.finished.system_fingerprint

    text = engine._text
    assert text is not None
    prompt = text.tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}], add_generation_prompt=True, return_tensors="pt"
    )
    model = AutoModelForCausalLM.from_pretrained(smollm2(), dtype=torch.float32)
    over = PeftModel.from_pretrained(model, adapters["pirate"].path).eval()
    with torch.inference_mode():
        made = over.generate(**prompt, max_new_tokens=6, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    assert pirate.token_ids[0] == made.tolist()


async def test_requests_with_different_adapters_at_the_same_time_do_not_feel_each_other(
    engine: TransformersEngine, plain: Answer, adapters: dict[str, Adapter]
) -> None:
    assert engine._stepper is not None
    asked: list[tuple[Chat, Adapter | None]] = [
        (PARIS, adapters["pirate"]), (PARIS, None), (PARIS, adapters["cook"]),
        (chat("Name a colour.", max_tokens=5, temperature=1.0, seed=3, n=2), adapters["pirate"]), (PARIS, adapters["poet"]),
    ]  # fmt: skip
    alone = [await ask(engine, task, adapter=adapter) for task, adapter in asked]
    assert len({answer.texts[0] for answer in alone}) == 5
    steps = {}
    for together in (True, False):
        begun = engine.steps
        engine._stepper._decoder.together = together
        answers = await asyncio.gather(*(ask(engine, task, adapter=adapter) for task, adapter in asked))
        assert [answer.token_ids for answer in answers] == [answer.token_ids for answer in alone]
        steps[together] = engine.steps - begun
    engine._stepper._decoder.together = True
    assert steps[True] < steps[False]  # one pass for all sequences with the pirate's weights
    assert await ask(engine, PARIS) == plain


async def test_an_answer_goes_on_with_its_adapter(engine: TransformersEngine, adapters: dict[str, Adapter]) -> None:
    outputs = await goes_on_anywhere(engine, PARIS, adapter=adapters["poet"])
    assert len(outputs) > 3


async def test_those_not_used_for_longest_go_and_come_back(
    engine: TransformersEngine, plain: Answer, adapters: dict[str, Adapter]
) -> None:
    over = engine._adapters
    assert over is not None
    first = {name: await ask(engine, SHORT, adapter=adapters[name]) for name in NAMES}
    assert len(over) == 2 and adapters["pirate"].fingerprint not in over
    loads = over.loads
    assert {name: await ask(engine, SHORT, adapter=adapters[name]) for name in reversed(NAMES)} == first
    assert over.loads == loads + 1

    # What runs is not taken away, however many others come.
    running = outputs_of(
        engine, chat("Tell me a long story.", max_tokens=400, ignore_eos=True), adapter=adapters["pirate"]
    )
    await anext(running)
    await anext(running)
    for name in ("poet", "cook", "poet"):
        assert await ask(engine, SHORT, adapter=adapters[name]) == first[name]
    assert adapters["pirate"].fingerprint in over and len(over) == 2
    await anext(running)
    await running.aclose()
    assert await ask(engine, PARIS) == plain


async def test_what_cannot_be_laid_over_the_model_is_said_and_harms_nobody(
    engine: TransformersEngine, plain: Answer, adapters: dict[str, Adapter], tmp_path: Path
) -> None:
    await check_an_adapter_that_is_not_here_is_told_of_with_the_host(engine)
    loaded = await ask(engine, SHORT, adapter=adapters["cook"])
    wrong = {
        "size mismatch for .*lora_A": smollm2_adapter(tmp_path / "a", seed=9, r=8),
        r"Target modules \{'wqkv'\} not found": smollm2_adapter(tmp_path / "b", seed=9, target_modules=["wqkv"]),
        "no place for .*v_proj": smollm2_adapter(tmp_path / "c", seed=9, target_modules=["q_proj"]),
        "no weights for .*k_proj": smollm2_adapter(
            tmp_path / "d", seed=9, target_modules=["q_proj", "k_proj", "v_proj"]
        ),
        "asks for use_dora; only plain LoRA": smollm2_adapter(tmp_path / "e", seed=9, use_dora=True),
        "asks for bias; only plain LoRA": smollm2_adapter(tmp_path / "f", seed=9, bias="all"),
        "init_lora_weights='pissa'": smollm2_adapter(tmp_path / "g", seed=9, init_lora_weights="pissa"),
    }
    for words, folder in wrong.items():
        with pytest.raises(AdapterUnavailable, match=words):
            await engine.check_adapter(Adapter(name="wrong", path=str(folder)))
        with pytest.raises(AdapterUnavailable, match=words):
            await ask(engine, PARIS, adapter=Adapter(name="wrong", path=str(folder)))
    assert await ask(engine, SHORT, adapter=adapters["cook"]) == loaded
    assert await ask(engine, PARIS) == plain
