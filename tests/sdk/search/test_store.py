"""Stores over a real bus, with a real search worker and embeddings of a real (echo) worker."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Coroutine
from pathlib import Path
from typing import Any

import modelbus
import pytest
import pytest_asyncio
from modelbus.errors import Conflict, DeadlineExceeded, InvalidRequest, ModelNotFound, NotFound
from modelbus.search.asking import list_stores
from modelbus.search.copies import export_store, restore_store
from modelbus.search.items import batches, chunk_of, filter_of, packed, sort_of
from modelbus_broker.messages.search import Chunk, Filter, Fusion, Sort, Span

from tests.helpers.cluster import Cluster, WorkerProcess
from tests.helpers.search_cluster import search_cluster, search_deployment, start_search


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def shared(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Cluster]:
    async with search_cluster(tmp_path_factory.mktemp("search")) as cluster:
        yield cluster


@pytest_asyncio.fixture(loop_scope="module")
async def client(shared: Cluster) -> AsyncIterator[modelbus.Client]:
    """Every test begins without stores."""
    async with modelbus.connect(shared.server.url) as client:
        yield client
        for status in await list_stores(client):
            await modelbus.AsyncStore(status.record.name, client=client).drop()


together = pytest.mark.asyncio(loop_scope="module")

PAGE = Path(__file__).resolve().parents[3] / "docs" / "search.md"

DOCUMENTS: list[dict[str, Any]] = [
    {"id": "bus", "text": "The bus stores requests", "attributes": {"lang": "en", "year": 2020}},
    {"id": "zh", "text": "部署一个大模型", "attributes": {"lang": "zh", "year": 2024}},
    {"id": "part0", "text": "First part of a guide", "file_id": "guide.md", "title": "Guide > Start"},
    {"id": "part1", "text": "Second part", "file_id": "guide.md", "ordinal": 1, "attributes": {"lang": "en"}},
]


def found(result: modelbus.SearchResult) -> list[str]:
    return [hit.chunk.id for hit in result.hits]


@together
async def test_a_store_is_written_searched_changed_and_dropped(client: modelbus.Client) -> None:
    store = modelbus.AsyncStore("notes", client=client, embedding_model="emb", passage_prefix="passage: ")

    with pytest.raises(NotFound, match="no store 'notes'"):
        await store.search("bus")
    assert await store.upsert(DOCUMENTS) == ["bus", "zh", "part0", "part1"]
    (named,) = await store.upsert({"text": "  no id, and blanks  "})
    assert await store.upsert({"text": "  no id, and blanks  "}) == [named]

    status = await store.status()
    assert (status.chunks, status.vectors, status.files, status.engine) == (5, 5, 1, "embedded")
    assert (status.record.dimensions, status.record.embedding_model) == (16, "emb")
    hybrid = await store.search("how are requests stored on a bus?")
    assert (hybrid.mode, found(hybrid)[0], hybrid.hits[0].scores.text_rank) == ("hybrid", "bus", 1)
    assert Span(start=4, end=7) in hybrid.hits[0].highlights
    by_text = await store.search("大模型", mode="text")
    assert (by_text.mode, found(by_text), by_text.texts) == ("text", ["zh"], ["部署一个大模型"])
    # The vector of the very text, prefix included, is the nearest there is.
    vector = (await client.embed("emb", "passage: Second part")).vectors[0]
    assert found(await store.search(vector=vector, limit=1)) == ["part1"]
    assert (await store.search("Second part", mode="vector")).mode == "vector"
    assert (
        found(await store.search("start the guide", filter={"type": "eq", "key": "$file_id", "value": "guide.md"}))[0]
        == "part0"
    )

    years = await store.find(filter={"type": "gt", "key": "year", "value": 0}, sort="-year")
    assert [chunk.id for chunk in years] == ["zh", "bus"]
    assert [chunk.id for chunk in await store.get(["zh", "nothing", "bus"])] == ["zh", "bus"]
    assert len((await store.get("zh", vectors=True))[0].vector) == 64
    assert [chunk.id async for chunk in store.chunks()] == sorted(
        ["bus", "part0", "part1", "zh", named], key=str.encode
    )

    assert await store.delete(named) == 1
    assert await store.delete(file_id="guide.md") == 2
    assert await store.delete(filter={"type": "eq", "key": "lang", "value": "zh"}) == 1
    changed = await store.update(metadata={"a": "b"}, fusion=Fusion(kind="rrf"))
    assert (changed.chunks, changed.record.metadata, changed.record.fusion.kind) == (1, {"a": "b"}, "rrf")
    with pytest.raises(Conflict):
        await store.create(must_be_new=True)

    other = store.namespace("ada")
    await other.upsert(Chunk(id="mine", text="my own bus"))
    assert found(await other.search("bus")) == ["mine"]
    assert set(found(await store.search("bus", also=[other.name]))) == {"bus", "mine"}
    assert await store.drop() == 1 and await store.drop() == 0
    # It is made again with the first write.
    await store.upsert({"id": "again", "text": "again"})
    assert [status.record.name for status in await list_stores(client)] == ["notes", "notes:ada"]


@together
async def test_what_does_not_fit_is_refused_with_what_to_do(client: modelbus.Client) -> None:
    store = modelbus.AsyncStore("typed", client=client, schema={"year": "number"}, embedding_model="emb")
    await store.create()

    with pytest.raises(InvalidRequest, match="is a string; the schema .* says number"):
        await store.upsert({"text": "x", "attributes": {"year": "2020"}})
    with pytest.raises(InvalidRequest, match="'emb', not with 'other'.*build the store anew"):
        await modelbus.AsyncStore("typed", client=client, embedding_model="other").upsert({"text": "x"})
    with pytest.raises(InvalidRequest, match="a chunk has no field lang: .*belongs into attributes"):
        await store.upsert({"text": "x", "lang": "en"})
    with pytest.raises(ModelNotFound, match="'nowhere': `modelbus storage start`"):
        await modelbus.AsyncStore("x", client=client, service="nowhere").status()
    with pytest.raises(ModelNotFound, match="missing"):
        await modelbus.AsyncStore("y", client=client, embedding_model="missing").upsert({"text": "x"})
    with pytest.raises(InvalidRequest, match="no embedding model"):
        await modelbus.AsyncStore("z", client=client).upsert({"id": "1", "text": "x"})
        await modelbus.AsyncStore("z", client=client).search("x", mode="vector")
    with pytest.raises(InvalidRequest, match="with no embedding model, not with 'emb'.*build the store anew"):
        await modelbus.AsyncStore("z", client=client, embedding_model="emb").upsert({"text": "x"})
    with pytest.raises(InvalidRequest, match="the query is no Unicode text"):
        await store.search("\ud800")
    wrong: list[tuple[Callable[[], Coroutine[Any, Any, Any]], str]] = [
        (lambda: store.upsert("a text"), "a chunk is a Chunk or a mapping"),  # type: ignore[arg-type]
        (lambda: store.upsert({"text": "x", "attributes": {"year": 2**70}}), "cannot be sent"),
        (lambda: store.search(5), "the query is a text, not '5'"),  # type: ignore[arg-type]
        (lambda: store.search("x", mode="magic"), "mode is hybrid, text, vector"),  # type: ignore[arg-type]
        (lambda: store.find(limit="3"), "limit: expected `int`, got `str`"),  # type: ignore[arg-type]
        (lambda: store.find(offset=-1), "offset must not be negative"),
        (lambda: modelbus.AsyncStore("s", client=client, schema={"year": "date"}).create(), "schema.*'date'"),  # type: ignore[dict-item]
    ]
    for ask, words in wrong:
        with pytest.raises(InvalidRequest, match=words):
            await ask()
    with pytest.raises(InvalidRequest, match="a namespace has a name"):
        store.namespace("")
    with pytest.raises(InvalidRequest, match="no search service"):
        await modelbus.AsyncStore("x", client=client, service="emb").status()


@together
async def test_a_rerank_model_orders_the_hits_within_its_time(client: modelbus.Client) -> None:
    store = modelbus.AsyncStore("s", client=client)
    await store.upsert({"id": str(n), "text": "word " * (n + 1) + "x" * n} for n in range(30))
    plain = await store.search("word", limit=5)

    expected = await client.rerank("rerank", "word", (await store.search("word", limit=20)).texts)
    reranked = await store.search("word", limit=5, rerank="rerank", rerank_window=20)
    await store.upsert({"id": "stuck", "text": "word stuck " + "x" * 300})
    late = await store.search("word", limit=5, rerank="rerank", rerank_timeout_s=0.3)

    assert reranked.reranked and reranked.texts == [document.text for document in expected.documents[:5]]
    assert [hit.score for hit in reranked.hits] == [hit.scores.rerank for hit in reranked.hits]
    assert (late.reranked, found(late)) == (False, found(plain))
    assert "'rerank' did not answer within 0.3 s" in late.rerank_error
    with pytest.raises(ModelNotFound):
        await store.search("word", rerank="missing")


async def test_operations_wait_while_the_service_restarts_and_none_is_lost(cluster: Cluster, tmp_path: Path) -> None:
    worker = await start_search(cluster, tmp_path / "stores")
    async with modelbus.connect(cluster.server.url) as client:
        store = modelbus.AsyncStore("s", client=client)
        await store.create()

        async def write(start: int) -> None:
            for n in range(start, start + 25):
                await store.upsert({"id": f"{n:03}", "text": f"word{n} common", "vector": [1, n]})

        writers = [asyncio.create_task(write(start)) for start in range(0, 100, 25)]
        await asyncio.sleep(0.3)
        worker.send_signal(signal.SIGKILL)
        await worker.wait()
        searching = asyncio.create_task(store.search("common", limit=200))
        await asyncio.sleep(0.5)
        assert not searching.done()
        cluster.start_worker(search_deployment(tmp_path / "stores"))

        async with asyncio.timeout(60):
            await asyncio.gather(*writers)
            await searching
        assert found(await store.search("common", limit=200, sort="$id")) == [f"{n:03}" for n in range(100)]
        assert (await store.status()).vectors == 100
        with pytest.raises(DeadlineExceeded):
            await (await _killed(cluster)).wait()
            await modelbus.AsyncStore("s", client=client, timeout_s=1).status()


async def _killed(cluster: Cluster) -> WorkerProcess:
    worker = cluster.workers[-1]
    worker.send_signal(signal.SIGKILL)
    return worker


@together
async def test_a_store_is_copied_to_a_file_and_back(client: modelbus.Client, tmp_path: Path) -> None:
    store = modelbus.AsyncStore("notes", client=client, embedding_model="emb", metadata={"a": "b"})
    await store.upsert(DOCUMENTS + [{"text": f"filler {n}"} for n in range(300)])
    file = tmp_path / "notes.jsonl"

    assert await export_store(client, "notes", file) == 304
    copy = await restore_store(client, file, "copy")
    with pytest.raises(Conflict, match="--replace"):
        await restore_store(client, file)
    await restore_store(client, file, replace=True)

    assert [chunk async for chunk in copy.chunks(vectors=True)] == [chunk async for chunk in store.chunks(vectors=True)]
    assert ((await copy.status()).record.metadata, (await store.status()).chunks) == ({"a": "b"}, 304)
    lines = file.read_bytes().splitlines(keepends=True)
    file.write_bytes(b"".join(lines[:100]))
    with pytest.raises(InvalidRequest, match="cut off: 99 of its 304"):
        await restore_store(client, file, "short")
    file.write_bytes(lines[0] + lines[1] + b"{nonsense\n")
    with pytest.raises(InvalidRequest, match="line 3"):
        await restore_store(client, file, "broken")
    file.write_text("hello\n")
    with pytest.raises(InvalidRequest, match="no export of a store"):
        await restore_store(client, file, "nothing")


@together
async def test_plain_programs_use_the_same_store(
    client: modelbus.Client, shared: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MODELBUS_ADDRESS", shared.server.url)

    def program() -> None:
        store = modelbus.Store("notes", embedding_model="emb")
        try:
            store.upsert(DOCUMENTS)
            assert found(store.search("requests on the bus", limit=1)) == ["bus"]
            assert [chunk.id for chunk in store.chunks()] == ["bus", "part0", "part1", "zh"]
            assert [chunk.id for chunk in store.find(sort="-$id", limit=1)] == ["zh"]
            assert store.get("zh")[0].attributes == {"lang": "zh", "year": 2024}
            assert store.delete("zh") == 1
            assert store.update(metadata={"x": "y"}).record.metadata == {"x": "y"}
            assert store.namespace("a").create().record.name == "notes:a"
            assert [status.record.name for status in modelbus.stores()] == ["notes", "notes:a"]
            assert (store.status().chunks, store.drop()) == (3, 3)
        finally:
            modelbus.disconnect()

    await asyncio.to_thread(program)


@together
async def test_the_example_of_the_page_runs_as_it_stands_there(client: modelbus.Client, shared: Cluster) -> None:
    (example,) = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), re.DOTALL | re.MULTILINE)

    done = await asyncio.to_thread(
        subprocess.run, [sys.executable, "-W", "error", "-c", example], capture_output=True, text=True, timeout=60,
        env={**os.environ, "MODELBUS_ADDRESS": shared.server.url},
    )  # fmt: skip

    *hits, count = done.stdout.splitlines()
    assert (done.returncode, done.stderr, count) == (0, "", "2")
    assert any("bus: The bus stores requests" in hit for hit in hits) and not any(" zh: " in hit for hit in hits)


def test_chunks_filters_and_orders_are_read_from_plain_python() -> None:
    assert packed([1, 0.5]) == b"\0\0\x80?\0\0\0?" == packed(memoryview(packed([1, 0.5])).tobytes())
    one = chunk_of({"text": "x", "file_id": "f", "vector": [1.0]})
    assert one.id == chunk_of({"text": "x", "file_id": "f", "vector": [1.0]}).id != chunk_of({"text": "y"}).id
    assert filter_of({"type": "not", "filters": [{"type": "in", "key": "a", "value": [1, "b"]}]}) == Filter(
        type="not", filters=[Filter(type="in", key="a", value=[1, "b"])]
    )
    assert sort_of(["-year", "$id"]) == [Sort(key="year", descending=True), Sort(key="$id")]
    assert sort_of("year") == [Sort(key="year")] and sort_of(()) == []
    assert [len(part) for part in batches([Chunk(id=str(n)) for n in range(450)])] == [200, 200, 50]
    assert [len(part) for part in batches([Chunk(id=str(n), text="x" * 1_000_000) for n in range(5)])] == [
        1,
        1,
        1,
        1,
        1,
    ]
    for item, words in (
        ({"text": 3}, "Expected `str`, got `int`"),
        ({"text": "\ud800"}, "no Unicode text"),
        ({"vector": ["a"]}, "a list of numbers"),
        ({"text": "x", "attributes": {"a": None}}, "Expected"),
    ):
        with pytest.raises(InvalidRequest, match=words):
            chunk_of(item)
    with pytest.raises(InvalidRequest, match="filter: Invalid enum value 'like'"):
        filter_of({"type": "like", "key": "a"})
