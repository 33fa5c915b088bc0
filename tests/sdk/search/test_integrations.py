"""A store inside LlamaIndex and LangChain, the real packages, over a real bus with a real search worker."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import modelbus
import pytest
import pytest_asyncio
from langchain_core.embeddings import Embeddings
from llama_index.core.schema import NodeRelationship, RelatedNodeInfo, TextNode
from llama_index.core.vector_stores.types import (
    FilterCondition,
    FilterOperator,
    MetadataFilter,
    MetadataFilters,
    VectorStoreQuery,
    VectorStoreQueryMode,
    VectorStoreQueryResult,
)
from modelbus.errors import InvalidRequest
from modelbus.integrations import langchain, llama_index
from modelbus.integrations.metadata import attributes_of, metadata_of

from tests.helpers.cluster import Cluster
from tests.helpers.doc_blocks import DOCS, run_page
from tests.helpers.search_cluster import search_cluster

together = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def shared(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Cluster]:
    async with search_cluster(tmp_path_factory.mktemp("search")) as cluster:
        yield cluster


@pytest_asyncio.fixture(loop_scope="module")
async def connected(shared: Cluster, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[None]:
    """This process's own connection leads to the cluster."""
    monkeypatch.setenv("MODELBUS_ADDRESS", shared.server.url)
    yield
    await asyncio.to_thread(modelbus.disconnect)


def node(id: str, text: str, embedding: list[float], file: str, **metadata: Any) -> TextNode:
    source = RelatedNodeInfo(node_id=file)
    return TextNode(
        id_=id, text=text, embedding=embedding, metadata=metadata, relationships={NodeRelationship.SOURCE: source}
    )


NODES = [
    node("bus", "The bus stores requests", [1, 0], "a", year=2024, tags=["x", {"y": None}], note="n" * 9000),
    node("zh", "部署一个大模型", [0, 1], "a", year=2025),
    node("gate", "The gateway speaks HTTP to the bus", [1, 1], "b", year=2026),
]


def only(key: str, operator: FilterOperator, value: Any) -> MetadataFilter:
    return MetadataFilter(key=key, operator=operator, value=value)


@together
async def test_llama_index_finds_nodes_by_vector_by_text_and_by_both(connected: None) -> None:
    store = llama_index.ModelBusVectorStore("vectors")
    assert store.client.name == "vectors" and await store.async_add(NODES) == ["bus", "zh", "gate"]

    async def asked(mode: str, **fields: Any) -> VectorStoreQueryResult:
        return await store.aquery(VectorStoreQuery(mode=VectorStoreQueryMode(mode), similarity_top_k=3, **fields))

    nearest = await asked("default", query_embedding=[1.0, 0.1], query_str="大模型")
    assert nearest.ids == ["bus", "gate", "zh"] and nearest.nodes and nearest.similarities
    first = nearest.nodes[0]
    # It comes back as it was, without its vector.
    assert (first.metadata, first.ref_doc_id, first.get_content()) == (NODES[0].metadata, "a", NODES[0].text)
    assert nearest.similarities == sorted(nearest.similarities, reverse=True)
    assert (await asked("text_search", query_str="大模型")).ids == ["zh"]
    by_text = await asked("hybrid", query_str="大模型", query_embedding=[1.0, 0.1], alpha=0.0)
    by_vector = await asked("hybrid", query_str="大模型", query_embedding=[1.0, 0.1], alpha=1.0)
    assert by_text.ids and by_vector.ids and (by_text.ids[0], by_vector.ids[0]) == ("zh", "bus")
    newer = MetadataFilters(filters=[only("year", FilterOperator.GT, 2024)])
    neither = MetadataFilters(
        filters=[only("year", FilterOperator.EQ, 2024), only("year", FilterOperator.IN, [2025])],
        condition=FilterCondition.NOT,
    )
    assert (await asked("default", query_embedding=[1.0, 0.1], filters=newer)).ids == ["gate", "zh"]
    assert (await asked("default", query_embedding=[1.0, 0.1], filters=neither)).ids == ["gate"]
    assert (await asked("default", query_embedding=[1.0, 0.1], doc_ids=["a"], node_ids=["zh", "gate"])).ids == ["zh"]
    with pytest.raises(InvalidRequest, match="mode 'mmr' is none of default"):
        await asked("mmr", query_embedding=[1.0, 0.1])
    with pytest.raises(InvalidRequest, match="'text_match' on 'year'"):
        await asked("default", query_embedding=[1.0, 0.1], filters=MetadataFilters(filters=[only("year", FilterOperator.TEXT_MATCH, "x")]))  # fmt: skip

    def plainly() -> None:
        store.delete_nodes(["zh", "gate"], newer)
        assert [node.node_id for node in store.get_nodes()] == ["bus"]
        assert store.add(NODES[2:]) == ["gate"]
        store.delete("a")
        assert store.query(VectorStoreQuery(query_embedding=[1.0, 0.0], similarity_top_k=3)).ids == ["gate"]
        store.clear()
        assert store.get_nodes(["gate"]) == []

    await asyncio.to_thread(plainly)


class Lengths(Embeddings):  # type: ignore[misc]
    """A text by its length and its number of words."""

    def embed_documents(self, texts: list[str]) -> list[list[float]]:
        return [self.embed_query(text) for text in texts]

    def embed_query(self, text: str) -> list[float]:
        return [float(len(text)), 10.0 * len(text.split())]


@together
async def test_langchain_retrieves_documents(connected: None) -> None:
    texts = ["The bus stores requests", "部署一个大模型"]
    metadatas: list[dict[str, Any]] = [{"lang": "en", "pages": [1, 2]}, {"lang": "zh"}]

    def plainly() -> None:
        store = langchain.ModelBusVectorStore.from_texts(texts, Lengths(), metadatas, ids=["bus", "zh"], store="texts")
        (document,) = store.similarity_search("requests", k=1, mode="text")
        assert (document.id, document.page_content, document.metadata) == ("bus", texts[0], metadatas[0])
        # As long, and as many words.
        ((nearest, score),) = store.similarity_search_with_relevance_scores(
            "A map tells directions", k=1, mode="vector"
        )
        assert nearest.id == "bus" and score > 0.99
        assert [item.id for item in store.similarity_search_by_vector([7.0, 10.0], k=1)] == ["zh"]
        retriever = store.as_retriever(
            search_type="similarity_score_threshold", search_kwargs={"score_threshold": 0.1, "k": 4, "sort": "$id"}
        )
        assert [item.id for item in retriever.invoke("bus")] == ["bus"]
        assert store.delete(["bus"]) and [item.id for item in store.get_by_ids(["bus", "zh"])] == ["zh"]
        assert store.delete() and store.get_by_ids(["zh"]) == []
        with pytest.raises(InvalidRequest, match=r"store=NAME"):
            langchain.ModelBusVectorStore.from_texts(texts, None)
        with pytest.raises(InvalidRequest, match="2 texts and 1 ids"):
            store.add_texts(texts, ids=["one"])

    await asyncio.to_thread(plainly)
    store = langchain.ModelBusVectorStore(modelbus.Store("texts"))
    (generated,) = await store.aadd_texts(["Queues wait"])
    assert [item.id for item in await store.as_retriever().ainvoke("queue")] == [generated]
    await store.adelete()


def test_metadata_comes_back_whole_and_what_can_be_compared_stands_by_its_name() -> None:
    metadata = {
        "year": 2024, "share": 0.5, "draft": True, "title": "T", "a.b": 1, "": "no name", "long": "é" * 10_000,
        "huge": 2**60, "none": None, "list": [1, {"x": "y"}], "json-0": "mine", "nan": "x\0y",
    }  # fmt: skip

    attributes = attributes_of(metadata, {"more": "m"})

    assert metadata_of(attributes) == metadata | {"more": "m"}
    assert {name for name in attributes if not name.startswith("json-")} == {"year", "share", "draft", "title"}
    assert all(len(value) <= 4096 for value in attributes.values() if isinstance(value, str))
    assert attributes_of({"year": 1}) == {"year": 1}


@together
async def test_the_examples_of_the_page_run_as_they_stand_there(connected: None) -> None:
    await asyncio.to_thread(run_page, DOCS / "integrations.md")
