"""The vllm engine on a real vLLM for CPUs and a real model. Run inside .venv-vllm; see test_vllm_environment.py."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import pytest_asyncio
from modelbus_broker.errors import (
    ConfigurationError,
    DeploymentFailed,
    EngineFailed,
    InvalidRequest,
    UnsupportedField,
    WorkerLost,
)
from modelbus_broker.messages import Adapter, Chat, ChatMessage, Completion, Sampling
from modelbus_workers.engines.base import EngineConfig, Output
from modelbus_workers.engines.vllm import VllmEngine
from modelbus_workers.engines.vllm_model.last_words import cause

from tests.helpers.smollm2 import smollm2
from tests.workers.engines.contract import CHECKS, GREEDY, Check, ask, chat, goes_on_anywhere, outputs_of

pytestmark = [
    pytest.mark.asyncio(loop_scope="module"),
    pytest.mark.timeout(300),
    # vLLM's and its libraries' own are not ours to repair.
    pytest.mark.filterwarnings("ignore"),
]

#: Little memory, no compiling, and numbers as exact as an answer that is cut and gone on with needs.
PARAMS = {
    "dtype": "float32",
    "enforce_eager": "true",
    "kv_cache_memory_bytes": str(256 << 20),
    "max_model_len": "1024",
    "max_num_seqs": "4",
}
WEATHER: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "enum": ["Paris", "Rome"]}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}


def made(folder: Path, **params: str) -> VllmEngine:
    return VllmEngine(EngineConfig(model="m", model_path=str(folder), params=PARAMS | params))


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def engine() -> AsyncIterator[VllmEngine]:
    engine = made(smollm2())
    with pytest.MonkeyPatch.context() as patch:
        # vLLM compiles a helper for log probabilities at its first use even when told to be eager.
        patch.setenv("TORCHDYNAMO_DISABLE", "1")
        await engine.start()
    yield engine
    await engine.close()


def question(text: str = "What is the capital of France?", **fields: Any) -> Chat:
    sampling = {"max_tokens": 24} | GREEDY | fields.pop("sampling", {})
    return Chat(messages=[ChatMessage(role="user", content=text)], sampling=Sampling(**sampling), **fields)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
async def test_it_keeps_the_contract_of_engines(engine: VllmEngine, check: Check) -> None:
    await check(engine)


async def test_the_capital_of_france_is_paris(engine: VllmEngine) -> None:
    answer = await ask(engine, question())

    assert "Paris" in answer.texts[0]
    assert answer.reasons == {0: "stop"}
    assert engine.slots == 4


async def test_a_stop_string_across_the_cut_is_honoured(engine: VllmEngine) -> None:
    whole = (await ask(engine, question())).texts[0]
    stop = whole[3:18]

    outputs = await goes_on_anywhere(engine, question(sampling={"stop": [stop]}))

    assert "".join(output.text for output in outputs) == whole[:3]


async def test_min_tokens_and_max_tokens_count_what_an_earlier_run_made(engine: VllmEngine) -> None:
    outputs = await goes_on_anywhere(
        engine, question("Say yes.", sampling={"min_tokens": 12, "max_tokens": 14}), cuts=(0, 5, 12)
    )

    assert 12 <= sum(len(output.token_ids) for output in outputs) <= 14


async def test_a_repetition_penalty_counts_what_an_earlier_run_made(engine: VllmEngine) -> None:
    await goes_on_anywhere(engine, question(sampling={"repetition_penalty": 1.3, "max_tokens": 10}), cuts=(0, 3, 7))


async def test_a_seed_repeats_an_answer_and_choices_differ(engine: VllmEngine) -> None:
    sampling = {"temperature": 1.5, "seed": 7, "n": 2, "max_tokens": 12}
    first = await ask(engine, question("Tell me a story.", sampling=sampling))
    second = await ask(engine, question("Tell me a story.", sampling=sampling))

    assert first.texts == second.texts
    assert first.texts[0] != first.texts[1]


async def test_an_answer_keeps_to_a_json_schema(engine: VllmEngine) -> None:
    schema = {
        "type": "object",
        "properties": {"name": {"type": "string", "maxLength": 10}, "age": {"type": "integer", "maximum": 99}},
        "required": ["name", "age"],
        "additionalProperties": False,
    }
    answer = await ask(
        engine,
        question(
            "A person as JSON.",
            sampling={"max_tokens": 100},
            response_format={"type": "json_schema", "json_schema": {"name": "person", "schema": schema}},
        ),
    )

    assert sorted(json.loads(answer.texts[0])) == ["age", "name"]
    assert answer.reasons == {0: "stop"}


@pytest.mark.parametrize(
    "extra", [{"guided_choice": ["blue", "green"]}, {"structured_outputs": {"regex": "blue|green"}}], ids=str
)
async def test_an_answer_keeps_to_a_guided_form(engine: VllmEngine, extra: dict[str, Any]) -> None:
    answer = await ask(engine, question(extra=extra))

    assert answer.texts[0] in ("blue", "green")


async def test_a_required_tool_is_called(engine: VllmEngine) -> None:
    answer = await ask(
        engine,
        question("How is the weather in Rome?", tools=[WEATHER], tool_choice="required", parallel_tool_calls=False,
                 sampling={"max_tokens": 60}),
    )  # fmt: skip

    calls = [call for output in answer.outputs for call in output.tool_calls]
    assert calls[0].name == "weather"
    assert json.loads("".join(call.arguments for call in calls))["city"] in ("Paris", "Rome")
    assert answer.reasons == {0: "tool_calls"}


@pytest.mark.parametrize(
    "fields",
    [
        {"response_format": {"type": "json_object"}},
        {"sampling": {"presence_penalty": 0.5}},
        {"sampling": {"frequency_penalty": 0.5}},
        {"extra": {"bad_words": ["Paris"]}},
        {"extra": {"guided_regex": "a+"}},
    ],
    ids=lambda fields: str(next(iter(fields.values()))),
)
async def test_what_cannot_be_gone_on_with_exactly_is_refused_in_words(
    engine: VllmEngine, fields: dict[str, Any]
) -> None:
    with pytest.raises(EngineFailed, match="cannot go on with"):
        await ask(engine, question(**fields), output_token_ids=[[260]], emitted_chars=[1])


async def test_bad_words_and_allowed_tokens_are_kept_to(engine: VllmEngine) -> None:
    without = await ask(engine, question(extra={"bad_words": ["Paris"]}))
    allowed = await ask(engine, question(sampling={"max_tokens": 3}, extra={"allowed_token_ids": [260, 253]}))

    assert "Paris" not in without.texts[0]
    assert set(allowed.token_ids[0]) <= {260, 253}


async def test_the_prompt_is_echoed_with_its_scores(engine: VllmEngine) -> None:
    task = Completion(
        prompt=["One, two, three"], echo=True, sampling=Sampling(max_tokens=2, logprobs=1, **GREEDY),
        extra={"prompt_logprobs": 2},
    )  # fmt: skip
    answer = await ask(engine, task)

    scores = [score for output in answer.outputs for score in output.logprobs]
    assert answer.texts[0].startswith("One, two, three")
    assert "".join(score.token for score in scores) == answer.texts[0]
    told = answer.outputs[0].prompt_logprobs
    assert told[0] is None and all(score is not None and len(score.top) == 2 for score in told[1:])
    assert len(told) == answer.prompt_tokens
    alone = await ask(engine, Completion(prompt=["One, two"], echo=True, sampling=Sampling(max_tokens=0, logprobs=0)))
    assert alone.texts[0] == "One, two"
    assert alone.token_ids[0] == []


async def test_several_prompts_have_their_own_choices(engine: VllmEngine) -> None:
    task = Completion(prompt=["One, two, three,", "A, B, C,"], sampling=Sampling(max_tokens=4, n=2, **GREEDY))
    answer = await ask(engine, task)

    assert sorted(answer.texts) == [0, 1, 2, 3]
    assert answer.texts[0] == answer.texts[1] != answer.texts[2] == answer.texts[3]


async def test_an_answer_that_is_left_is_aborted_in_vllm(engine: VllmEngine) -> None:
    outputs = outputs_of(engine, question("Tell me a very long story.", sampling={"max_tokens": 400}))
    async for output in outputs:
        if isinstance(output, Output):
            break
    await outputs.aclose()

    assert engine._running.engine.output_processor.get_num_unfinished_requests() == 0


@pytest.mark.parametrize(
    ("extra", "sampling", "param"),
    [
        ({"guided_json": {"type": "nonsense"}}, {}, "structured_outputs"),
        ({"guided_regex": "a", "guided_choice": ["a"]}, {}, "guided_choice"),
        ({"allowed_token_ids": [10**9]}, {}, "allowed_token_ids"),
        ({"prompt_logprobs": 999}, {}, "prompt_logprobs"),
        ({"bad_words": 5}, {}, "bad_words"),
        ({}, {"logprobs": 999}, "logprobs"),
        ({}, {"top_p": 3.0}, "top_p"),
    ],
    ids=str,
)
async def test_a_wrong_field_is_named(
    engine: VllmEngine, extra: dict[str, Any], sampling: dict[str, Any], param: str
) -> None:
    with pytest.raises(InvalidRequest) as refused:
        await ask(engine, question(extra=extra, sampling=sampling))

    assert refused.value.param == param


async def test_an_adapter_needs_a_deployment_that_takes_them(engine: VllmEngine) -> None:
    assert not engine.capabilities().adapters
    with pytest.raises(UnsupportedField, match="enable_lora"):
        await ask(engine, question(), adapter=Adapter(name="a", path="/nowhere"))


async def test_its_metrics_are_those_of_vllm(engine: VllmEngine) -> None:
    await ask(engine, question())

    assert "vllm:generation_tokens_total" in engine.metrics()
    assert "python_gc" not in engine.metrics()


@pytest.mark.parametrize(
    ("params", "words"),
    [
        ({"max_num_seq": "3"}, "max_num_seqs"),
        ({"max_model_len": "many"}, "max_model_len"),
        ({"tool_parser": "none of ours"}, "hermes"),
        ({"reasoning_parser": "qwen3"}, "reasoning"),
    ],
    ids=str,
)
async def test_a_wrong_parameter_is_named(params: dict[str, str], words: str) -> None:
    with pytest.raises(ConfigurationError, match=words):
        await made(smollm2(), **params).start()


async def test_a_context_that_the_model_was_not_made_for_is_told_in_vllms_words() -> None:
    with pytest.raises(DeploymentFailed, match="max_model_len"):
        await made(smollm2(), max_model_len="99999999").start()


async def test_an_unknown_architecture_is_told_in_vllms_words(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    for file in smollm2().iterdir():
        if file.name != "config.json":
            (folder / file.name).symlink_to(file)
    config = json.loads((smollm2() / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"architectures": ["NobodysForCausalLM"]}))

    with pytest.raises(DeploymentFailed, match="NobodysForCausalLM"):
        await made(folder).start()


async def test_why_the_engine_core_could_not_start_is_in_the_message() -> None:
    with pytest.raises(DeploymentFailed, match="(?i)memory|kv cache|cache blocks"):
        await made(smollm2(), kv_cache_memory_bytes="100000").start()


async def test_the_last_error_that_says_a_reason_is_the_cause() -> None:
    assert cause([
        "(EngineCore pid=1) ERROR 11-26 06:00:00 [core.py:1] Traceback (most recent call last):",
        "(EngineCore pid=1) ERROR 11-26 06:00:00 [core.py:1] ValueError: no memory left",
        "RuntimeError: Engine core initialization failed. See root cause above.",
    ]) == "ValueError: no memory left"  # fmt: skip


async def test_a_dead_engine_core_fails_its_requests_for_other_workers_and_ends_this_one(engine: VllmEngine) -> None:
    """The last one: nothing of the shared engine is left after it."""
    assert engine.broken == ""
    before = engine.steps
    asking = asyncio.create_task(ask(engine, chat("Tell me a very long story.", max_tokens=400)))
    while engine.steps == before:
        await asyncio.sleep(0.05)
    children = psutil.Process().children(recursive=True)
    core = next(child for child in children if child.name().startswith("VLLM::EngineCo"))
    core.kill()

    with pytest.raises(WorkerLost, match="engine core has died"):
        await asking
    assert "died" in engine.broken
