"""Guesses at the next tokens: the answers are those without, in fewer passes of the model."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import pytest_asyncio
from modelbus_broker.errors import ConfigurationError, DeploymentFailed
from modelbus_workers.engines.base import EngineConfig

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from modelbus_workers.engines.torch_model.drafting import Drafting, _Lookup, make_drafting  # noqa: E402
from modelbus_workers.engines.torch_model.settings import TransformersSettings  # noqa: E402
from modelbus_workers.engines.transformers import TransformersEngine  # noqa: E402

from tests.helpers.smollm2 import smollm2  # noqa: E402
from tests.workers.engines.contract import ask, chat, goes_on_anywhere  # noqa: E402

pytestmark = [
    pytest.mark.asyncio(loop_scope="module"),
    pytest.mark.timeout(300),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]

REPEATS = chat("Repeat exactly: 🦙🎉 日本語 one two one two", max_tokens=12)
TASKS = [
    REPEATS,
    chat("Name three colours.", max_tokens=6, temperature=1.0, seed=3, n=2, frequency_penalty=0.5),
    msgspec.structs.replace(
        chat("Say yes or no as JSON.", max_tokens=12, logprobs=2),
        response_format={"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "object", "properties": {"answer": {"enum": ["yes", "no"]}}, "required": ["answer"], "additionalProperties": False}}},
    ),
]  # fmt: skip


def cut_model(folder: Path, layers: int) -> Path:
    """SmolLM2 with its first layers only: it guesses right now and then."""
    folder.mkdir()
    for file in smollm2().iterdir():
        if file.name != "config.json":
            (folder / file.name).symlink_to(file)
    config = json.loads((smollm2() / "config.json").read_text())
    config["num_hidden_layers"] = layers
    config.pop("layer_types", None)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def engine(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[TransformersEngine]:
    params = {
        "num_threads": "1", "dtype": "float32", "device": "cpu", "num_assistant_tokens": "4",
        "assistant_model": str(cut_model(tmp_path_factory.mktemp("models") / "cut", 24)),
        "assistant_confidence_threshold": "0.1",
    }  # fmt: skip
    made = TransformersEngine(EngineConfig(model="m", model_path=str(smollm2()), params=params))
    await made.start()
    yield made
    await made.close()


async def test_answers_are_those_without_guesses_in_fewer_passes(engine: TransformersEngine) -> None:
    stepper = engine._stepper
    assert stepper is not None and (assisted := stepper._drafting) is not None
    lookup = Drafting(TransformersSettings(prompt_lookup_num_tokens=6), None)

    async def answers(drafting: Drafting | None) -> tuple[list[Any], int]:
        stepper._drafting = drafting
        begun = engine.steps
        made = [await ask(engine, task) for task in TASKS]
        said = [(answer.texts, answer.token_ids, answer.reasons, answer.usage) for answer in made]
        return said, engine.steps - begun

    expected, steps = await answers(None)
    for drafting in (assisted, lookup):
        found, fewer = await answers(drafting)
        assert found == expected
        assert fewer < steps
        assert 0 < drafting.counts.kept < drafting.counts.guessed, "some were right and some were not"
    stepper._drafting = assisted
    shown = dict(line.rsplit(" ", 1) for line in engine.metrics().splitlines() if not line.startswith("#"))
    assert float(shown["transformers_draft_tokens_accepted_total"]) == assisted.counts.kept
    assert float(shown["transformers_steps_total"]) == engine.steps


async def test_an_answer_cut_between_guesses_goes_on(engine: TransformersEngine) -> None:
    await goes_on_anywhere(engine, REPEATS, range(2, 12, 5))


async def test_what_follows_the_last_words_is_found_where_they_came_before() -> None:
    lookup = _Lookup(3)
    assert lookup.guess([1, 2, 3, 4], 9) == []
    assert lookup.guess([1, 2, 3, 4, 2, 3], 9) == [4, 2, 3]
    assert lookup.guess([1, 2, 3, 4, 2, 3], 1) == [4]
    # The longest run counts, and of equally long ones the newest.
    assert lookup.guess([1, 2, 3, 4, 2, 3, 5, 9, 3, 7, 2, 3], 9) == [5, 9, 3]
    assert lookup.guess([1, 2, 3, 4, 2, 3, 5, 9, 3, 7, 2, 3, 8], 9) == []


async def test_what_cannot_guess_is_told_of_at_the_start(engine: TransformersEngine, tmp_path: Path) -> None:
    loaded = engine._text
    assert loaded is not None
    other = cut_model(tmp_path / "other", 1)
    tokenizer = json.loads((smollm2() / "tokenizer.json").read_text())
    for token in tokenizer["added_tokens"]:
        if token["content"] == "<jupyter_text>":
            del tokenizer["model"]["vocab"][token["content"]]
            token["content"] = "<other>"
            tokenizer["model"]["vocab"]["<other>"] = token["id"]
    (other / "tokenizer.json").unlink()
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"assistant_model": "/no/such"}, "assistant_model: model path /no/such does not exist"),
        ({"assistant_model": str(other)}, "has other tokens than the model"),
        ({"assistant_model": str(other), "prompt_lookup_num_tokens": 3}, "choose one"),
        ({"prompt_lookup_num_tokens": 3, "continuous_batching": True}, "choose one"),
        ({"prompt_lookup_num_tokens": -1}, "must not be negative"),
        ({"prompt_lookup_num_tokens": 3, "assistant_confidence_threshold": 2.0}, "is a probability"),
    ]
    for settings, words in wrong:
        with pytest.raises(ConfigurationError, match=words):
            make_drafting(TransformersSettings(**settings), loaded)
    (other / "model.safetensors").unlink()
    (other / "model.safetensors").write_bytes(b"{")
    with pytest.raises(DeploymentFailed, match="cannot be loaded"):
        make_drafting(TransformersSettings(assistant_model=str(other)), loaded)


async def test_a_model_with_sliding_windows_does_not_guess() -> None:
    from transformers import MistralConfig, MistralForCausalLM

    small = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    model = MistralForCausalLM(MistralConfig(vocab_size=64, sliding_window=8, **small)).eval()

    class Loaded:
        def __init__(self) -> None:
            self.model = model

    with pytest.raises(ConfigurationError, match="keeps more than plain keys and values"):
        make_drafting(TransformersSettings(prompt_lookup_num_tokens=2), Loaded())  # type: ignore[arg-type]
