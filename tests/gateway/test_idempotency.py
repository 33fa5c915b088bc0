"""Idempotency-Key: the same key gives the same answer, running or finished, and is paid for once."""

from __future__ import annotations

import asyncio
import json
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
import pytest
from modelbus_broker import names
from modelbus_broker.buckets import Bucket
from modelbus_broker.messages import KeyRecord, encode
from modelbus_broker.once import body_hash, record_key
from modelbus_broker.reading import read_batch
from modelbus_broker.storing import remove_message
from modelbus_gateway.translate import CHAT_BODY, translate_chat

from tests.gateway.conftest import StartGateway
from tests.helpers.asking import outcomes, settled, usage_events
from tests.helpers.cluster import Cluster, echo_deployment
from tests.helpers.gateways import GatewayProcess, Start
from tests.helpers.streams import all_events, shown, some_events, text_of

CHAT, COMPLETIONS, EMBEDDINGS = "/v1/chat/completions", "/v1/completions", "/v1/embeddings"
WORDS = "whoever asks this again under the same key pays nothing for it"
ASKED: dict[str, Any] = {"model": "echo", "messages": [{"role": "user", "content": WORDS}]}
STREAM = {**ASKED, "stream": True, "stream_options": {"include_usage": True}}


@asynccontextmanager
async def post(
    http: aiohttp.ClientSession, url: str, key: str, body: dict[str, Any] = ASKED, path: str = CHAT
) -> AsyncIterator[aiohttp.ClientResponse]:
    async with http.post(url + path, json=body, headers={"Idempotency-Key": key}) as response:
        yield response


async def plain(
    http: aiohttp.ClientSession, url: str, key: str, body: dict[str, Any] = ASKED, path: str = CHAT
) -> dict[str, Any]:
    async with post(http, url, key, body, path) as response:
        found: dict[str, Any] = await response.json()
        assert response.status == 200, found
        return found


async def two(cluster: Cluster, start: Start) -> tuple[GatewayProcess, GatewayProcess]:
    gateways = start("--address", cluster.server.url), start("--address", cluster.server.url)
    for gateway in gateways:
        await gateway.ready()
    return gateways


async def runs(cluster: Cluster) -> dict[str, int]:
    await settled(cluster.bus, "echo")
    return dict(await outcomes(cluster.bus))


async def test_many_at_once_through_two_gateways_are_one_run(
    cluster: Cluster, start: Start, http: aiohttp.ClientSession
) -> None:
    await cluster.deploy_echo(interval_ms="40")
    urls = [gateway.url for gateway in await two(cluster, start)]

    async def streamed(url: str) -> str:
        async with post(http, url, "k", STREAM) as response:
            assert response.status == 200
            events = await all_events(response)
        assert events[-1].data == "[DONE]"
        return text_of(events)

    async with asyncio.timeout(100):
        answers = await asyncio.gather(*(plain(http, url, "k") for url in urls * 3))
        texts = await asyncio.gather(*(streamed(url) for url in urls * 2))
    assert answers == answers[:1] * 6
    assert texts == [WORDS] * 4
    assert answers[0]["choices"][0]["message"]["content"] == WORDS
    assert await runs(cluster) == {"done": 1}


async def test_streams_at_once_are_one_run(cluster: Cluster, start: Start, http: aiohttp.ClientSession) -> None:
    await cluster.deploy_echo(interval_ms="40")
    urls = [gateway.url for gateway in await two(cluster, start)]

    async def streamed(url: str) -> list[Any]:
        async with post(http, url, "k", STREAM) as response:
            return [(event.id, event.data) for event in await all_events(response)]

    async with asyncio.timeout(100):
        answers = await asyncio.gather(*(streamed(url) for url in urls * 2))
    assert answers == answers[:1] * 4
    assert await runs(cluster) == {"done": 1}


async def test_a_finished_answer_is_given_again_plain_or_streamed(
    cluster: Cluster, start_gateway: StartGateway, http: aiohttp.ClientSession
) -> None:
    await cluster.deploy_echo()
    url, other = await start_gateway(), await start_gateway()
    for first, second, key in ((ASKED, STREAM, "plain first"), (STREAM, ASKED, "stream first")):
        async with post(http, url, key, first) as response:
            assert "idempotent-replayed" not in response.headers
            request_id = response.headers["x-request-id"]
            await response.read()
        await settled(cluster.bus, "echo")
        (worker,) = cluster.workers
        worker.send_signal(signal.SIGSTOP)  # nobody but the bus is asked
        try:
            async with post(http, other, key, second) as response:
                assert response.headers["x-request-id"] == request_id
                assert response.headers["idempotent-replayed"] == "true"
                if second is STREAM:
                    events = await all_events(response)
                    assert text_of(events) == WORDS
                    assert events[-2].shown["usage"]["total_tokens"] == 24
                else:
                    answer = await response.json()
                    assert answer["choices"][0]["message"]["content"] == WORDS
                    assert answer["usage"]["total_tokens"] == 24
        finally:
            worker.send_signal(signal.SIGCONT)
    assert await runs(cluster) == {"done": 2}


async def test_other_tasks_too_and_answers_larger_than_a_message(
    cluster: Cluster, start_gateway: StartGateway, http: aiohttp.ClientSession
) -> None:
    await cluster.deploy_echo(dimensions="256")
    url, other = await start_gateway(), await start_gateway()
    many = {"model": "echo", "input": [f"text {n}" for n in range(1000)]}  # 1 MB of vectors
    text = {"model": "echo", "prompt": "word " * 200_000}
    for path, body in ((EMBEDDINGS, many), (COMPLETIONS, text)):
        first = await plain(http, url, path, body, path)
        await settled(cluster.bus, "echo")
        assert await plain(http, other, path, body, path) == first
    assert await runs(cluster) == {"done": 2}


async def test_another_body_under_the_same_key_is_a_409(
    cluster: Cluster, start_gateway: StartGateway, http: aiohttp.ClientSession
) -> None:
    await cluster.deploy_echo()
    url = await start_gateway()
    await plain(http, url, "k")
    other = {**ASKED, "messages": [{"role": "user", "content": "something else"}]}
    for body in (other, {**ASKED, "temperature": 0.5}, {**other, "stream": True}):
        async with post(http, url, "k", body) as response:
            error = (await response.json())["error"]
            assert (response.status, error["code"]) == (409, "idempotency_key_reused")
    async with post(http, url, "k" * 256) as response:
        assert (response.status, (await response.json())["error"]["param"]) == (400, "Idempotency-Key")
    await plain(http, url, "another key", other)
    assert await runs(cluster) == {"done": 2}


async def test_a_failed_request_is_asked_anew(
    cluster: Cluster, start_gateway: StartGateway, http: aiohttp.ClientSession
) -> None:
    await cluster.deploy_echo(fail="first:1", fail_code="invalid_request")
    url = await start_gateway(headers_after_s=60.0)
    async with post(http, url, "k") as response:
        assert response.status == 400
    answer = await plain(http, url, "k")
    assert answer["choices"][0]["message"]["content"] == WORDS
    assert await plain(http, url, "k") == answer
    assert await runs(cluster) == {"failed": 1, "done": 1}


async def test_a_request_that_was_not_taken_leaves_its_key_free(
    cluster: Cluster, start_gateway: StartGateway, http: aiohttp.ClientSession
) -> None:
    url = await start_gateway()
    async with post(http, url, "k") as response:
        assert response.status == 404
    await cluster.deploy_echo()
    async with asyncio.timeout(60):
        while (await http.post(url + CHAT, json=ASKED)).status != 200:  # until the gateway has heard of it
            await asyncio.sleep(0.05)
    assert (await plain(http, url, "k"))["choices"][0]["message"]["content"] == WORDS


@pytest.mark.parametrize("stream", [False, True])
async def test_a_client_that_hung_up_finds_its_answer(
    cluster: Cluster, start_gateway: StartGateway, http: aiohttp.ClientSession, stream: bool
) -> None:
    await cluster.deploy_echo(interval_ms="60")
    url, other = await start_gateway(), await start_gateway()
    asking = asyncio.create_task(http.post(url + CHAT, json=STREAM if stream else ASKED, headers={"Idempotency-Key": "k"}).__aenter__())  # fmt: skip
    if stream:
        response = await asking
        await some_events(response, 2)
        response.close()
    else:
        await asyncio.sleep(0.4)
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)
    async with post(http, other, "k", STREAM) as response:
        assert text_of(await all_events(response)) == WORDS
    assert (await plain(http, url, "k"))["choices"][0]["message"]["content"] == WORDS
    assert await runs(cluster) == {"done": 1}


@pytest.mark.parametrize("stream", [False, True])
async def test_a_request_outlives_its_gateway(
    cluster: Cluster, start: Start, http: aiohttp.ClientSession, stream: bool
) -> None:
    await cluster.deploy_echo(interval_ms="100")
    first, second = await two(cluster, start)
    body = STREAM if stream else ASKED
    asking = asyncio.create_task(http.post(first.url + CHAT, json=body, headers={"Idempotency-Key": "k"}).__aenter__())
    await asyncio.sleep(0.6)
    first.process.kill()
    await asyncio.gather(asking, return_exceptions=True)
    async with post(http, second.url, "k", STREAM) as response:
        events = await all_events(response)
    assert text_of(events) == WORDS
    assert await runs(cluster) == {"done": 1}


async def test_a_gateway_that_died_before_it_published_is_stood_in_for(
    cluster: Cluster, start: Start, http: aiohttp.ClientSession
) -> None:
    await cluster.deploy_echo()
    gateways = await two(cluster, start)
    task = translate_chat(CHAT_BODY.read(json.dumps(ASKED).encode())).task
    dead = names.new_request_id(names.new_publisher_id("gateway"))
    record = KeyRecord(id=dead, body=body_hash("echo", task))
    await Bucket(cluster.bus, names.BUCKET_IDEMPOTENCY).create(record_key("", "k"), encode(record))
    async with asyncio.timeout(60):
        answers = await asyncio.gather(*(plain(http, gateway.url, "k") for gateway in gateways * 2))
    assert answers == answers[:1] * 4
    assert answers[0]["id"] == f"chatcmpl-{dead}"
    assert await runs(cluster) == {"done": 1}


async def test_a_message_that_is_gone_and_left_no_answer_is_followed_by_the_next_attempt(
    cluster: Cluster, start: Start, http: aiohttp.ClientSession
) -> None:
    (worker,) = await cluster.deploy_echo()
    first, second = await two(cluster, start)
    worker.send_signal(signal.SIGSTOP)
    asking = asyncio.create_task(plain(http, first.url, "k"))
    async with asyncio.timeout(60):
        while not (found := await read_batch(cluster.bus, names.STREAM_HI, "mb.req.*.hi.*")):
            await asyncio.sleep(0.05)
    (message,) = found
    first.process.kill()
    await asyncio.gather(asking, return_exceptions=True)
    worker.process.kill()
    await remove_message(cluster.bus, names.STREAM_HI, message.seq)
    # The queue knows the first attempt's message id: published once more it is taken for the same one.
    cluster.start_worker(echo_deployment())
    answer = await plain(http, second.url, "k")
    assert answer["choices"][0]["message"]["content"] == WORDS
    assert answer["id"] == f"chatcmpl-{message.message_id.rpartition('.')[0]}"
    assert await plain(http, second.url, "k") == answer
    await settled(cluster.bus, "echo")
    assert [event.run.split(".")[0] for event in await usage_events(cluster.bus)] == ["2"]


async def test_the_kept_answer_is_whole_when_a_second_worker_has_completed_it(
    cluster: Cluster, start: Start, http: aiohttp.ClientSession
) -> None:
    workers = await cluster.deploy_echo(workers=2, interval_ms="80")
    first, second = await two(cluster, start)
    async with post(http, first.url, "k", {**STREAM, "n": 2}) as response:
        got = await some_events(response, 6)
        its_worker = got[-1].id.split(":")[1].rpartition(".")[2]
        next(worker for worker in workers if worker.id == its_worker).process.kill()
        got += await all_events(response)
    assert text_of(got) == text_of(got, 1) == WORDS
    await settled(cluster.bus, "echo")
    async with post(http, second.url, "k", {**STREAM, "n": 2}) as response:
        assert shown(await all_events(response)) == shown(got)
    answer = await plain(http, second.url, "k", {**ASKED, "n": 2})
    assert [choice["message"]["content"] for choice in answer["choices"]] == [WORDS] * 2


async def test_a_running_answer_is_taken_over_when_nobody_else_reads_it_any_more(
    cluster: Cluster, start: Start, http: aiohttp.ClientSession
) -> None:
    workers = await cluster.deploy_echo(workers=2, interval_ms="80")
    first, second = await two(cluster, start)
    async with post(http, first.url, "k", STREAM) as response:
        got = await some_events(response, 3)
        first.process.kill()
        first.process.wait()
    async with post(http, second.url, "k", STREAM) as response:
        got = await some_events(response, 5)
        its_worker = got[-1].id.split(":")[1].rpartition(".")[2]
        next(worker for worker in workers if worker.id == its_worker).process.kill()
        got += await all_events(response)
    assert text_of(got) == WORDS
    assert got[-1].data == "[DONE]"
    await settled(cluster.bus, "echo")
    assert (await plain(http, second.url, "k"))["choices"][0]["message"]["content"] == WORDS
