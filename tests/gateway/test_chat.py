"""Answers through a real bus and a real worker, read with the openai package."""

from __future__ import annotations

import asyncio
import base64
import socket
import struct

import aiohttp
import msgspec
import openai
import psutil
import pytest
from modelbus_broker.registry import Registry
from openai.types.chat import ChatCompletionUserMessageParam

from tests.gateway.conftest import StartGateway
from tests.helpers.cluster import Cluster

CHAT = "/v1/chat/completions"
TEXT = "The capital of France is Paris."
USER: ChatCompletionUserMessageParam = {"role": "user", "content": TEXT}


async def test_a_plain_answer(client: openai.AsyncOpenAI) -> None:
    answer = await client.chat.completions.create(model="echo", messages=[USER])
    assert answer.choices[0].message.content == TEXT
    assert answer.choices[0].finish_reason == "stop"
    assert answer.id.startswith("chatcmpl-")
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (6, 6)


async def test_the_sync_client_streams_too(echo_url: str) -> None:
    def ask() -> tuple[str, str | None]:
        with openai.OpenAI(base_url=f"{echo_url}/v1", api_key="any", max_retries=0) as client:
            plain = client.chat.completions.create(model="echo", messages=[USER])
            stream = client.chat.completions.create(model="echo", messages=[USER], stream=True)
            return "".join(chunk.choices[0].delta.content or "" for chunk in stream), plain.choices[0].message.content

    assert await asyncio.to_thread(ask) == (TEXT, TEXT)


async def test_a_stream_with_usage(cluster: Cluster, start_gateway: StartGateway) -> None:
    await cluster.deploy_echo(interval_ms="5")
    url = await start_gateway()
    async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="any", max_retries=0) as client:
        stream = await client.chat.completions.create(
            model="echo", messages=[USER], stream=True, stream_options={"include_usage": True}
        )
        chunks = [chunk async for chunk in stream]
    *deltas, last = chunks
    texts = [chunk.choices[0].delta.content for chunk in deltas if chunk.choices[0].delta.content]
    assert "".join(texts) == TEXT
    assert len(texts) > 1
    assert deltas[-1].choices[0].finish_reason == "stop"
    assert last.choices == [] and last.usage is not None and last.usage.total_tokens == 12
    assert all(chunk.usage is None for chunk in deltas)


async def test_limits_stops_choices_seed_and_logprobs(client: openai.AsyncOpenAI) -> None:
    cut = await client.chat.completions.create(model="echo", messages=[USER], max_completion_tokens=2)
    assert (cut.choices[0].message.content, cut.choices[0].finish_reason) == ("The capital", "length")
    stopped = await client.chat.completions.create(model="echo", messages=[USER], stop=" France")
    assert (stopped.choices[0].message.content, stopped.choices[0].finish_reason) == ("The capital of", "stop")
    many = await client.chat.completions.create(model="echo", messages=[USER], n=3, seed=1, max_tokens=1)
    assert [choice.index for choice in many.choices] == [0, 1, 2]
    assert all(choice.message.content for choice in many.choices)
    scored = await client.chat.completions.create(model="echo", messages=[USER], logprobs=True, top_logprobs=2)
    logprobs = scored.choices[0].logprobs
    assert logprobs is not None and logprobs.content is not None
    assert "".join(token.token for token in logprobs.content) == TEXT
    assert len(logprobs.content[0].top_logprobs) == 2


async def test_streamed_choices_are_the_plain_ones(client: openai.AsyncOpenAI) -> None:
    plain = await client.chat.completions.create(model="echo", messages=[USER], n=2)
    texts, reasons = {0: "", 1: ""}, {}
    async for chunk in await client.chat.completions.create(model="echo", messages=[USER], n=2, stream=True):
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
            if choice.finish_reason:
                reasons[choice.index] = choice.finish_reason
    assert texts == {choice.index: choice.message.content for choice in plain.choices}
    assert reasons == {0: "stop", 1: "stop"}


async def test_what_the_engine_cannot_do_is_a_400_that_names_the_field(client: openai.AsyncOpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        await client.chat.completions.create(model="echo", messages=[USER], logit_bias={"7": 1})
    assert caught.value.param == "logit_bias"
    assert caught.value.code == "unsupported_field"


async def test_completions_plain_and_streamed(client: openai.AsyncOpenAI) -> None:
    plain = await client.completions.create(model="echo", prompt=["one two", "three"], logprobs=1)
    assert [choice.text for choice in plain.choices] == ["one two", "three"]
    logprobs = plain.choices[0].logprobs
    assert logprobs is not None and logprobs.text_offset == [0, 3]
    stream = await client.completions.create(model="echo", prompt="one two three", stream=True)
    assert "".join([choice.text async for chunk in stream for choice in chunk.choices]) == "one two three"


async def test_embeddings_as_numbers_and_as_base64(
    client: openai.AsyncOpenAI, echo_url: str, http: aiohttp.ClientSession
) -> None:
    asked = {"model": "echo", "input": ["one", "two"], "encoding_format": "base64"}
    async with http.post(f"{echo_url}/v1/embeddings", json=asked) as response:
        encoded = (await response.json())["data"]
    # The package asks for base64 by itself.
    ours = await client.embeddings.create(model="echo", input=["one", "two"])
    numbers = await client.embeddings.create(model="echo", input=["one", "two"], encoding_format="float")
    assert [item.index for item in numbers.data] == [0, 1]
    assert ours.data[0].embedding == pytest.approx(numbers.data[0].embedding)
    raw = base64.b64decode(encoded[1]["embedding"])
    assert list(struct.unpack(f"<{len(raw) // 4}f", raw)) == pytest.approx(numbers.data[1].embedding)
    assert ours.usage.prompt_tokens > 0


async def test_a_large_batch_of_embeddings_arrives_whole(client: openai.AsyncOpenAI) -> None:
    answer = await client.embeddings.create(
        model="echo", input=[f"text {number}" for number in range(1000)], encoding_format="float"
    )
    assert [item.index for item in answer.data] == list(range(1000))


async def test_other_names_and_roles(
    cluster: Cluster, start_gateway: StartGateway, http: aiohttp.ClientSession
) -> None:
    await cluster.deploy_echo()
    url = await start_gateway(served_model_names={"gpt-4": "echo", "default": ""}, response_role="bot")
    for name in ("gpt-4", "default"):
        async with http.post(url + CHAT, json={"model": name, "messages": [USER]}) as response:
            body = await response.json()
        assert body["model"] == name
        assert body["choices"][0]["message"] == {"role": "bot", "content": TEXT, "refusal": None}


async def test_an_error_before_the_first_byte_has_its_status(
    cluster: Cluster, start_gateway: StartGateway, http: aiohttp.ClientSession
) -> None:
    await cluster.deploy_echo(fail="always")
    url = await start_gateway(headers_after_s=60.0)
    for stream in (False, True):
        async with http.post(url + CHAT, json={"model": "echo", "messages": [USER], "stream": stream}) as response:
            assert response.status >= 500
            assert (await response.json())["error"]["type"] == "server_error"


async def test_an_error_after_the_first_byte_is_the_last_event_and_done_never_comes(
    cluster: Cluster, start_gateway: StartGateway, http: aiohttp.ClientSession
) -> None:
    await cluster.deploy_echo(fail="always", fail_after="2", interval_ms="5")
    url = await start_gateway()
    async with http.post(url + CHAT, json={"model": "echo", "messages": [USER], "stream": True}) as response:
        assert response.status == 200
        events = (await response.read()).decode().strip().split("\n\n")
    assert msgspec.json.decode(events[-1].removeprefix("data: "))["error"]["type"] == "server_error"
    assert "data: [DONE]" not in events
    assert len(events) > 1
    async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="any", max_retries=0) as client:
        with pytest.raises(openai.APIError):
            async for _ in await client.chat.completions.create(model="echo", messages=[USER], stream=True):
                pass


async def test_silence_is_filled_with_comments_that_clients_ignore(
    cluster: Cluster, start_gateway: StartGateway, http: aiohttp.ClientSession
) -> None:
    await cluster.deploy_echo(delay_ms="1000")
    url = await start_gateway(keep_alive_comment_s=0.2)
    async with http.post(url + CHAT, json={"model": "echo", "messages": [USER], "stream": True}) as response:
        raw = await response.read()
    assert raw.startswith(b": keep-alive\n\n")
    assert raw.endswith(b"data: [DONE]\n\n")
    async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="any", max_retries=0) as client:
        stream = await client.chat.completions.create(model="echo", messages=[USER], stream=True)
        assert "".join([chunk.choices[0].delta.content or "" async for chunk in stream]) == TEXT


@pytest.mark.parametrize("stream", [False, True])
async def test_a_client_that_hangs_up_cancels_its_request(
    cluster: Cluster, start_gateway: StartGateway, http: aiohttp.ClientSession, registry: Registry, stream: bool
) -> None:
    await cluster.deploy_echo(slots="1", tokens="100000", interval_ms="20")
    url = await start_gateway()
    body = {"model": "echo", "messages": [USER], "stream": stream}
    asking = asyncio.create_task(http.post(url + CHAT, json=body).__aenter__())
    if stream:
        response = await asking
        await response.content.readany()
        response.close()
    else:
        await asyncio.sleep(0.5)
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)
    # The only slot is free again: a short request is answered.
    async with http.post(url + CHAT, json={**body, "stream": False, "max_tokens": 1}) as response:
        assert response.status == 200


async def test_stalled_readers_harm_nobody_and_are_cut(cluster: Cluster, start_gateway: StartGateway) -> None:
    await cluster.deploy_echo(tokens="300", interval_ms="25")
    url = await start_gateway(client_stall_s=3.0)
    # 300 tokens of 16 kB each: far more than sockets and the gateway hold for one client.
    body = msgspec.json.encode(
        {"model": "echo", "messages": [{"role": "user", "content": "x" * 16_000}], "stream": True}
    )
    loop = asyncio.get_running_loop()
    memory_before = psutil.Process().memory_info().rss
    stalled = [await _stalled(loop, url, body) for _ in range(50)]
    try:
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="any", max_retries=0, timeout=100) as client:

            async def ask() -> str:
                answer = await client.chat.completions.create(model="echo", messages=[USER], stream=True)
                return "".join([chunk.choices[0].delta.content or "" async for chunk in answer])

            answers = await asyncio.gather(*(ask() for _ in range(50)))
        memory_more = psutil.Process().memory_info().rss - memory_before
        endings = await asyncio.gather(*(_read_to_the_end(loop, reader) for reader in stalled))
    finally:
        for reader in stalled:
            reader.close()

    assert len(set(answers)) == 1 and len(answers[0].split()) == 300
    assert memory_more < 200 * 2**20, f"{memory_more / 2**20:.0f} MiB for 50 answers of 5 MB each"
    assert not any(b"[DONE]" in ending for ending in endings)


async def _stalled(loop: asyncio.AbstractEventLoop, url: str, body: bytes) -> socket.socket:
    """A client that asks and does not read."""
    host, port = url.removeprefix("http://").split(":")
    reader = socket.socket()
    reader.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    reader.setblocking(False)
    await loop.sock_connect(reader, (host, int(port)))
    head = f"POST {CHAT} HTTP/1.1\r\nHost: {host}\r\nContent-Length: {len(body)}\r\n\r\n"
    await loop.sock_sendall(reader, head.encode() + body)
    return reader


async def _read_to_the_end(loop: asyncio.AbstractEventLoop, reader: socket.socket) -> bytes:
    """What a stalled client has got when it wakes up, the last part of it."""
    await asyncio.sleep(6)
    last = b""
    try:
        while data := await loop.sock_recv(reader, 2**20):
            last = (last + data)[-4096:]
    except ConnectionError:
        pass
    return last


async def test_fifty_thousand_words_go_in_and_come_out(client: openai.AsyncOpenAI) -> None:
    text = " ".join(f"w{number}" for number in range(50_000))
    answer = await client.chat.completions.create(model="echo", messages=[{"role": "user", "content": text}])
    assert answer.choices[0].message.content == text
