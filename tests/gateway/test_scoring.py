"""Reranking, scoring and classifying, through a real bus and a real worker; and what is refused."""

from __future__ import annotations

from typing import Any

import aiohttp
import pytest

DOCUMENTS = ["The train leaves at nine.", "Cats eat mice.", "A cat does eat what it likes."]
QUERY = "What does a cat eat?"


async def post(url: str, body: dict[str, Any]) -> tuple[int, Any]:
    async with aiohttp.ClientSession() as http, http.post(url, json={"model": "echo", **body}) as response:
        return response.status, await response.json()


async def test_reranking_gives_the_best_documents_first(echo_url: str) -> None:
    status, body = await post(f"{echo_url}/v1/rerank", {"query": QUERY, "documents": DOCUMENTS, "top_n": 2})
    assert status == 200
    assert [(result["index"], result["document"]["text"]) for result in body["results"]] == [
        (2, DOCUMENTS[2]), (1, DOCUMENTS[1]),
    ]  # fmt: skip
    assert [result["relevance_score"] for result in body["results"]] == pytest.approx([1.0, 0.2])
    assert body["usage"]["prompt_tokens"] == body["usage"]["total_tokens"] == 3 * 5 + 5 + 3 + 7


async def test_documents_may_be_objects_and_need_not_come_back(echo_url: str) -> None:
    documents = [{"text": text} for text in DOCUMENTS]
    asked = {"query": QUERY, "documents": documents, "return_documents": False}
    _, body = await post(f"{echo_url}/v1/rerank", asked)
    assert [set(result) for result in body["results"]] == [{"index", "relevance_score"}] * 3


async def test_scores_come_in_the_order_of_the_texts(echo_url: str) -> None:
    _, body = await post(f"{echo_url}/v1/score", {"text_1": QUERY, "text_2": DOCUMENTS})
    assert [(item["index"], item["score"]) for item in body["data"]] == [
        (0, 0.0), (1, pytest.approx(0.2)), (2, pytest.approx(1.0)),
    ]  # fmt: skip
    _, pairs = await post(f"{echo_url}/v1/score", {"text_1": ["a b", "c"], "text_2": ["b", "d"]})
    assert [item["score"] for item in pairs["data"]] == [0.5, 0.0]


async def test_classes_come_with_their_probabilities(echo_url: str) -> None:
    _, body = await post(f"{echo_url}/v1/classify", {"input": ["two words", "word " * 24]})
    assert [item["label"] for item in body["data"]] == ["short", "long"]
    assert body["data"][0]["probs"] == pytest.approx([0.8, 0.2])
    assert body["data"][0]["num_classes"] == 2


@pytest.mark.parametrize(
    ("route", "body", "param"),
    [
        ("rerank", {"documents": ["a"]}, "query"),
        ("rerank", {"query": "", "documents": ["a"]}, "query"),
        ("rerank", {"query": "a", "documents": []}, "documents"),
        ("rerank", {"query": "a", "documents": ["b"], "top_n": 0}, "top_n"),
        ("rerank", {"query": "a", "documents": [{"title": "b"}]}, "documents[0].text"),
        ("rerank", {"query": "a", "documents": ["b"] * 2049}, "documents"),
        ("score", {"text_1": ["a", "b"], "text_2": ["c"]}, "text_1"),
        ("score", {"text_1": [], "text_2": []}, "text_1"),
        ("score", {"text_1": "a", "text_2": []}, "text_2"),
        ("classify", {"input": []}, "input"),
        ("classify", {"input": "a", "model": "other"}, "model"),
    ],
    ids=str,
)
async def test_what_makes_no_sense_is_refused_with_the_field_at_fault(
    echo_url: str, route: str, body: dict[str, Any], param: str
) -> None:
    status, answer = await post(f"{echo_url}/v1/{route}", body)
    assert status in (400, 404)
    assert answer["error"]["param"] == param
