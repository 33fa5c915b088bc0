"""The transformers engine on models that score and classify: the embedding model of the tests, taught for some seconds."""

from __future__ import annotations

import json
import struct
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import modelbus
import pytest
import pytest_asyncio
from modelbus_broker.errors import (
    ConfigurationError,
    ContextLengthExceeded,
    InvalidRequest,
    ModelBusError,
    UnsupportedField,
)
from modelbus_broker.messages import Classification, Deployment, Score
from modelbus_workers.engines.base import EngineConfig

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from modelbus_workers.engines.transformers import TransformersEngine  # noqa: E402

from tests.helpers.heads import ANSWERS, QUESTIONS, classifier_in, reranker_in  # noqa: E402
from tests.helpers.search_cluster import search_cluster  # noqa: E402
from tests.workers.engines.contract import CHECKS, Check, ask, chat  # noqa: E402

pytestmark = [
    pytest.mark.asyncio(loop_scope="module"),
    pytest.mark.timeout(300),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]


async def started(folder: Path, **params: str) -> TransformersEngine:
    engine = TransformersEngine(EngineConfig(model="m", model_path=str(folder), params=params))
    await engine.start()
    return engine


@pytest.fixture(scope="module")
def reranker_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return reranker_in(tmp_path_factory.mktemp("rank"))


@pytest.fixture(scope="module")
def classifier_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return classifier_in(tmp_path_factory.mktemp("mood"))


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def reranker(reranker_folder: Path) -> AsyncIterator[TransformersEngine]:
    made = await started(reranker_folder, batch_size="2", device="cpu")
    yield made
    await made.close()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def classifier(classifier_folder: Path) -> AsyncIterator[TransformersEngine]:
    made = await started(classifier_folder, device="cpu")
    yield made
    await made.close()


def changed(folder: Path, copy: Path, **config: Any) -> Path:
    """The same model with a config that says something else."""
    copy.mkdir()
    for file in folder.iterdir():
        if file.name != "config.json":
            (copy / file.name).symlink_to(file)
    (copy / "config.json").write_text(json.dumps(json.loads((folder / "config.json").read_text()) | config))
    return copy


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
async def test_a_reranker_and_a_classifier_keep_the_contract(
    check: Check, reranker: TransformersEngine, classifier: TransformersEngine
) -> None:
    await check(reranker)
    await check(classifier)


async def test_capabilities_tell_the_one_task_of_the_head(
    reranker: TransformersEngine, classifier: TransformersEngine
) -> None:
    assert reranker.capabilities().tasks == ["score"]
    assert classifier.capabilities().tasks == ["classification"]
    assert classifier.capabilities().context_length == 512
    assert reranker.slots == 8 and reranker.compat() and reranker.compat() != classifier.compat()


async def test_scores_are_those_of_the_librarys_cross_encoder(
    reranker: TransformersEngine, reranker_folder: Path
) -> None:
    from sentence_transformers import CrossEncoder

    documents = [*ANSWERS, "A much longer text about cats, dogs, birds and all the other animals of the farm."]
    expected = CrossEncoder(str(reranker_folder), device="cpu").predict([(QUESTIONS[0], text) for text in documents])

    answer = await ask(reranker, Score(queries=QUESTIONS[:1], documents=documents))

    assert [struct.unpack("<f", score)[0] for score in answer.vectors] == pytest.approx(expected.tolist(), abs=1e-5)


async def test_a_folder_that_wants_bare_logits_gets_them(
    reranker: TransformersEngine, reranker_folder: Path, tmp_path: Path
) -> None:
    said = {"activation_fn": "torch.nn.modules.linear.Identity"}
    bare = await started(changed(reranker_folder, tmp_path / "bare", sentence_transformers=said), device="cpu")
    task = Score(queries=QUESTIONS[:1], documents=ANSWERS)

    scores = [struct.unpack("<f", score)[0] for score in (await ask(reranker, task)).vectors]
    logits = [struct.unpack("<f", score)[0] for score in (await ask(bare, task)).vectors]
    await bare.close()

    assert torch.tensor(logits).sigmoid().tolist() == pytest.approx(scores, abs=1e-5)


async def test_scores_made_by_an_unknown_function_are_refused_at_the_start(
    reranker_folder: Path, tmp_path: Path
) -> None:
    folder = changed(reranker_folder, tmp_path / "odd", sentence_transformers={"activation_fn": "some.where.Cube"})

    with pytest.raises(ConfigurationError, match="some.where.Cube"):
        await started(folder)


async def test_a_classifier_tells_glad_texts_from_angry_ones_by_its_labels(classifier: TransformersEngine) -> None:
    loved = classifier._head._tokenizer("I love it.", add_special_tokens=False)["input_ids"]  # type: ignore[union-attr]

    answer = await ask(classifier, Classification(input=["I love it.", "I hate it.", loved]))

    glad, angry, again = (struct.unpack("<2f", vector) for vector in answer.vectors)
    assert answer.labels == ["glad", "angry"]
    assert glad[0] > 0.6 and angry[1] > 0.6
    assert again == pytest.approx(glad, abs=1e-4), "token ids are classified like their text"


async def test_labels_that_may_hold_together_have_probabilities_of_their_own(
    classifier_folder: Path, tmp_path: Path
) -> None:
    folder = changed(classifier_folder, tmp_path / "multi", problem_type="multi_label_classification")
    engine = await started(folder, device="cpu")

    answer = await ask(engine, Classification(input=["I love it."]))
    logits = engine._head._model(**engine._head._tokenizer("I love it.", return_tensors="pt")).logits[0]  # type: ignore[union-attr]
    await engine.close()

    assert struct.unpack("<2f", answer.vectors[0]) == pytest.approx(logits.sigmoid().tolist(), abs=1e-4)


@pytest.mark.parametrize(
    ("task", "error", "param"),
    [
        (Score(queries=["a"], documents=["b", "word " * 600]), ContextLengthExceeded, "documents"),
        (Score(queries=["a"], documents=[]), InvalidRequest, "documents"),
        (Score(queries=["a", "b"], documents=["c", "d", "e"]), InvalidRequest, "queries"),
        (Score(queries=["a"], documents=["b"], extra={"colour": 1}), UnsupportedField, "colour"),
        (Classification(input=["word " * 600]), ContextLengthExceeded, "input"),
        (Classification(input=[]), InvalidRequest, "input"),
        (Classification(input=[[10**7]]), InvalidRequest, "input"),
    ],
)
async def test_what_cannot_be_judged_is_refused_by_name(
    reranker: TransformersEngine,
    classifier: TransformersEngine,
    task: Score | Classification,
    error: type[ModelBusError],
    param: str,
) -> None:
    with pytest.raises(error) as caught:
        await ask(reranker if isinstance(task, Score) else classifier, task)

    assert caught.value.param == param


async def test_a_pair_that_is_too_long_is_refused_with_the_numbers(reranker: TransformersEngine) -> None:
    with pytest.raises(ContextLengthExceeded, match=r"512 tokens, but document 1 has 604 tokens with its query"):
        await ask(reranker, Score(queries=["a"], documents=["b", "word " * 600]))


async def test_each_head_refuses_the_others_tasks(reranker: TransformersEngine, classifier: TransformersEngine) -> None:
    with pytest.raises(UnsupportedField, match="does not classify"):
        await ask(reranker, Classification(input=["a"]))
    with pytest.raises(UnsupportedField, match="does not score"):
        await ask(classifier, Score(queries=["a"], documents=["b"]))
    with pytest.raises(UnsupportedField, match="does not serve chat"):
        await ask(reranker, chat("hello"))


async def test_a_store_is_searched_with_a_cross_encoder_that_orders_its_hits(
    reranker_folder: Path, tmp_path: Path
) -> None:
    # What each question asks in other words shares more of them with it than its answer does.
    asked_again = [f"{question} Tell me: {question}" for question in QUESTIONS]
    async with search_cluster(tmp_path) as cluster:
        wish = Deployment(
            name="cross", model="cross", engine="transformers", revision="1", model_path=str(reranker_folder),
            engine_params={"device": "cpu"},
        )  # fmt: skip
        await cluster.declare(wish)
        cluster.start_worker(wish)
        await cluster.wait_ready("cross", 1, 90)
        async with modelbus.connect(cluster.server.url) as client:
            store = modelbus.AsyncStore("answers", client=client)
            await store.upsert({"id": text, "text": text} for text in [*ANSWERS, *asked_again])
            plain = [await store.search(question, limit=8) for question in QUESTIONS]
            ranked = [await store.search(question, limit=8, rerank="cross") for question in QUESTIONS]
            alone = [await client.rerank("cross", question, found.texts) for question, found in zip(QUESTIONS, plain, strict=True)]  # fmt: skip

    assert [found.rerank_error for found in ranked] == [""] * 4 and all(found.reranked for found in ranked)
    for found, expected in zip(ranked, alone, strict=True):
        scores = {document.text: document.score for document in expected.documents}
        assert {hit.chunk.text: hit.score for hit in found.hits} == pytest.approx(scores, abs=1e-3)
        assert [hit.score for hit in found.hits] == sorted((hit.score for hit in found.hits), reverse=True)
    assert [found.texts[0] for found in plain] == asked_again
    assert [next(text for text in found.texts if text in ANSWERS) for found in ranked] == ANSWERS
    assert any(one.texts != other.texts for one, other in zip(plain, ranked, strict=True))
