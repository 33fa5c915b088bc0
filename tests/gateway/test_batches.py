"""`/v1/batches` through the official client, over a real bus, with gateways that are killed."""

from __future__ import annotations

import asyncio
import json
import signal
from collections.abc import AsyncIterator
from typing import Any, Literal

import msgspec
import openai
import pytest
from modelbus_broker import names
from modelbus_broker.buckets import Bucket
from modelbus_broker.connection import Bus
from modelbus_broker.messages.files import BatchRecord
from modelbus_broker.topology import depths
from modelbus_gateway.batches.records import BatchRecords, new_batch_id, now_ms
from modelbus_gateway.batches.rows import MOST_ERRORS, MOST_ROWS, Validation, lines_of
from openai.types import Batch as BatchObject
from openai.types.chat import ChatCompletion

from tests.gateway.conftest import StartGateway
from tests.helpers.asking import outcomes
from tests.helpers.cluster import Cluster
from tests.helpers.doc_blocks import DOCS, run_page
from tests.helpers.gateways import Start

CHAT: Literal["/v1/chat/completions"] = "/v1/chat/completions"


def line(custom_id: str, text: str = "hello", *, url: str = CHAT, **body: Any) -> dict[str, Any]:
    asked = {"model": "echo", "messages": [{"role": "user", "content": text}], **body}
    return {"custom_id": custom_id, "method": "POST", "url": url, "body": asked}


def file_of(rows: list[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


async def begin(client: openai.AsyncOpenAI, data: bytes, **fields: Any) -> BatchObject:
    file = await client.files.create(file=("rows.jsonl", data), purpose="batch")
    asked = {"input_file_id": file.id, "endpoint": CHAT, "completion_window": "24h", **fields}
    return await client.batches.create(**asked)


async def over(client: openai.AsyncOpenAI, batch_id: str) -> BatchObject:
    async with asyncio.timeout(90):
        while True:
            batch = await client.batches.retrieve(batch_id)
            if batch.status in ("completed", "failed", "expired", "cancelled"):
                return batch
            await asyncio.sleep(0.1)


async def rows_of(client: openai.AsyncOpenAI, file_id: str | None) -> list[dict[str, Any]]:
    assert file_id is not None
    text = (await client.files.content(file_id)).text
    return [json.loads(row) for row in text.splitlines()]


async def test_the_requests_of_a_file_are_answered_in_another_one(client: openai.AsyncOpenAI) -> None:
    rows = [line(f"row-{n}", f"text {n} 一辆公共汽车") for n in range(20)]
    begun = await begin(client, file_of(rows), metadata={"for": "tests"})
    assert (begun.status, begun.object, begun.endpoint) == ("validating", "batch", CHAT)
    assert begun.expires_at is not None and begun.expires_at - begun.created_at == 24 * 3600

    batch = await over(client, begun.id)

    assert (batch.status, batch.errors, batch.error_file_id) == ("completed", None, None)
    assert batch.request_counts is not None and batch.usage is not None and batch.metadata == {"for": "tests"}
    assert batch.request_counts.model_dump() == {"total": 20, "completed": 20, "failed": 0}
    assert batch.in_progress_at and batch.finalizing_at and batch.completed_at
    answers = await rows_of(client, batch.output_file_id)
    assert [row["custom_id"] for row in answers] == [f"row-{n}" for n in range(20)]
    assert {row["response"]["status_code"] for row in answers} == {200}
    said = [ChatCompletion.model_validate(row["response"]["body"]) for row in answers]
    assert [one.choices[0].message.content for one in said] == [f"text {n} 一辆公共汽车" for n in range(20)]
    assert batch.usage.output_tokens == sum(one.usage.completion_tokens for one in said if one.usage) > 0
    made = await client.files.retrieve(batch.output_file_id or "")
    assert (made.purpose, made.expires_at is not None) == ("batch_output", True)

    other = await over(client, (await begin(client, file_of(rows[:1]))).id)
    assert [found.id async for found in client.batches.list(limit=1)] == [other.id, batch.id]
    with pytest.raises(openai.ConflictError, match="completed"):
        await client.batches.cancel(batch.id)


async def test_what_a_row_is_refused_for_stands_in_the_error_file(client: openai.AsyncOpenAI) -> None:
    rows = [
        line("good"), line("warm", temperature=9), line("unknown", model="nobody"), line("stream", stream=True),
        line("empty", messages=[]),
    ]  # fmt: skip
    batch = await over(client, (await begin(client, file_of(rows))).id)

    assert batch.status == "completed" and batch.request_counts is not None
    assert (batch.request_counts.completed, batch.request_counts.failed) == (1, 4)
    assert [row["custom_id"] for row in await rows_of(client, batch.output_file_id)] == ["good"]
    wrong = {row["custom_id"]: row["response"] for row in await rows_of(client, batch.error_file_id)}
    assert {name: (found["status_code"], found["body"]["error"]["param"]) for name, found in wrong.items()} == {
        "warm": (400, "temperature"), "unknown": (404, "model"), "stream": (400, "stream"), "empty": (400, "messages"),
    }  # fmt: skip


async def test_completions_and_embeddings_come_in_batches_too(client: openai.AsyncOpenAI) -> None:
    texts = [{"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": {"model": "echo", "prompt": "on"}}]
    vectors = [{"custom_id": "b", "method": "POST", "url": "/v1/embeddings", "body": {"model": "echo", "input": "x"}}]

    one = await over(client, (await begin(client, file_of(texts), endpoint="/v1/completions")).id)
    two = await over(client, (await begin(client, file_of(vectors), endpoint="/v1/embeddings")).id)

    (text,) = await rows_of(client, one.output_file_id)
    assert text["response"]["body"]["choices"][0]["text"] == "on"
    (vector,) = await rows_of(client, two.output_file_id)
    assert len(vector["response"]["body"]["data"][0]["embedding"]) > 1


async def test_a_file_that_is_no_list_of_requests_is_told_of_line_by_line(client: openai.AsyncOpenAI) -> None:
    data = b"\n".join([
        json.dumps(line("a")).encode(), b"{", b"[]", json.dumps(line("a")).encode(), b"",
        json.dumps(line("b", url="/v1/embeddings")).encode(), json.dumps({**line("c"), "method": "GET"}).encode(),
    ])  # fmt: skip
    batch = await over(client, (await begin(client, data)).id)

    assert batch.status == "failed" and batch.errors is not None and batch.errors.data is not None
    assert [(error.code, error.line) for error in batch.errors.data] == [
        ("invalid_json_line", 2), ("invalid_request", 3), ("duplicate_custom_id", 4), ("invalid_url", 6),
        ("invalid_method", 7),
    ]  # fmt: skip
    empty = await over(client, (await begin(client, b"\n \n")).id)
    assert empty.errors is not None and empty.errors.data is not None
    assert [error.code for error in empty.errors.data] == ["empty_file"]


async def test_what_cannot_be_begun_is_refused(client: openai.AsyncOpenAI) -> None:
    for wrong, param in (
        ({"endpoint": "/v1/moderations"}, "endpoint"),
        ({"completion_window": "48h"}, "completion_window"),
        ({"metadata": {"x": "y" * 600}}, "metadata"),
        ({"output_expires_after": {"anchor": "created_at", "seconds": 60}}, "output_expires_after.seconds"),
    ):
        with pytest.raises(openai.BadRequestError) as refused:
            await begin(client, file_of([line("a")]), **wrong)
        assert refused.value.param == param
    with pytest.raises(openai.NotFoundError, match="file-nothing"):
        await client.batches.create(input_file_id="file-nothing", endpoint=CHAT, completion_window="24h")
    file = await client.files.create(file=("a.txt", b"x"), purpose="assistants")
    with pytest.raises(openai.BadRequestError, match="purpose"):
        await client.batches.create(input_file_id=file.id, endpoint=CHAT, completion_window="24h")
    for call in (client.batches.retrieve, client.batches.cancel):
        with pytest.raises(openai.NotFoundError, match="batch_nothing"):
            await call("batch_nothing")


async def test_a_cancelled_batch_keeps_what_has_been_answered(
    cluster: Cluster, bus: Bus, start_gateway: StartGateway
) -> None:
    await cluster.deploy_echo("echo")
    await cluster.deploy_echo("slow", interval_ms="1000", tokens="1000")
    url = await start_gateway()
    rows = [line("quick"), *(line(f"slow-{n}", model="slow") for n in range(300))]
    async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="any", max_retries=0) as client:
        begun = await begin(client, file_of(rows))
        async with asyncio.timeout(60):
            while (counts := (await client.batches.retrieve(begun.id)).request_counts) is None or not counts.completed:
                await asyncio.sleep(0.1)
        assert (await client.batches.cancel(begun.id)).status == "cancelling"
        batch = await over(client, begun.id)

        assert batch.status == "cancelled" and batch.cancelling_at and batch.cancelled_at
        assert batch.request_counts is not None
        assert batch.request_counts.model_dump() == {"total": 301, "completed": 1, "failed": 300}
        assert [row["custom_id"] for row in await rows_of(client, batch.output_file_id)] == ["quick"]
        left = await rows_of(client, batch.error_file_id)
        assert {row["error"]["code"] for row in left} == {"batch_cancelled"} and len(left) == 300
    async with asyncio.timeout(30):
        while sum((await depths(bus)).values()):
            await asyncio.sleep(0.1)


async def test_a_batch_whose_time_is_up_says_so(client: openai.AsyncOpenAI, cluster: Cluster, bus: Bus) -> None:
    await cluster.deploy_echo("slow", interval_ms="1000", tokens="1000")
    rows = [line("quick"), line("slow", model="slow")]
    file = await client.files.create(file=("rows.jsonl", file_of(rows)), purpose="batch")
    now = now_ms()
    record = BatchRecord(
        id=new_batch_id(), endpoint=CHAT, input_file=file.id, created_ms=now, expires_ms=now + 3000, output_lives_s=3600
    )
    await BatchRecords(bus).create(record)

    batch = await over(client, record.id)

    assert batch.status == "expired" and batch.expired_at
    assert [row["custom_id"] for row in await rows_of(client, batch.output_file_id)] == ["quick"]
    assert [row["error"]["code"] for row in await rows_of(client, batch.error_file_id)] == ["batch_expired"]


async def test_a_batch_outlives_its_gateways_and_asks_nothing_twice(cluster: Cluster, bus: Bus, start: Start) -> None:
    await cluster.deploy_echo("echo", interval_ms="100", tokens="10")
    gateways = [start("--address", bus.settings.url) for _ in range(2)]
    for gateway in gateways:
        await gateway.ready()
    rows = [line(f"row-{n}", f"text {n}") for n in range(800)]
    async with openai.AsyncOpenAI(base_url=f"{gateways[0].url}/v1", api_key="any", max_retries=0) as client:
        begun = await begin(client, file_of(rows))
        async with asyncio.timeout(60):
            while (counts := (await client.batches.retrieve(begun.id)).request_counts) is None or not counts.completed:
                await asyncio.sleep(0.05)
    claim = await Bucket(bus, names.BUCKET_FILES).get(f"claim.{begun.id}")
    assert claim is not None
    (first,) = [gateway for gateway in gateways if claim.value.endswith(f":{gateway.process.pid}".encode())]
    first.process.send_signal(signal.SIGKILL)
    (left,) = [gateway for gateway in gateways if gateway is not first]
    async with openai.AsyncOpenAI(base_url=f"{left.url}/v1", api_key="any", max_retries=0) as client:
        batch = await over(client, begun.id)
        answers = await rows_of(client, batch.output_file_id)
        files = [file.id async for file in client.files.list() if file.purpose == "batch_output"]

    assert batch.status == "completed" and batch.request_counts is not None
    assert batch.request_counts.model_dump() == {"total": 800, "completed": 800, "failed": 0}
    assert [row["custom_id"] for row in answers] == [f"row-{n}" for n in range(800)]
    assert files == [batch.output_file_id], "one gateway has written it"
    async with asyncio.timeout(30):
        while (runs := await outcomes(bus)).total() < 800:
            await asyncio.sleep(0.5)
    assert runs == {"done": 800}, "each row was run once"


async def test_files_of_a_gateway_that_died_before_the_end_are_taken_away(
    cluster: Cluster, bus: Bus, client: openai.AsyncOpenAI
) -> None:
    await cluster.deploy_echo("echo", delay_ms="1500")
    lost = await client.files.create(file=("lost.jsonl", b"{}\n"), purpose="user_data")
    begun = await begin(client, file_of([line("a", "text")]))
    # As a gateway leaves it that is killed between the end of its output and that of the batch.
    await BatchRecords(bus).change(
        begun.id, lambda it: msgspec.structs.replace(it, written=[lost.id, "file-never-ended"])
    )
    batch = await over(client, begun.id)
    assert batch.status == "completed"
    async with asyncio.timeout(30):
        while lost.id in {file.id async for file in client.files.list()}:
            await asyncio.sleep(0.05)
    assert [row["custom_id"] for row in await rows_of(client, batch.output_file_id)] == ["a"]


async def test_the_page_is_right(cluster: Cluster, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    await cluster.deploy_echo("chat")
    monkeypatch.setenv("OPENAI_BASE_URL", f"{url}/v1")
    monkeypatch.setenv("OPENAI_API_KEY", "any")
    values = await asyncio.to_thread(run_page, DOCS / "batches.md")
    assert values["batch"].status == "completed"


@pytest.mark.parametrize("size", [1, 2, 3, 7, 100])
async def test_lines_are_the_same_however_the_file_is_cut(size: int) -> None:
    data = b"one\n\n two \r\nthree"

    async def pieces() -> AsyncIterator[bytes]:
        for at in range(0, len(data), size):
            yield data[at : at + size]

    assert [found async for found in lines_of(pieces())] == [(1, b"one"), (3, b" two \r"), (4, b"three")]


def test_a_file_has_at_most_so_many_requests_and_is_told_so_many_errors() -> None:
    validation = Validation(CHAT)
    for number in range(1, MOST_ROWS + 2):
        validation.take(number, file_of([line(str(number))]))
    assert [(error.code, error.line) for error in validation.errors] == [("too_many_requests", MOST_ROWS + 1)]

    validation = Validation(CHAT)
    for number in range(1, 1000):
        validation.take(number, b"no")
    validation.end()
    assert len(validation.errors) == MOST_ERRORS and validation.total == 999
