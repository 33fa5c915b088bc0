"""`/v1/vector_stores` through the official client: a real bus, a real search worker, real gateways."""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import msgspec
import openai
import pytest
import pytest_asyncio
from modelbus.search.store import AsyncStore
from modelbus_broker import names
from modelbus_broker.errors import NotFound
from modelbus_broker.messages import Deployment, Storage, decode_request
from modelbus_broker.messages.files import IndexFile
from modelbus_broker.messages.search import CreateStore
from modelbus_broker.reading import read_stream
from modelbus_gateway.gateway import GATEWAY, Gateway
from modelbus_gateway.server import listening
from modelbus_gateway.settings import GatewaySettings
from modelbus_gateway.vector_stores.records import VectorStoreRecords, now_ms
from modelbus_gateway.vector_stores.types import AttachRequest
from modelbus_gateway.vector_stores.upkeep import once

from tests.helpers.cluster import Cluster, echo_deployment
from tests.helpers.command_line import free_port
from tests.helpers.doc_blocks import DOCS, run_page
from tests.helpers.gateways import Start
from tests.helpers.search_cluster import search_cluster

together = pytest.mark.asyncio(loop_scope="module")

GUIDE = "# Bicycles\n\n## Brakes\n\nThe brake of the bicycle is green.\n\n## Bell\n\nThe bell is loud.\n"


class Stand:
    def __init__(self, cluster: Cluster, client: openai.AsyncOpenAI, gateway: Gateway) -> None:
        self.cluster, self.client, self.gateway = cluster, client, gateway

    async def file(self, name: str, text: str, purpose: Any = "assistants") -> str:
        return (await self.client.files.create(file=(name, text.encode()), purpose=purpose)).id

    async def raw(self, path: str, body: dict[str, Any]) -> Any:
        return await self.client.post(path, body=body, cast_to=object)

    async def search(self, store: str, query: str | list[str], **more: Any) -> list[dict[str, Any]]:
        found = await self.raw(f"/vector_stores/{store}/search", {"query": query, **more})
        return list(found["data"])


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def stand(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Stand]:
    async with search_cluster(tmp_path_factory.mktemp("vectors")) as cluster:
        wish = Deployment(
            name="chat", model="chat", engine="scripted", revision="1", engine_params={"text": "green brake"}
        )
        await cluster.declare(wish)
        cluster.start_worker(wish)
        await cluster.wait_ready("chat", 1)
        settings = GatewaySettings(bus=cluster.settings, port=free_port(), shutdown_grace_s=2.0, embedding_model="emb")
        async with (
            listening(settings) as app,
            openai.AsyncOpenAI(base_url=f"{settings.address}/v1", api_key="any", max_retries=0) as client,
        ):
            yield Stand(cluster, client, app[GATEWAY])


@together
async def test_files_are_put_in_searched_changed_and_taken_out(stand: Stand) -> None:
    stores = stand.client.vector_stores
    made = await stores.create(
        name="Guides", metadata={"of": "ada"}, expires_after={"anchor": "last_active_at", "days": 7}
    )
    assert (made.name, made.status, made.metadata, made.object) == (
        "Guides",
        "completed",
        {"of": "ada"},
        "vector_store",
    )
    assert made.expires_at == (made.last_active_at or 0) + 7 * 86400
    guide = await stand.file("guide.md", GUIDE)
    file = await stores.files.create_and_poll(
        guide, vector_store_id=made.id, attributes={"lang": "en", "year": 2024}, poll_interval_ms=50
    )
    assert (file.status, file.last_error, file.attributes) == ("completed", None, {"lang": "en", "year": 2024})
    assert file.usage_bytes >= len(GUIDE) - 10
    uploaded = await stores.files.upload_and_poll(
        vector_store_id=made.id, file=("zh.txt", "部署一个大模型".encode()), poll_interval_ms=50,
        chunking_strategy={"type": "static", "static": {"max_chunk_size_tokens": 100, "chunk_overlap_tokens": 20}},
    )  # fmt: skip
    assert uploaded.status == "completed"
    assert uploaded.chunking_strategy and uploaded.chunking_strategy.type == "static"

    page = await stores.search(made.id, query="Which colour is the brake?", max_num_results=1)
    (hit,) = page.data
    assert (hit.file_id, hit.filename, hit.attributes) == (guide, "guide.md", {"lang": "en", "year": 2024})
    assert "brake" in hit.content[0].text and 0 <= hit.score <= 1
    (found,) = await stand.search(made.id, "brake", max_num_results=1, mode="text")
    text = found["content"][0]["text"]
    assert "brake" in {text[span["start"] : span["end"]] for span in found["highlights"]}
    place = found["chunk"]
    assert GUIDE[place["start"] : place["end"]] == text and place["heading"].startswith("Bicycles")
    assert found["scores"]["text"] and found["scores"]["vector"] is None
    # Several queries; the weights of reciprocal ranks; a rerank model; a query that a model writes anew.
    assert {hit["file_id"] for hit in await stand.search(made.id, ["brake", "大模型"], mode="text")} == {
        guide, uploaded.id
    }  # fmt: skip
    weighted = {"ranking_options": {"hybrid_search": {"embedding_weight": 0, "text_weight": 1}, "score_threshold": 0.9}}
    assert [(hit["file_id"], round(hit["score"], 6)) for hit in await stand.search(made.id, "brake", **weighted)] == [
        (guide, 1.0)
    ]
    reranked = await stand.search(made.id, "brake", rerank="rerank")
    assert all(hit["scores"]["rerank"] is not None for hit in reranked)
    rewritten = await stand.raw(
        f"/vector_stores/{made.id}/search",
        {"query": "?", "rewrite_query": True, "rewrite_model": "chat", "mode": "text"},
    )
    assert (rewritten["search_query"], rewritten["data"][0]["file_id"]) == (["green brake"], guide)
    year = {"type": "and", "filters": [{"type": "gte", "key": "year", "value": 2020}]}
    assert {hit["file_id"] for hit in await stand.search(made.id, "大模型 brake", filters=year)} == {guide}

    await stores.files.update(guide, vector_store_id=made.id, attributes={"lang": "fr"})
    assert await stand.search(made.id, "brake", filters=year) == []
    french = await stand.search(made.id, "brake", filters={"type": "eq", "key": "lang", "value": "fr"})
    assert french[0]["attributes"] == {"lang": "fr"}
    content = [part.text or "" async for part in await stores.files.content(guide, vector_store_id=made.id)]
    assert "".join("".join(content).split()) == "".join(GUIDE.split())

    got = await stores.update(made.id, name="New", expires_after=None, metadata={"a": "b"})
    assert (got.name, got.expires_at, got.metadata) == ("New", None, {"a": "b"})
    assert (got.file_counts.completed, got.file_counts.total, got.status) == (2, 2, "completed")
    listed = [one.id async for one in stores.files.list(made.id, limit=1, order="asc", filter="completed")]
    assert listed == [guide, uploaded.id]
    assert [one.id async for one in stores.list()][0] == made.id

    assert (await stores.files.delete(uploaded.id, vector_store_id=made.id)).deleted
    assert (await stand.client.files.retrieve(uploaded.id)).id == uploaded.id  # the file stays
    assert [hit["file_id"] for hit in await stand.search(made.id, "大模型", mode="text")] == []
    await stand.client.files.delete(guide)  # a file that is gone is in no store
    assert (await stores.retrieve(made.id)).file_counts.total == 0
    assert await stand.search(made.id, "brake") == []

    chunks = f"/vector_stores/{made.id}/chunks"
    written = await stand.raw(chunks, {"chunks": [{"id": "mine", "text": "a saddle", "attributes": {"n": 1}}]})
    assert written["ids"] == ["mine"]
    assert [hit["chunk_id"] for hit in await stand.search(made.id, "saddle")] == ["mine"]
    gone = {"filters": {"type": "eq", "key": "n", "value": 1}}
    assert (await stand.raw(f"{chunks}/delete", gone))["deleted"] == 1

    assert (await stores.delete(made.id)).deleted
    with pytest.raises(openai.NotFoundError):
        await stores.retrieve(made.id)


@together
async def test_batches_say_what_became_of_each_file_and_can_be_cancelled(stand: Stand) -> None:
    stores = stand.client.vector_stores
    good, bad = await stand.file("good.txt", "A good text"), await stand.file("bad.pdf", "no PDF")
    empty = await stand.file("empty.md", "")
    made = await stores.create(file_ids=[good])
    batch = await stores.file_batches.create_and_poll(made.id, file_ids=[good, bad, empty], poll_interval_ms=50)
    assert (batch.status, batch.file_counts.completed, batch.file_counts.failed) == ("completed", 1, 2)
    failed = [file async for file in stores.file_batches.list_files(batch.id, vector_store_id=made.id, filter="failed")]
    assert {file.id for file in failed} == {bad, empty}
    assert all(file.last_error and file.last_error.code == "invalid_file" for file in failed)

    # Nobody embeds with this model yet, so the files wait; cancelled, they stay out.
    slow = echo_deployment("slow", dimensions="8")
    await stand.cluster.declare(slow)
    while not stand.gateway.registry.deployments_of("slow"):
        await asyncio.sleep(0.02)
    waiting = await stores.create(extra_body={"embedding_model": "slow"})
    other = await stores.file_batches.create(
        waiting.id, files=[{"file_id": good, "attributes": {"n": 1}}], extra_body={}
    )
    assert (other.status, other.file_counts.in_progress) == ("in_progress", 1)
    cancelled = await stores.file_batches.cancel(other.id, vector_store_id=waiting.id)
    assert (cancelled.status, cancelled.file_counts.cancelled) == ("cancelled", 1)
    stand.cluster.start_worker(slow)
    await stand.cluster.wait_ready("slow", 1)
    async with asyncio.timeout(30):
        while await tasks(stand.cluster):
            await asyncio.sleep(0.05)
    assert (await stores.files.retrieve(good, vector_store_id=waiting.id)).status == "cancelled"
    assert await stand.search(waiting.id, "good", mode="text") == []


@together
async def test_what_cannot_be_meant_is_refused_by_name(stand: Stand) -> None:
    stores = stand.client.vector_stores
    made = await stores.create(name="strict", extra_body={"embedding_model": ""})
    picture = await stand.file("p.png", "x", purpose="vision")
    text = await stand.file("t.txt", "text")

    async def refused(
        call: Any, kind: type[openai.APIStatusError], param: str | None, words: str | None = None
    ) -> None:
        with pytest.raises(kind, match=words) as error:
            await call
        assert error.value.param == param

    bad, missing = openai.BadRequestError, openai.NotFoundError
    await refused(stores.retrieve("vs_none"), missing, "vector_store_id")
    await refused(stores.retrieve("vs.*"), missing, "vector_store_id")
    await refused(stores.files.create("vs_none", file_id=text), missing, "vector_store_id")
    await refused(stores.files.create(made.id, file_id="file-none"), missing, "file_id")
    await refused(stores.files.retrieve("file-none", vector_store_id=made.id), missing, "file_id")
    await refused(stores.file_batches.retrieve("vsfb_none", vector_store_id=made.id), missing, "batch_id")
    await refused(stores.files.create(made.id, file_id=picture), bad, "file_id", "assistants")
    await refused(stores.create(extra_body={"embedding_model": "nobody"}), bad, "embedding_model")
    await refused(stores.files.create(made.id, file_id=text, attributes={"mb:x": 1}), bad, "attributes")
    odd: list[dict[str, Any]] = [{"n": 2**70}, {"n": 2**53 + 1}, {"a.b": 1}, {" a": 1}, {"a": "\0"}]
    for attributes in odd:
        await refused(stores.files.create(made.id, file_id=text, attributes=attributes), bad, "attributes")
    for wrong, param in (
        (None, "chunks[1].attributes.a"),
        ([1], "chunks[1].attributes.a"),
        ("\0", "chunks[1].attributes"),
    ):
        chunks = [{"text": "x", "attributes": {"a": 1}}, {"text": "x", "attributes": {"b": 1, "a": wrong}}]
        await refused(stand.raw(f"/vector_stores/{made.id}/chunks", {"chunks": chunks}), bad, param)
    await refused(stores.create(metadata={str(n): "" for n in range(17)}), bad, "metadata")
    await refused(stores.create(expires_after={"anchor": "last_active_at", "days": 0}), bad, "expires_after.days")
    await refused(
        stores.files.create(
            made.id, file_id=text,
            chunking_strategy={"type": "static", "static": {"max_chunk_size_tokens": 100, "chunk_overlap_tokens": 51}},
        ), bad, "chunking_strategy.static.chunk_overlap_tokens",
    )  # fmt: skip
    await refused(stores.file_batches.create(made.id, file_ids=[text], files=[{"file_id": text}]), bad, "file_ids")
    for body, param in (
        ({"query": ""}, "query"),
        ({"query": "x", "max_num_results": 51}, "max_num_results"),
        ({"query": "x", "filters": {"type": "eq", "key": "k"}}, "filters"),
        ({"query": "x", "filters": {"type": "like", "key": "k", "value": 1}}, "filters.type"),
        ({"query": "x", "ranking_options": {"score_threshold": 2}}, "ranking_options.score_threshold"),
        ({"query": "x", "rewrite_query": True}, "rewrite_query"),
        ({"query": "x", "mode": "vector"}, "mode"),
    ):
        await refused(stand.raw(f"/vector_stores/{made.id}/search", body), bad, param)
    # Expired: it says so, and its chunks go.
    await stand.raw(f"/vector_stores/{made.id}/chunks", {"chunks": [{"text": "old"}]})
    long_ago = now_ms() - 2 * 86_400_000
    records = stand.gateway.vector_stores.records
    await records.change_store(made.id, lambda it: msgspec.structs.replace(it, expires_days=1, active_ms=long_ago))
    assert (await stores.retrieve(made.id)).status == "expired"
    await refused(stores.search(made.id, query="old"), bad, "vector_store_id", "expired")
    # A record whose task was never queued is found.
    kept, deadly = await stores.create(), await stores.create()
    (prepared,) = await stand.gateway.vector_stores.prepare([AttachRequest(file_id=text)])
    await records.put_file(msgspec.structs.replace(prepared, store=kept.id, created_ms=1))
    # One that has ended five gateways is not tried again.
    await records.put_file(msgspec.structs.replace(prepared, store=deadly.id))
    await records.enqueue_task(IndexFile(store=deadly.id, file=text, revision=prepared.revision, begun=5), ".again")
    await once(stand.gateway.vector_stores, stand.gateway.files)
    async with asyncio.timeout(30):
        while (await stores.files.retrieve(text, vector_store_id=kept.id)).status != "completed":
            await asyncio.sleep(0.05)
    async with asyncio.timeout(30):
        while (ended := await stores.files.retrieve(text, vector_store_id=deadly.id)).status == "in_progress":
            await asyncio.sleep(0.05)
    assert ended.last_error and "begun 5 times" in ended.last_error.message
    assert await stand.gateway.vector_stores.chunks(await records.store(made.id)).find() == []


async def test_without_a_search_service_it_says_what_to_start(url: str) -> None:
    async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="any", max_retries=0) as client:
        with pytest.raises(openai.InternalServerError, match="modelbus storage start") as error:
            await client.vector_stores.create()
        assert error.value.status_code == 503


@pytest.mark.timeout(120)
async def test_a_gateway_that_ends_leaves_its_work_to_the_next(tmp_path: Path, start: Start) -> None:
    async with search_cluster(tmp_path) as cluster:
        slow = echo_deployment("slow", dimensions="8")
        await cluster.declare(slow)  # nobody serves it yet: a file that is being indexed waits for its vectors
        # Gateways that are stopped in good order, more of them than a file may end.
        for turn in range(7):
            settings = GatewaySettings(bus=cluster.settings, port=free_port(), embedding_model="slow")
            async with (
                listening(settings),
                openai.AsyncOpenAI(base_url=f"{settings.address}/v1", api_key="any", max_retries=0) as client,
            ):
                if not turn:
                    made = await client.vector_stores.create()
                    file = await client.vector_stores.files.upload(
                        vector_store_id=made.id, file=("a.md", GUIDE.encode())
                    )
                    assert file.status == "in_progress"
                await taken_up(cluster)
        # One that is killed, with the file in its hands and a store that it was about to make.
        arguments = ["--address", cluster.settings.url, "--embedding-model", "slow"]
        first = start(*arguments)
        await first.ready()
        await taken_up(cluster)
        (search,) = [worker for worker in cluster.workers if worker.deployment.name == "storage"]
        search.send_signal(signal.SIGSTOP)
        async with openai.AsyncOpenAI(base_url=f"{first.url}/v1", api_key="any", max_retries=0) as client:
            creating = asyncio.create_task(client.vector_stores.create())
            while not (unmade := await VectorStoreRecords(cluster.bus).announced_stores()):
                await asyncio.sleep(0.02)
            first.process.kill()
            with pytest.raises(openai.APIConnectionError):
                await creating
        search.send_signal(signal.SIGCONT)
        cluster.start_worker(slow)
        settings = GatewaySettings(bus=cluster.settings, port=free_port(), embedding_model="slow")
        async with (
            listening(settings) as app,
            openai.AsyncOpenAI(base_url=f"{settings.address}/v1", api_key="any", max_retries=0) as client,
        ):
            done = await client.vector_stores.files.poll(file.id, vector_store_id=made.id, poll_interval_ms=100)
            assert (done.last_error, done.status, await tasks(cluster)) == (None, "completed", 0)
            assert (await client.vector_stores.search(made.id, query="brake")).data[0].file_id == file.id
            # The search service has made the other store, and nobody knows of it.
            vectors = app[GATEWAY].vector_stores
            ((store_id, service),) = unmade
            orphan = AsyncStore(store_id, client=vectors.client, service=service)
            assert (await orphan.status()).chunks == 0
            assert [store.id async for store in client.vector_stores.list()] == [made.id]
            await vectors.forget_unmade(now_ms() - 900_000)
            assert await vectors.records.announced_stores() == unmade, "it is young: it may be in the making"
            await vectors.forget_unmade(now_ms())
            assert await vectors.records.announced_stores() == []
            with pytest.raises(NotFound):
                await orphan.status()


@together
async def test_the_page_is_right(stand: Stand, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "guide.md").write_text(GUIDE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OPENAI_BASE_URL", str(stand.client.base_url))
    monkeypatch.setenv("OPENAI_API_KEY", "any")
    values = await asyncio.to_thread(run_page, DOCS / "vector-stores.md")
    assert values["found"].data[0].filename == "guide.md"


async def asked_to_make(cluster: Cluster) -> bool:
    """Whether the search service's queue has the request to make a store."""
    subject = names.request_subject("storage", "hi", 0)
    found = [message async for message in read_stream(cluster.bus, names.STREAM_HI, subject)]
    tasks = [decode_request(message.data).task for message in found]
    return any(isinstance(task, Storage) and isinstance(task.operation, CreateStore) for task in tasks)


async def taken_up(cluster: Cluster) -> None:
    """Until a gateway has the file in its hands."""
    async with asyncio.timeout(30):
        while (await indexers(cluster))["num_ack_pending"] == 0:
            await asyncio.sleep(0.02)


async def indexers(cluster: Cluster) -> dict[str, Any]:
    return await cluster.bus.js_request(f"CONSUMER.INFO.{names.STREAM_INDEXING}.{names.INDEXERS}")


async def tasks(cluster: Cluster) -> int:
    """Files that wait to be indexed, or are."""
    end = time.monotonic() + 5
    while True:  # the last acknowledgement may be on its way
        info = await cluster.bus.js_request(f"STREAM.INFO.{names.STREAM_INDEXING}")
        if not info["state"]["messages"] or time.monotonic() > end:
            return int(info["state"]["messages"])
        await asyncio.sleep(0.05)
