"""The vllm engine on models that embed, score and classify. Run inside .venv-vllm; see test_vllm_environment.py."""

from __future__ import annotations

import asyncio
import struct
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio
from modelbus_broker.errors import (
    ConfigurationError,
    ContextLengthExceeded,
    InvalidRequest,
    ModelBusError,
    UnsupportedField,
)
from modelbus_broker.messages import Adapter, Classification, Embedding, Score, Task
from modelbus_workers.engines.base import EngineConfig
from modelbus_workers.engines.vllm import VllmEngine

from tests.helpers.heads import ANSWERS, QUESTIONS, classifier_in, minilm, reranker_in
from tests.helpers.vllm_forks import vllm_forks
from tests.workers.engines.contract import CHECKS, Check, ask, chat

pytestmark = [
    pytest.mark.asyncio(loop_scope="module"),
    pytest.mark.timeout(300),
    pytest.mark.filterwarnings("ignore"),
]

PARAMS = {"dtype": "float32", "enforce_eager": "true", "max_num_seqs": "4", "kv_cache_memory_bytes": "1000000"}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def engines(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[dict[str, VllmEngine]]:
    """One of each kind."""
    folders = {
        "embedding": minilm(),
        "score": reranker_in(tmp_path_factory.mktemp("rank")),
        "classification": classifier_in(tmp_path_factory.mktemp("mood")),
    }
    made: dict[str, VllmEngine] = {}
    with vllm_forks():
        for kind, folder in folders.items():
            made[kind] = VllmEngine(EngineConfig(model="m", model_path=str(folder), params=PARAMS))
            await made[kind].start()
    yield made
    for engine in made.values():
        await engine.close()


def folder_of(engine: VllmEngine) -> str:
    return engine.config.model_path


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
async def test_they_keep_the_contract_of_engines(engines: dict[str, VllmEngine], check: Check) -> None:
    for engine in engines.values():
        await check(engine)


async def test_capabilities_tell_what_each_serves(engines: dict[str, VllmEngine]) -> None:
    said = {kind: engine.capabilities() for kind, engine in engines.items()}

    assert said["embedding"].tasks == ["embedding", "score"]
    assert said["score"].tasks == ["score"] and said["classification"].tasks == ["classification"]
    assert said["embedding"].dimensions == 384 and said["embedding"].context_length == 256
    assert said["score"].context_length == 512
    assert not any(capabilities.streaming or capabilities.adapters for capabilities in said.values())
    assert len({engine.compat() for engine in engines.values()}) == 3
    assert engines["score"].slots == 4


async def test_vectors_are_those_of_the_model(engines: dict[str, VllmEngine]) -> None:
    import torch
    from transformers import AutoModel, AutoTokenizer

    texts = ["A cat sits on the mat.", "你好", "one " * 60]
    tokenizer = AutoTokenizer.from_pretrained(minilm())
    inputs = tokenizer(texts, padding=True, return_tensors="pt")
    with torch.inference_mode():
        hidden = AutoModel.from_pretrained(minilm(), dtype=torch.float32)(**inputs).last_hidden_state
    mask = inputs["attention_mask"][..., None]
    expected = torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)

    answer = await ask(engines["embedding"], Embedding(input=[*texts, tokenizer.encode(texts[0])]))

    vectors = torch.tensor([struct.unpack("<384f", vector) for vector in answer.vectors])
    assert torch.allclose(vectors[:3], expected, atol=1e-4)
    assert torch.allclose(vectors[3], expected[0], atol=1e-4), "token ids are embedded like their text"
    assert answer.usage.prompt_tokens == int(mask.sum()) + len(tokenizer.encode(texts[0]))


async def test_an_embedding_model_scores_by_the_angle_of_its_vectors(engines: dict[str, VllmEngine]) -> None:
    engine = engines["embedding"]
    vectors = (await ask(engine, Embedding(input=[QUESTIONS[0], *ANSWERS]))).vectors
    query, *documents = (struct.unpack("<384f", vector) for vector in vectors)

    one = await ask(engine, Score(queries=QUESTIONS[:1], documents=ANSWERS))
    each = await ask(engine, Score(queries=[QUESTIONS[0]] * 4, documents=ANSWERS))

    scores = [struct.unpack("<f", score)[0] for score in one.vectors]
    expected = [sum(a * b for a, b in zip(query, document, strict=True)) for document in documents]
    assert scores == pytest.approx(expected, abs=1e-4)
    assert [struct.unpack("<f", score)[0] for score in each.vectors] == pytest.approx(expected, abs=1e-4)


async def test_scores_and_classes_are_those_of_the_transformers_engine(engines: dict[str, VllmEngine]) -> None:
    from modelbus_workers.engines.transformers import TransformersEngine

    tasks: dict[str, Task] = {
        "score": Score(queries=QUESTIONS[:1], documents=[*ANSWERS, "A long text about cats, dogs and cows. " * 8]),
        "classification": Classification(input=["I love it.", "I hate it.", "A train."]),
    }
    for kind, task in tasks.items():
        other = TransformersEngine(
            EngineConfig(model="m", model_path=folder_of(engines[kind]), params={"device": "cpu"})
        )
        await other.start()
        expected = await ask(other, task)
        await other.close()

        answer = await ask(engines[kind], task)

        assert answer.labels == expected.labels
        assert answer.usage == expected.usage
        for vector, wanted in zip(answer.vectors, expected.vectors, strict=True):
            form = f"<{len(wanted) // 4}f"
            assert struct.unpack(form, vector) == pytest.approx(struct.unpack(form, wanted), abs=1e-4)


@pytest.mark.parametrize(
    ("kind", "task", "error", "param"),
    [
        ("embedding", Embedding(input=["a", "word " * 300]), ContextLengthExceeded, "input"),
        ("embedding", Embedding(input=[]), InvalidRequest, "input"),
        ("embedding", Embedding(input=["a"], dimensions=10), InvalidRequest, "dimensions"),
        ("embedding", Score(queries=["word " * 300], documents=["a"]), ContextLengthExceeded, "queries"),
        ("score", Score(queries=["a"], documents=["b", "word " * 600]), ContextLengthExceeded, "documents"),
        ("score", Score(queries=["a"], documents=[]), InvalidRequest, "documents"),
        ("score", Score(queries=["a"], documents=["b"], extra={"colour": 1}), UnsupportedField, "colour"),
        ("score", Embedding(input=["a"]), UnsupportedField, "model"),
        ("classification", Classification(input=[[10**7]]), InvalidRequest, "input"),
        ("classification", Score(queries=["a"], documents=["b"]), UnsupportedField, "model"),
        ("classification", chat("hello"), UnsupportedField, "model"),
    ],
    ids=lambda value: type(value).__name__ if not isinstance(value, str) else value,
)
async def test_what_cannot_be_done_is_refused_by_name(
    engines: dict[str, VllmEngine],
    kind: str,
    task: Task,
    error: type[ModelBusError],
    param: str,
) -> None:
    with pytest.raises(error) as refused:
        await ask(engines[kind], task)

    assert refused.value.param == param


async def test_an_adapter_needs_a_deployment_that_takes_them(engines: dict[str, VllmEngine]) -> None:
    with pytest.raises(UnsupportedField, match="enable_lora"):
        await ask(engines["embedding"], Embedding(input=["a"]), adapter=Adapter(name="a", path="/nowhere"))


async def test_a_request_that_is_left_is_aborted_in_vllm(engines: dict[str, VllmEngine]) -> None:
    engine = engines["embedding"]
    task = asyncio.create_task(ask(engine, Embedding(input=["some words " * 100] * 200)))
    processor = engine._pooler.engine.output_processor  # type: ignore[union-attr]
    while processor.get_num_unfinished_requests() == 0:
        await asyncio.sleep(0.01)
    task.cancel()
    await asyncio.wait([task])

    assert processor.get_num_unfinished_requests() == 0
    assert len((await ask(engine, Embedding(input=["a"]))).vectors) == 1


async def test_a_chat_template_that_cannot_be_read_is_told(tmp_path: Path) -> None:
    engine = VllmEngine(
        EngineConfig(model="m", model_path=str(minilm()), params=PARAMS | {"chat_template": str(tmp_path / "none")})
    )
    with pytest.raises(ConfigurationError, match="chat_template"):
        await engine.start()
