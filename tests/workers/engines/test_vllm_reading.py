"""The vllm engine with a model that reasons, calls in a form of its own, and adapters. Run inside .venv-vllm."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from modelbus_broker.errors import AdapterUnavailable, ConfigurationError
from modelbus_broker.messages import Adapter, Chat, ChatMessage, Sampling
from modelbus_workers.engines.base import EngineConfig, Output
from modelbus_workers.engines.torch_model.choice import Choice
from modelbus_workers.engines.torch_model.plan import Plan
from modelbus_workers.engines.torch_model.work import Work, call_id
from modelbus_workers.engines.vllm import VllmEngine

from tests.helpers.smollm2 import smollm2, smollm2_with
from tests.helpers.vllm_forks import vllm_forks
from tests.workers.engines.contract import (
    GREEDY,
    ask,
    check_an_adapter_that_is_not_here_is_told_of_with_the_host,
    goes_on_anywhere,
    outputs_of,
    said,
)

pytestmark = [
    pytest.mark.asyncio(loop_scope="module"),
    pytest.mark.timeout(300),
    pytest.mark.filterwarnings("ignore"),
]

PARAMS = {
    "dtype": "float32",
    "enforce_eager": "true",
    "kv_cache_memory_bytes": str(256 << 20),
    "max_model_len": "1024",
    "max_num_seqs": "4",
    "enable_lora": "true",
    "max_loras": "2",
    "reasoning_parser": "deepseek_r1",
}
TEMPLATE = (
    "{% if thinks is defined and not thinks %}<think></think>{% endif %}"
    "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
WORDS = {"<think>": False, "</think>": False, "<tool_call>": False, "</tool_call>": False}
WEATHER: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return smollm2_with(tmp_path_factory.mktemp("reasons") / "model", template=TEMPLATE, words=WORDS)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def engine(folder: Path) -> AsyncIterator[VllmEngine]:
    engine = VllmEngine(EngineConfig(model="m", model_path=str(folder), params=PARAMS))
    with pytest.MonkeyPatch.context() as patch, vllm_forks():
        patch.setenv("TORCHDYNAMO_DISABLE", "1")
        await engine.start()
    yield engine
    await engine.close()


def question(text: str = "What is the capital of France?", **fields: Any) -> Chat:
    sampling = {"max_tokens": 16} | GREEDY | fields.pop("sampling", {})
    return Chat(messages=[ChatMessage(role="user", content=text)], sampling=Sampling(**sampling), **fields)


def ids(engine: VllmEngine, text: str) -> list[int]:
    found: list[int] = engine._running.text.tokenizer(text, add_special_tokens=False)["input_ids"]
    return found


async def test_what_is_written_before_the_end_of_reasoning_is_reasoning(engine: VllmEngine) -> None:
    answer = await ask(engine, question(sampling={"max_tokens": 6}))

    assert answer.texts == {0: ""}
    assert "".join(output.reasoning for output in answer.outputs).startswith("The capital of France")
    assert answer.usage.reasoning_tokens == answer.usage.completion_tokens == 6


async def test_a_template_that_ends_the_reasoning_leaves_all_to_the_answer(engine: VllmEngine) -> None:
    answer = await ask(engine, question(chat_template_kwargs={"thinks": False}))

    assert answer.texts[0] == engine._running.text.tokenizer.decode(answer.token_ids[0], skip_special_tokens=True)
    assert not any(output.reasoning for output in answer.outputs)
    assert answer.usage.reasoning_tokens == 0


async def test_an_answer_is_held_to_its_form_when_the_reasoning_has_ended(engine: VllmEngine) -> None:
    """It thinks two words, is made to end that, and then has to write what it is asked for."""
    task = question(
        extra={"guided_regex": "(blue|green), (red|white)"},
        sampling={"logit_bias": {str(ids(engine, "</think>")[0]): 100.0}},
    )
    before = ids(engine, "Let me see.")
    answer = await ask(engine, task, output_token_ids=[before], emitted_chars=[0])

    assert answer.texts[0] in ("blue, red", "blue, white", "green, red", "green, white")
    assert answer.usage.reasoning_tokens == len(before) + 1
    assert answer.token_ids[0][0] == ids(engine, "</think>")[0]
    told = [output async for output in outputs_of(engine, task, output_token_ids=[before], emitted_chars=[0])]
    made = [output for output in told if isinstance(output, Output) and output.token_ids]
    for cut in (1, 2, 3):
        so_far = said(made[:cut])[0]
        rest = await ask(engine, task, output_token_ids=[before + so_far.token_ids], emitted_chars=[len(so_far.text)])
        assert so_far.text + rest.texts[0] == answer.texts[0], f"after {cut} tokens"
        assert rest.usage == answer.usage


async def test_reasoning_goes_on_after_every_token(engine: VllmEngine) -> None:
    outputs = await goes_on_anywhere(engine, question(sampling={"max_tokens": 5}))

    assert [output.text for output in outputs] == [""] * 5


@pytest.fixture
def reads(engine: VllmEngine) -> Callable[..., list[Output]]:
    """The outputs for a text that a model might have written, by parsers of vLLM."""
    from modelbus_workers.engines.vllm_model.reading import Names, Readers

    loaded = engine._running

    def read(text: str, names: dict[str, str], before: list[int] | None = None, **plan: Any) -> list[Output]:
        readers = Readers(Names(**names), loaded.tokenizer, loaded.engine.vllm_config.model_config)
        factory = readers.for_task(question(tools=[WEATHER] if "calls" in names else None), calls="calls" in names)
        assert factory is not None
        tokens = [*ids(engine, text), 2]
        work = Work(
            prompts=[[1]],
            max_tokens=[400],
            plan=Plan(stop_ids=frozenset({2}), **plan),
            call_tokens=factory.kept(),
            output_token_ids=[before or []],
            reader=lambda number, index: factory.reader([1], partial(call_id, "r", index)),
        )
        choice = Choice(work, 0, 0, loaded.tokenizer)
        outputs = [choice.begin([])]
        outputs += [choice.take(token, None) for token in tokens[len(before or []) :] if not choice.finish]
        return outputs

    return read


@pytest.mark.parametrize(
    ("names", "text"),
    [
        ({"reasoning": "deepseek_r1"}, "<think>Let me see.\nYes 你好.</think>The answer."),
        ({"reasoning": "deepseek_r1"}, "Let me see.\nYes 你好.</think>The answer."),
        ({"reasoning": "qwen3"}, "<think>Let me see.\nYes 你好.</think>The answer."),
    ],
    ids=str,
)
async def test_reasoning_and_answer_are_told_apart(
    reads: Callable[..., list[Output]], names: dict[str, str], text: str
) -> None:
    outputs = reads(text, names)

    assert "".join(output.reasoning for output in outputs) == "Let me see.\nYes 你好."
    assert "".join(output.text for output in outputs) == "The answer."
    assert outputs[-1].finish_reason == "stop"


async def test_a_stop_string_is_looked_for_in_the_answer_only(reads: Callable[..., list[Output]]) -> None:
    outputs = reads("I see the answer.</think>So the answer is 5.", {"reasoning": "deepseek_r1"}, stop=["the answer"])

    assert "".join(output.reasoning for output in outputs) == "I see the answer."
    assert "".join(output.text for output in outputs) == "So "


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("qwen3_xml", "I look.<tool_call>\n<function=weather>\n<parameter=city>\nRome\n</parameter>\n</function>\n</tool_call>"),
        ("granite", 'I look.<tool_call>[{"name": "weather", "arguments": {"city": "Rome"}}]'),
        ("pythonic", '[weather(city="Rome")]'),
    ],
)  # fmt: skip
async def test_calls_in_other_forms_are_read_by_vllm(
    engine: VllmEngine, reads: Callable[..., list[Output]], name: str, text: str
) -> None:
    whole = reads(text, {"calls": name})
    calls = [call for output in whole for call in output.tool_calls]

    assert [call.name for call in calls if call.name] == ["weather"]
    assert json.loads("".join(call.arguments for call in calls)) == {"city": "Rome"}
    assert whole[-1].finish_reason == "tool_calls"
    assert [call.id for call in calls if call.id] == [call_id("r", 0, 0)]
    tokens = ids(engine, text)
    for cut in range(0, len(tokens), 5):
        rest = reads(text, {"calls": name}, before=tokens[:cut])
        later = [call for output in rest for call in output.tool_calls]
        assert later == [call for output in whole[cut + 1 :] for call in output.tool_calls], f"after {cut} tokens"


@pytest.mark.parametrize(
    ("config", "template", "asked", "expected"),
    [
        ({"model_type": "qwen3"}, "{{ tools }}<tool_call>{{ '</think>' }}", ("auto", "auto"), ("qwen3", "")),
        ({"model_type": "qwen3"}, "<tool_call><parameter=x>", ("auto", "auto"), ("", "qwen3_xml")),
        ({"model_type": "llama"}, "</think>{% if add_generation_prompt %}<think>\n", ("auto", "auto"), ("deepseek_r1", "")),
        ({"model_type": "llama"}, "a template", ("auto", "hermes"), ("", "")),
        ({"model_type": "qwen3"}, "{{ '</think>' }}", ("none", "pythonic"), ("", "pythonic")),
        ({"model_type": "seed_oss"}, "<seed:think><seed:tool_call>", ("auto", "auto"), ("seed_oss", "seed_oss")),
    ],
    ids=str,
)  # fmt: skip
async def test_parsers_are_chosen_by_family_and_template(
    tmp_path: Path, config: dict[str, str], template: str, asked: tuple[str, str], expected: tuple[str, str]
) -> None:
    from modelbus_workers.engines.vllm_model.reading import choose_names

    (tmp_path / "config.json").write_text(json.dumps(config))
    names = choose_names(tmp_path, template, *asked)

    assert (names.reasoning, names.calls) == expected


async def test_a_parser_whose_words_the_model_does_not_know_is_told_at_the_start(engine: VllmEngine) -> None:
    from modelbus_workers.engines.vllm_model.reading import Names, Readers
    from transformers import AutoTokenizer

    with pytest.raises(ConfigurationError, match="deepseek_r1"):
        Readers(
            Names(reasoning="deepseek_r1"),
            AutoTokenizer.from_pretrained(smollm2()),
            engine._running.engine.vllm_config.model_config,
        )


def adapter_in(folder: Path, seed: int, *, rank: int = 8) -> Path:
    """An adapter of random numbers, large enough to change what the model says."""
    import torch
    from safetensors.torch import save_file

    config = json.loads((smollm2() / "config.json").read_text())
    hidden, layers = config["hidden_size"], config["num_hidden_layers"]
    narrow = hidden // config["num_attention_heads"] * config["num_key_value_heads"]
    torch.manual_seed(seed)
    weights = {}
    for layer in range(layers):
        for name, width in (("q_proj", hidden), ("v_proj", narrow)):
            at = f"base_model.model.model.layers.{layer}.self_attn.{name}"
            weights[f"{at}.lora_A.weight"] = torch.randn(rank, hidden) * 0.2
            weights[f"{at}.lora_B.weight"] = torch.randn(width, rank) * 0.2
    folder.mkdir()
    save_file(weights, folder / "adapter_model.safetensors")
    said = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": ["q_proj", "v_proj"], "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(said))
    return folder


def merged_answer(adapter: Path, prompt: list[int], count: int) -> list[int]:
    """What the model says greedily with the adapter's weights added to its own, by the library that defines it."""
    import torch
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(smollm2(), dtype=torch.float32)
    weights = load_file(adapter / "adapter_model.safetensors")
    for name, matrix in weights.items():
        if name.endswith("lora_A.weight"):
            at = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            model.get_submodule(at).weight.data += weights[name.replace("lora_A", "lora_B")] @ matrix
    made = model.generate(torch.tensor([prompt]), max_new_tokens=count, do_sample=False)
    found: list[int] = made[0, len(prompt) :].tolist()
    return found


async def test_a_request_with_an_adapter_is_answered_by_its_weights(engine: VllmEngine, tmp_path: Path) -> None:
    task = question(sampling={"max_tokens": 8, "ignore_eos": True})
    adapters = [Adapter(name=f"a{seed}", path=str(adapter_in(tmp_path / f"a{seed}", seed))) for seed in (1, 2)]
    from modelbus_workers.engines.torch_model.prompts import chat_prompt

    prompt = chat_prompt(engine._running.text, task)
    plain = (await ask(engine, task)).token_ids[0]

    made = [(await ask(engine, task, adapter=adapter)).token_ids[0] for adapter in adapters]

    assert engine.capabilities().adapters
    assert made[0] != plain and made[1] != plain and made[0] != made[1]
    assert made[0] == merged_answer(Path(adapters[0].path), prompt, 8)
    assert (await ask(engine, task)).token_ids[0] == plain, "others are not touched"
    so_far = made[0][:3]
    rest = await ask(engine, task, adapter=adapters[0], output_token_ids=[so_far], emitted_chars=[0])
    assert so_far + rest.token_ids[0] == made[0]


async def test_an_adapter_that_cannot_be_loaded_is_told_and_harms_nobody(engine: VllmEngine, tmp_path: Path) -> None:
    wide = adapter_in(tmp_path / "wide", 3, rank=64)
    with pytest.raises(AdapterUnavailable, match="rank"):
        await ask(engine, question(), adapter=Adapter(name="bad", path=str(wide)))
    await check_an_adapter_that_is_not_here_is_told_of_with_the_host(engine)

    assert (await ask(engine, question(sampling={"max_tokens": 1}))).finished is not None
