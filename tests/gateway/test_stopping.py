"""A gateway that is stopped under load."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from typing import Any

import aiohttp
import openai

from tests.helpers.asking import outcomes, settled, whole
from tests.helpers.cluster import Cluster
from tests.helpers.gateways import Start

WORDS = "no one who asks shall notice"
QUESTION: Any = [{"role": "user", "content": WORDS}]
ASKED = {"model": "echo", "messages": QUESTION}


async def test_no_request_of_the_openai_client_fails_when_a_gateway_stops_under_load(
    cluster: Cluster, start: Start
) -> None:
    await cluster.deploy_echo(tokens="20", interval_ms="5")
    gateways = [start("--address", cluster.server.url) for _ in range(2)]
    for gateway in gateways:
        await gateway.ready()
    clients = [openai.AsyncOpenAI(base_url=f"{g.url}/v1", api_key="none", max_retries=0) for g in gateways]
    answered: Counter[int] = Counter()
    stopping = False

    async def ask(client: openai.AsyncOpenAI, stream: bool) -> str:
        if not stream:
            plain = await client.chat.completions.create(model="echo", messages=QUESTION)
            return plain.choices[0].message.content or ""
        chunks = await client.chat.completions.create(model="echo", messages=QUESTION, stream=True)
        return "".join([chunk.choices[0].delta.content or "" async for chunk in chunks if chunk.choices])

    async def work(number: int) -> None:
        at, turn = 0, number
        while answered[1] < 100:
            turn += 1
            try:
                assert await ask(clients[at], turn % 2 > 0) == whole(WORDS, 20)
            except openai.APIConnectionError as error:
                # It no longer listens: what it had taken it has answered.
                assert stopping and at == 0 and type(error.__cause__).__name__ == "ConnectError", repr(error.__cause__)
                at = 1
            else:
                answered[at] += 1

    async with asyncio.timeout(120), asyncio.TaskGroup() as group:
        for number in range(16):
            group.create_task(work(number))
        while answered[0] < 100:
            await asyncio.sleep(0.02)
        stopping = True
        gateways[0].process.terminate()
    status, said = await gateways[0].ended()
    assert status == 0, said
    for client in clients:
        await client.close()
    await settled(cluster.bus, "echo")
    assert (await outcomes(cluster.bus)) == {"done": answered.total()}


async def test_what_outlives_the_grace_ends_with_a_clear_error(
    cluster: Cluster, start: Start, http: aiohttp.ClientSession
) -> None:
    await cluster.deploy_echo(tokens="100000", interval_ms="20")
    gateway = start("--address", cluster.server.url, "--shutdown-grace", "1")
    await gateway.ready()
    url = f"{gateway.url}/v1/chat/completions"
    plain = asyncio.create_task(http.post(url, json=ASKED).__aenter__())
    async with http.post(url, json=ASKED | {"stream": True}) as stream:
        assert stream.status == 200
        await stream.content.readline()
        gateway.process.terminate()
        events = [line async for line in stream.content if line.startswith(b"data: ")]
    last = json.loads(events[-1].removeprefix(b"data: "))
    assert last["error"]["code"] == "gateway_stopping"
    async with await plain as response:
        assert response.status == 503
        assert (await response.json())["error"]["code"] == "gateway_stopping"
    assert (await gateway.ended())[0] == 0
    await settled(cluster.bus, "echo")


async def test_while_it_stops_it_is_not_ready_and_closes_the_connections_it_answers_on(
    cluster: Cluster, start: Start, http: aiohttp.ClientSession
) -> None:
    await cluster.deploy_echo(tokens="60", interval_ms="50")
    gateway = start("--address", cluster.server.url)
    await gateway.ready()
    async with http.get(f"{gateway.url}/health") as response:  # leaves an open connection
        assert response.headers.get("Connection") != "close"
    connection = aiohttp.ClientSession()
    async with connection, connection.post(f"{gateway.url}/v1/chat/completions", json=ASKED | {"stream": True}) as long:
        await long.content.readline()
        gateway.process.terminate()
        while True:
            async with http.get(f"{gateway.url}/health/ready") as response:
                if response.status == 503:
                    break
        assert response.headers["Connection"] == "close"
        assert b"data: [DONE]" in await long.read()
    assert (await gateway.ended())[0] == 0
