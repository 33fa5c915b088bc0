"""Knowledge bases by their names, over a real bus: answers with citations, talks, recall by a model, several collections."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import modelbus
import msgspec
import openai
import pytest
import pytest_asyncio
from modelbus import hooks
from modelbus.errors import ConfigurationError, InvalidRequest, ModelNotFound, NotFound
from modelbus.knowledge.answering import cited, fitting
from modelbus.knowledge.base import knowledge_bases
from modelbus.knowledge.recall import parts
from modelbus.knowledge.routing import nearest
from modelbus.search.embedding import _halves
from modelbus_broker.credentials import make_credentials
from modelbus_broker.messages import Context, Deployment
from modelbus_broker.messages.search import Chunk
from modelbus_broker.settings import BusSettings
from modelbus_workers.engines.base import EngineConfig
from modelbus_workers.engines.knowledge import KnowledgeEngine

from tests.helpers.cluster import Cluster
from tests.helpers.doc_blocks import DOCS, run_page
from tests.helpers.gateways import started_gateways
from tests.helpers.search_cluster import search_cluster

pytestmark = pytest.mark.asyncio(loop_scope="module")

ANSWER = "It is red [2], says the guide 【1、2】 [9]."
SCRIPT = {
    "rules": [
        {"pattern": "(?s)Document:.*trains: all.*Is this the description", "answer": '{"score": 9}'},
        {"pattern": "(?s)Document:.*Is this the description", "answer": '{"score": 1}'},
        {"pattern": "(?s)Document:.*lever.*Does this document help", "answer": '{"score": 8}'},
        {"pattern": "(?s)Document:.*spoilt.*Does this document help", "answer": "I cannot say."},
        {"pattern": "(?s)Document:.*Does this document help", "answer": '{"score": 2}'},
        {"pattern": "\\Auser: ", "answer": "Where is the red brake?"},
        {"pattern": "\\ADocuments:", "answer": ANSWER},
    ],
}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def shared(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Cluster]:
    async with search_cluster(tmp_path_factory.mktemp("search")) as cluster:
        params = {"script": json.dumps(SCRIPT)}
        chat = Deployment(name="chat", model="chat", engine="scripted", revision="1", engine_params=params)
        await cluster.declare(chat)
        cluster.start_worker(chat)
        await cluster.wait_ready("chat", 1)
        yield cluster


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def client(shared: Cluster) -> AsyncIterator[modelbus.Client]:
    async with modelbus.connect(shared.server.url) as client:
        yield client


def base(client: modelbus.Client, name: str, **more: str) -> modelbus.AsyncKnowledgeBase:
    return modelbus.AsyncKnowledgeBase(name, client=client, model="chat", embedding_model="emb", **more)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def built(client: modelbus.Client, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two collections, ``trains`` and ``plants``, each with the description of what it is about."""
    folder = tmp_path_factory.mktemp("docs")
    for name, text in {
        "trains/guide.md": "# Guide\n\nThe emergency brake is red.\n\n" + "Pull the lever twice. " * 60,
        "trains/tea.md": "# Tea\n\nTea is served in the first carriage.",
        "trains/spoilt.md": "# Spoilt\n\nThe judge cannot read this.",
        "plants/rose.md": "# Rose\n\nRoses are red and want sun.",
    }.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    for name in ("trains", "plants"):
        report = await base(client, name, description=f"all about {name}").build(folder / name)
        assert report.failed == {} and report.folder == str(folder / name)
    return folder


async def test_an_answer_has_the_passages_that_it_was_made_of_and_those_that_it_cites(
    client: modelbus.Client, built: Path
) -> None:
    trains = base(client, "trains")

    answered = await trains.query("What colour is the brake?")
    streamed: list[str] = []
    async with trains.stream("What colour is the brake?", limit=2, system="Be short.", fields={"seed": 1}) as stream:
        assert [context.number for context in stream.contexts] == [1, 2]
        async for delta in stream:
            streamed.append(delta.text)

    assert answered.text == ANSWER and answered.question == "What colour is the brake?"
    assert answered.citations == [answered.contexts[1], answered.contexts[0]]
    assert (
        answered.contexts[0].file == str(built / "trains" / "guide.md") and answered.contexts[0].collection == "trains"
    )
    assert "".join(streamed) == stream.answer.text == ANSWER and len(streamed) > 1
    assert stream.grounding.citations == [2, 1]
    assert (await trains.search("carriage", mode="text")).hits[0].chunk.file_id.endswith("tea.md")
    assert cited("[1][3, 1] [x] [0] 【4】", 3) == [1, 3]


async def test_a_talk_looks_for_the_question_as_the_model_has_rewritten_it(
    client: modelbus.Client, built: Path
) -> None:
    talk = base(client, "trains").chat(limit=1)

    first, second = await talk.query("What colour is the brake?"), await talk.query("And where is it?")

    assert (first.question, second.question) == ("What colour is the brake?", "Where is the red brake?")
    assert [turn["content"] for turn in talk.history] == [
        "What colour is the brake?",
        ANSWER,
        "And where is it?",
        ANSWER,
    ]


async def test_recall_by_a_model_judges_all_documents_in_the_lane_for_batches(
    client: modelbus.Client, built: Path
) -> None:
    trains, lanes = base(client, "trains"), []

    @hooks.before
    def seen(call: hooks.ChatCall) -> None:
        lanes.append(call.options.lane)

    try:
        found = await trains.contexts("How is it stopped?", recall="model")
    finally:
        seen()

    guide = (built / "trains" / "guide.md").read_text()
    (context,) = found  # the guide, whole; what the judge said of the spoilt one is no number
    assert context.file.endswith("guide.md") and context.text.split() == guide.split() and context.score == 0.8
    assert (context.line, context.last_line) == (1, 5)
    assert set(lanes) == {"lo"} and len(lanes) >= 3
    # A model that decides gives probabilities. Echo finds likely what it is told first, which here is the name of the file.
    (built / "judged").mkdir()
    for name in ("yes.txt", "x.txt"):
        (built / "judged" / name).write_text("no")
    judged = base(client, "judged")
    await judged.build(built / "judged")
    (taken,) = await judged.contexts("q", recall="model", recall_model="emb")
    assert taken.file.endswith("yes.txt") and 0.5 < taken.score < 1
    await judged.drop()


async def test_of_several_collections_those_are_asked_that_the_question_is_about(
    client: modelbus.Client, built: Path
) -> None:
    both = modelbus.AsyncKnowledgeBase("trains", client=client, model="chat", also=["plants"])

    everywhere = await both.contexts("What is red?", limit=10)
    routed = await both.contexts("What is red?", limit=10, route="model")
    near = await both.contexts("What is red?", limit=10, route="embedding")  # as many as there are

    assert {context.collection for context in everywhere} == {"trains", "plants"} == {c.collection for c in near}
    assert [context.score for context in everywhere] == sorted((c.score for c in everywhere), reverse=True)
    assert {context.collection for context in routed} == {"trains"}
    assert nearest([1.0, 0.0], {"a": [0.9, 0.1], "b": [0.0, 1.0], "c": [5.0, 5.0]}, 2) == {"a", "c"}
    shown = {status.record.name: status.record.metadata for status in await knowledge_bases(client)}
    assert shown["trains"]["description"] == "all about trains"
    # A build without a description keeps it.
    await base(client, "trains").build(built / "trains")
    assert (await both.status()).record.metadata == shown["trains"]


async def test_a_knowledge_base_is_a_model_that_any_gateway_serves(
    shared: Cluster, client: modelbus.Client, built: Path
) -> None:
    params = {"model": "chat", "collections": "trains, plants", "limit": "2", "system": "Be short."}
    docs = Deployment(name="docs", model="docs", engine="knowledge", revision="1", engine_params=params)
    await shared.declare(docs)
    shared.start_worker(docs)
    with started_gateways() as start:
        gateway = start("--address", shared.server.url)
        await asyncio.gather(shared.wait_ready("docs", 1), gateway.ready())
        async with openai.AsyncOpenAI(base_url=f"{gateway.url}/v1", api_key="none", max_retries=0) as asker:
            ask: Any = asker.chat.completions.create
            first = [{"role": "user", "content": "What colour is the brake?"}]
            talk = [*first, {"role": "assistant", "content": "Red."}, {"role": "user", "content": "Where is it?"}]

            plain = await ask(model="docs", messages=first, seed=1)
            chunks = [chunk async for chunk in await ask(model="docs", messages=talk, stream=True)]
            options = {"include_usage": True}
            counted = [c async for c in await ask(model="docs", messages=first, stream=True, stream_options=options)]
            refused = []
            for wrong in ({"messages": talk[:2]}, {"messages": first, "n": 2}):
                with pytest.raises(openai.BadRequestError) as error:
                    await ask(model="docs", **wrong)
                refused.append(str(error.value))

    guide = str(built / "trains" / "guide.md")
    grounding = plain.model_extra["grounding"]
    assert plain.choices[0].message.content == ANSWER and plain.usage.completion_tokens > 0
    assert grounding["question"] == "What colour is the brake?" and grounding["citations"] == [2, 1]
    assert [context["number"] for context in grounding["contexts"]] == [1, 2]
    assert guide in {context["file"] for context in grounding["contexts"]}
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == ANSWER
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices[0].finish_reason] == ["stop"]
    last = chunks[-1].model_extra["grounding"]
    assert (last["question"], last["citations"]) == ("Where is the red brake?", [2, 1])
    assert counted[-1].choices == [] and counted[-1].usage.completion_tokens > 0
    assert counted[-1].model_extra["grounding"] == grounding
    assert "the last message is the question" in refused[0] and "n" in refused[1]
    asked = await client.chat("docs", "What colour is the brake?")
    assert asked.grounding is not None and asked.grounding.contexts[0].file == grounding["contexts"][0]["file"]


async def test_a_worker_that_may_not_ask_or_has_nothing_to_ask_says_so(shared: Cluster, tmp_path: Path) -> None:
    def engine(params: dict[str, str], bus: BusSettings = shared.settings) -> KnowledgeEngine:
        return KnowledgeEngine(EngineConfig(model="docs", params=params, bus=bus))

    wrong: list[tuple[dict[str, str], str]] = [
        ({}, "needs model=NAME"),
        ({"model": "docs"}, "cannot ask itself"),
        ({"model": "chat", "collections": " ,"}, "names at least one"),
    ]
    for params, words in wrong:
        with pytest.raises(ConfigurationError, match=words):
            engine(params)
    answers_only = msgspec.structs.replace(shared.settings, creds=str(make_credentials(tmp_path / "c")["worker"]))
    with pytest.raises(ConfigurationError, match="a client's credential"):
        await engine({"model": "chat"}, answers_only).start()
    for params, kind in (
        ({"model": "chat", "collections": "missing"}, NotFound),
        ({"model": "missing"}, ModelNotFound),
    ):
        made = engine(params)
        with pytest.raises(kind):
            await made.start()
        await made.close()


async def test_what_cannot_be_asked_is_refused(client: modelbus.Client, built: Path) -> None:
    for asking, words in (
        (modelbus.AsyncKnowledgeBase("trains", client=client).query("x"), "needs a chat model"),
        (modelbus.AsyncKnowledgeBase("trains", client=client).contexts("x", recall="model"), "model that judges"),
        (modelbus.AsyncKnowledgeBase("trains", client=client).build(built), "needs an embedding model"),
        (base(client, "trains").query("x", limit=0), "limit is at least 1"),
    ):
        with pytest.raises(InvalidRequest, match=words):
            await asking
    with pytest.raises(NotFound):
        await base(client, "missing").query("x")
    assert await base(client, "missing").drop() == 0


async def test_a_plain_program_has_the_same(shared: Cluster, built: Path, tmp_path: Path) -> None:
    def program() -> None:
        modelbus.connect_cluster(shared.server.url)
        try:
            kb = modelbus.KnowledgeBase("plain", model="chat", embedding_model="emb")
            assert kb.build(built / "plants", extensions=[".md"]).written == 1
            stream = kb.stream("What is red?")
            assert "".join(delta.text for delta in stream) == ANSWER == kb.query("What is red?").text
            assert stream.contexts == kb.contexts("What is red?")
            assert kb.search("sun", mode="text").hits and kb.status().files == 1
            talk = kb.chat()
            assert talk.query("What is red?").text == ANSWER and len(talk.history) == 2
            assert kb.drop() == 1
        finally:
            modelbus.disconnect()

    await asyncio.to_thread(program)


async def test_the_page_is_right(shared: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "guides").mkdir()
    (tmp_path / "guides" / "lever.md").write_text("# Stop\n\nPull the lever.")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MODELBUS_ADDRESS", shared.settings.url)
    try:
        names = await asyncio.to_thread(run_page, DOCS / "knowledge.md")
    finally:
        await asyncio.to_thread(modelbus.disconnect)
    assert names["report"].written == 1 and [c.number for c in names["answered"].citations] == [1]
    assert len(names["talk"].history) == 4


async def test_a_model_gets_as_many_passages_as_take_half_of_what_it_reads() -> None:
    found = [Context(number=n, file="f", text="word " * 100) for n in (1, 2, 3)]

    assert [len(fitting(found, tokens)) for tokens in (0, 100, 410, 1000)] == [3, 1, 2, 3]


async def test_parts_of_files_join_what_overlaps() -> None:
    text = "abcdefghij"
    chunks = [
        Chunk(id=str(n), text=text[start:end], file_id="f", start=start, end=end, attributes={"line": n})
        for n, (start, end) in enumerate([(0, 4), (3, 6), (7, 10)])
    ]
    other = Chunk(id="o", text="other", file_id="g")

    joined = list(parts("s", [*chunks, other], size=100))

    assert [(part.file, part.text) for part in joined] == [("f", "abcdef\nhij"), ("g", "other")]
    assert [part.text for part in parts("s", chunks, size=7)] == ["abcdef", "hij"]


async def test_a_text_that_is_too_long_to_embed_is_cut_at_a_blank_near_its_middle() -> None:
    assert _halves("one two three four") == ("one two", " three four")
    assert _halves("abcdef") == ("abc", "def") and _halves("a" * 40 + " b") == ("a" * 21, "a" * 19 + " b")
