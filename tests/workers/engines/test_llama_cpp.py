"""The llama_cpp engine on a real model: the GGUF file that the package of SmolLM2 carries."""

from __future__ import annotations

import asyncio
import json
import math
import re
from collections.abc import AsyncIterator
from contextlib import aclosing
from pathlib import Path
from typing import Any

import numpy
import pytest
import pytest_asyncio
from modelbus.answers import ChoiceAnswer
from modelbus.decisions import judge
from modelbus_broker.errors import (
    ConfigurationError,
    ContextLengthExceeded,
    DeploymentFailed,
    InvalidRequest,
    ModelBusError,
    UnsupportedField,
)
from modelbus_broker.messages import Chat, ChatMessage, Completion, Decision, Embedding, Sampling, TokenLogprob
from modelbus_workers.engines.base import EngineConfig, Output, Run

llama_cpp = pytest.importorskip("llama_cpp", reason="there is no llama-cpp-python: make llama-cpp-setup")
transformers = pytest.importorskip("transformers")

from modelbus_workers.engines.llama_cpp import LlamaCppEngine  # noqa: E402
from modelbus_workers.engines.llama_model.sampling import Sampler  # noqa: E402
from modelbus_workers.engines.torch_model.plan import Plan  # noqa: E402
from modelbus_workers.engines.torch_model.prompts import chat_prompt  # noqa: E402

from tests.helpers.smollm2 import smollm2, smollm2_gguf, unpacked_gguf  # noqa: E402
from tests.workers.engines.contract import CHECKS, GREEDY, Check, ask, chat, goes_on_anywhere, outputs_of  # noqa: E402

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(300)]

PARIS = "What is the capital of France?"
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
SCHEMA = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 12}, "big": {"type": "boolean"}},
    "required": ["city", "big"],
    "additionalProperties": False,
}


async def started(path: Path | None = None, /, **params: str) -> LlamaCppEngine:
    engine = LlamaCppEngine(EngineConfig(model="m", model_path=str(path or smollm2_gguf()), params=params))
    await engine.start()
    return engine


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def engine() -> AsyncIterator[LlamaCppEngine]:
    made = await started(n_ctx="1024", n_threads="1")
    yield made
    await made.close()


def in_form(schema: Any, **sampling: Any) -> Chat:
    form = {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}}
    return Chat(
        messages=[ChatMessage(role="user", content=PARIS)],
        sampling=Sampling(temperature=0.0, **sampling),
        response_format=form,
    )


def question(text: str = PARIS, **fields: Any) -> Chat:
    sampling = {"max_tokens": 24} | GREEDY | fields.pop("sampling", {})
    return Chat(messages=[ChatMessage(role="user", content=text)], sampling=Sampling(**sampling), **fields)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
async def test_the_engine_keeps_the_contract(check: Check, engine: LlamaCppEngine) -> None:
    await check(engine)


async def test_labels_are_scored_as_if_the_model_had_written_them(engine: LlamaCppEngine) -> None:
    labels = ["Paris", "London", "Kuala Lumpur"]

    async def scores(labels: list[str]) -> list[list[TokenLogprob]]:
        task = Decision(messages=[ChatMessage(role="user", content=PARIS)], labels=labels)
        made = [output async for output in engine.answer(task, Run(id="labels"))]
        return [output.logprobs for output in made if isinstance(output, Output)]

    own = await scores(labels)
    judged = judge([ChoiceAnswer(index=index, logprobs=one) for index, one in enumerate(own)], len(labels))
    assert judged.probabilities[0] == max(judged.probabilities) and 0 < judged.mass <= 1
    assert [len(one) for one in own][:2] == [1, 1] and "".join(score.token for score in own[2]) == "Kuala Lumpur"
    many = await scores([*labels, "Rome", "Berlin", "Madrid", "Oslo"])  # more than the sequences that llama.cpp holds
    assert len(many) == 7 and [s.logprob for s in many[0]] == pytest.approx([s.logprob for s in own[0]], abs=1e-3)
    turned = await scores(labels[::-1])
    assert [s.logprob for s in turned[2]] == pytest.approx([s.logprob for s in own[0]], abs=1e-3)
    # The same by another way: what the model writes first by itself.
    answer = await ask(engine, question(sampling={"max_tokens": 1, "logprobs": 0}))
    written = next(score for output in answer.outputs for score in output.logprobs)
    ((label,),) = await scores([written.token])
    assert label.token_id == written.token_id and label.logprob == pytest.approx(written.logprob, abs=1e-3)
    with pytest.raises(ContextLengthExceeded):
        await scores(["yes", "no " * 2000])


TURNS = [
    [("user", PARIS)],
    [
        ("system", "You are terse."),
        ("user", " Two  blanks, <tags> & tabs\t\n\n"),
        ("assistant", "OK 🦙"),
        ("user", "日本語 é?"),
    ],
    [("user", "Say it."), ("assistant", "The capital of")],
]


@pytest.mark.parametrize("turns", TURNS, ids=["question", "turns", "prefill"])
async def test_the_file_s_own_template_gives_the_tokens_that_transformers_gives(
    engine: LlamaCppEngine, turns: list[tuple[Any, str]]
) -> None:
    assert engine._text is not None
    task = Chat(messages=[ChatMessage(role=role, content=text) for role, text in turns])
    tokenizer = transformers.AutoTokenizer.from_pretrained(smollm2(), local_files_only=True)
    goes_on = turns[-1][0] == "assistant"
    expected = tokenizer.apply_chat_template(
        [{"role": role, "content": text} for role, text in turns],
        add_generation_prompt=not goes_on, continue_final_message=goes_on, return_dict=True,
    )["input_ids"]  # fmt: skip

    assert chat_prompt(engine._text, task) == expected


async def test_with_weights_of_16_bits_it_says_what_transformers_says(tmp_path: Path) -> None:
    """llama.cpp computes with weights of 4 bits in 8-bit numbers, so that file's answers may differ from the first token."""
    import torch

    tokenizer = transformers.AutoTokenizer.from_pretrained(smollm2(), local_files_only=True)
    model = transformers.AutoModelForCausalLM.from_pretrained(smollm2(), dtype=torch.float32, local_files_only=True)
    turns = [{"role": "user", "content": PARIS}]
    prompt = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=True, return_tensors="pt")
    expected = model.generate(**prompt, max_new_tokens=24, do_sample=False)[0, prompt["input_ids"].shape[1] :].tolist()

    engine = await started(unpacked_gguf(smollm2_gguf(), tmp_path / "f16.gguf"), n_ctx="256", n_threads="1", slots="1")
    try:
        answer = await ask(engine, question())
    finally:
        await engine.close()

    assert answer.token_ids[0] == expected
    assert answer.texts[0] == "The capital of France is Paris."


async def test_an_answer_cut_anywhere_goes_on_token_for_token(engine: LlamaCppEngine) -> None:
    """The last cut is beyond a piece of what is read at once."""
    await goes_on_anywhere(
        engine,
        chat("Repeat exactly: 🦙🎉 日本語 é", max_tokens=38, repetition_penalty=1.1, ignore_eos=True),
        cuts=[4, 36],
    )


async def test_requests_side_by_side_and_after_each_other_answer_the_same(engine: LlamaCppEngine) -> None:
    """Long prompts are read in several steps, between which others write."""
    tasks = [
        chat(f"{'A blank page. ' * 40 * (number % 2)}Say the number {number}.", max_tokens=5) for number in range(3)
    ]
    alone = [await ask(engine, task) for task in tasks]
    together = await asyncio.gather(*(ask(engine, task) for task in tasks))

    assert [answer.token_ids for answer in together] == [answer.token_ids for answer in alone]


async def test_the_event_loop_turns_while_the_model_reads_a_prompt(engine: LlamaCppEngine) -> None:
    task, turns = chat("A blank page. " * 70, max_tokens=1), 0
    answering = asyncio.create_task(ask(engine, task))
    first = engine.steps
    while engine.steps < first + 2:
        await asyncio.sleep(0.001)
        turns += 1
    answer = await answering

    assert answer.usage.prompt_tokens > 2 * 128
    assert turns > 5


async def test_a_seeded_answer_goes_on_as_it_would_have(engine: LlamaCppEngine) -> None:
    sampling = {"temperature": 1.1, "seed": 5, "top_p": 0.95, "frequency_penalty": 0.5, "n": 2, "ignore_eos": True}

    outputs = await goes_on_anywhere(engine, chat(PARIS, max_tokens=8, **sampling), cuts=[5, 9])

    assert len({tuple(output.token_ids) for output in outputs}) > 8


async def test_an_answer_held_to_a_schema_is_valid_and_goes_on_anywhere(engine: LlamaCppEngine) -> None:
    outputs = await goes_on_anywhere(engine, in_form(SCHEMA, max_tokens=40), cuts=[1, 6])

    found = json.loads("".join(output.text for output in outputs))
    assert isinstance(found["city"], str) and isinstance(found["big"], bool)
    assert outputs[-1].finish_reason == "stop"


async def test_forced_tool_calls_are_calls_and_go_on_anywhere(engine: LlamaCppEngine) -> None:
    task = question(
        "What is the weather in Paris?", tools=[WEATHER], tool_choice="required", parallel_tool_calls=False,
        sampling={"max_tokens": 60},
    )  # fmt: skip
    outputs = await goes_on_anywhere(engine, task, cuts=[2, 20])
    calls = [call for output in outputs for call in output.tool_calls]

    assert outputs[-1].finish_reason == "tool_calls"
    assert calls[0].name == "weather"
    assert json.loads("".join(call.arguments for call in calls))["city"] in ("Paris", "Rome")


@pytest.mark.parametrize(
    ("field", "value", "possible"),
    [
        ("guided_choice", ["Paris", 'Rome "eternal"'], r"Paris|Rome \"eternal\""),
        ("guided_regex", r"[A-Z]{3}-[0-9]{2}/x", r"[A-Z]{3}-[0-9]{2}/x"),
        (
            "guided_json",
            {"type": "object", "properties": {"a": {"const": 1}}, "required": ["a"], "additionalProperties": False},
            r'\{\s*"a"\s*:\s*1.*\}',
        ),
        ("guided_grammar", 'root ::= "yes" | "no"', r"yes|no"),
        ("guided_grammar", 'start: "yes" | "no"', r"yes|no"),
    ],
)
async def test_an_answer_has_the_form_that_is_asked_for(
    engine: LlamaCppEngine, field: str, value: Any, possible: str
) -> None:
    answer = await ask(engine, question(extra={field: value}, sampling={"max_tokens": 60}))
    completed = await ask(
        engine, Completion(prompt=["It is"], sampling=Sampling(max_tokens=60, temperature=0.0), extra={field: value})
    )

    assert re.fullmatch(possible, answer.texts[0], re.DOTALL)
    assert re.fullmatch(possible, completed.texts[0], re.DOTALL)
    assert answer.reasons == completed.reasons == {0: "stop"}


async def test_choices_of_several_prompts_wait_for_free_sequences(engine: LlamaCppEngine) -> None:
    task = Completion(prompt=["One, two,", "A, B, C,"], sampling=Sampling(n=4, max_tokens=3, temperature=0.0))
    answer = await ask(engine, task)

    assert len(answer.texts) == 8
    assert len(set(answer.texts.values())) == 2
    assert engine.running == 0


async def test_log_probabilities_of_a_prompt_and_its_answer_are_told(engine: LlamaCppEngine) -> None:
    task = Completion(
        prompt=["The capital of France is"], sampling=Sampling(max_tokens=2, logprobs=2, temperature=0.0), echo=True
    )
    answer = await ask(engine, task)
    scores = [score for output in answer.outputs for score in output.logprobs]

    assert "".join(score.token for score in scores) == answer.texts[0]
    assert len(scores) == answer.usage.prompt_tokens + 2
    assert scores[-2].top[0].token == scores[-2].token
    assert sum(math.exp(top.logprob) for top in scores[-1].top) <= 1.000001


async def test_closing_the_generator_frees_the_sequence(engine: LlamaCppEngine) -> None:
    async with aclosing(outputs_of(engine, chat(PARIS, ignore_eos=True))) as outputs:
        async for output in outputs:
            if isinstance(output, Output):
                break
    async with asyncio.timeout(30):
        while engine.running:
            await asyncio.sleep(0.01)


@pytest.mark.parametrize(
    ("task", "error", "param"),
    [
        (chat(PARIS, top_p=2.0), InvalidRequest, "top_p"),
        (in_form({"$ref": "https://example.org/schema"}), InvalidRequest, "response_format"),
        (question(extra={"guided_regex": "["}), InvalidRequest, "guided_regex"),
        (question(extra={"guided_grammar": "start: nothing"}), InvalidRequest, "guided_grammar"),
        (question(extra={"guided_choice": []}), InvalidRequest, "guided_choice"),
        (
            question(extra={"guided_choice": ["a"]}, response_format={"type": "json_object"}),
            InvalidRequest,
            "guided_choice",
        ),
        (question(tools=[WEATHER], tool_choice={"function": {"name": "x"}}), InvalidRequest, "tool_choice"),
        (question("many words " * 600), ContextLengthExceeded, "messages"),
        (question(sampling={"max_tokens": 1020}), ContextLengthExceeded, "max_tokens"),
        (Completion(prompt=["a"], suffix="b"), UnsupportedField, "suffix"),
        (Completion(prompt=[[10**7]]), InvalidRequest, "prompt"),
        (
            Chat(messages=[ChatMessage(role="user", content="x")], chat_template_kwargs={"chat_template": "x"}),
            UnsupportedField,
            "chat_template_kwargs",
        ),
    ],
)
async def test_what_cannot_be_done_is_refused_before_any_token(
    engine: LlamaCppEngine, task: Chat | Completion, error: type[ModelBusError], param: str
) -> None:
    steps = engine.steps

    with pytest.raises(error) as caught:
        await ask(engine, task)

    assert caught.value.param == param
    assert engine.steps == steps


@pytest.mark.parametrize("fields", [{"top_k": 3}, {"top_p": 0.4}, {"min_p": 0.5}, {"top_k": 300, "top_p": 0.9999}])
async def test_draws_are_as_frequent_as_the_rules_say(fields: dict[str, Any]) -> None:
    weights = numpy.exp(numpy.random.default_rng(0).normal(0, 2.5, 2000))
    order = numpy.argsort(-weights)
    kept = weights / weights.sum()
    if "top_k" in fields:
        kept[order[fields["top_k"] :]] = 0
        kept /= kept.sum()
    if "top_p" in fields:
        sums = kept[order].cumsum()
        kept[order[sums - kept[order] >= fields["top_p"]]] = 0
    kept[kept < fields.get("min_p", 0) * kept.max()] = 0
    sampler = Sampler(Plan(temperature=1.0, seed=1, **fields), 0, [], 0, None)
    logits = numpy.log(weights).astype("<f4")

    drawn = numpy.bincount([sampler.choose(logits) for _ in range(2000)], minlength=2000) / 2000

    assert set(drawn.nonzero()[0]) <= set(kept.nonzero()[0])
    assert numpy.abs(drawn - kept / kept.sum()).max() < 0.05


async def test_embeddings_have_length_one_and_tell_texts_apart() -> None:
    engine = await started(embedding="true", n_ctx="256", n_threads="1")
    try:
        for check in CHECKS:
            await check(engine)
        answer = await ask(engine, Embedding(input=["a cat", "a cat", "the stock market fell"]))
        short = await ask(engine, Embedding(input=["a cat"], dimensions=64))
        with pytest.raises(ModelBusError, match="256 tokens"):
            await ask(engine, Embedding(input=["word " * 300]))
    finally:
        await engine.close()

    first, second, third = (numpy.frombuffer(vector, "<f4") for vector in answer.vectors)
    assert numpy.linalg.norm(first) == pytest.approx(1, abs=1e-5)
    assert first @ second == pytest.approx(1, abs=1e-5)
    assert first @ third < 0.999
    assert len(short.vectors[0]) == 4 * 64


async def test_a_chat_format_by_name_takes_the_place_of_the_template() -> None:
    engine = await started(chat_format="chatml", n_ctx="256", n_threads="1", slots="1")
    try:
        answer = await ask(engine, question(sampling={"max_tokens": 12}))
        assert engine._text is not None
        text = engine._text.tokenizer.decode(chat_prompt(engine._text, question()))
    finally:
        await engine.close()

    # The file's own template brings a system prompt of SmolLM2's along.
    assert "SmolLM" not in text
    assert text.endswith(f"<|im_start|>user\n{PARIS}<|im_end|>\n<|im_start|>assistant\n")
    assert "Paris" in answer.texts[0]


@pytest.mark.parametrize(
    ("params", "words"),
    [
        ({"n_gpu_layer": "1"}, "did you mean n_gpu_layers"),
        ({"zzzz": "1"}, "no parameter zzzz; known are: .*n_ctx"),
        ({"draft_model": "x"}, "takes no parameter draft_model: it is a Python object"),
        ({"n_gpu_layers": "5"}, "compiled without"),
        ({"embedding": "true", "pooling_type": "4"}, "rerankers"),
        ({"n_ctx": "many"}, "n_ctx"),
        ({"tensor_split": "a,b"}, "tensor_split"),
        ({"kv_overrides": "[1]"}, "kv_overrides"),
        ({"chat_format": "nonsense"}, "no chat_format 'nonsense'; known are: .*chatml"),
    ],
)
async def test_a_wrong_parameter_is_refused_in_words_that_help(params: dict[str, str], words: str) -> None:
    with pytest.raises(ConfigurationError, match=words):
        await started(None, **params)


async def test_what_cannot_be_loaded_fails_in_the_library_s_words(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "wrong.gguf").write_bytes(b"this is no model at all")
    with smollm2_gguf().open("rb") as whole:
        (tmp_path / "cut.gguf").write_bytes(whole.read(5 << 20))

    with pytest.raises(DeploymentFailed, match=r"wrong\.gguf.*magic"):
        await started(tmp_path / "wrong.gguf")
    with pytest.raises(DeploymentFailed, match=r"cut\.gguf.*not within the file bounds"):
        await started(tmp_path / "cut.gguf")
    with pytest.raises(DeploymentFailed, match=r"context of 4294967296 tokens .* needs [0-9]+ MiB .* lower n_ctx"):
        await started(n_ctx=str(1 << 30), n_threads="1")
    with pytest.raises(DeploymentFailed, match="lora"):
        await started(lora_path=str(smollm2_gguf()))

    assert capfd.readouterr().err == ""


async def test_a_path_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="finds no .gguf file"):
        await started(tmp_path)
    with pytest.raises(ConfigurationError, match="does not exist"):
        await started(tmp_path / "nothing")
