"""Streams that are read on after their connection broke, through another gateway: nothing missing, nothing twice."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
import pytest
from modelbus_broker.names import new_publisher_id, new_request_id
from modelbus_gateway.event_ids import read_event_id

from tests.gateway.conftest import StartGateway
from tests.helpers.asking import booked, outcomes, settled
from tests.helpers.cluster import Cluster
from tests.helpers.gateways import GatewayProcess, Start
from tests.helpers.streams import Event, all_events, next_event, shown, some_events, text_of

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
WORDS = "the rest of it is here, and not a word of it is lost on the way to you"
#: Two choices whose texts end at different places.
ASKED: dict[str, Any] = {
    "model": "echo", "messages": [{"role": "user", "content": WORDS}], "stream": True,
    "stream_options": {"include_usage": True},
}  # fmt: skip
RESUMABLE = {"X-Modelbus-Resumable": "true"}


@asynccontextmanager
async def asked(
    http: aiohttp.ClientSession,
    gateway: GatewayProcess | str,
    body: dict[str, Any] = ASKED,
    path: str = CHAT,
    /,
    **headers: str,
) -> AsyncIterator[aiohttp.ClientResponse]:
    url = gateway if isinstance(gateway, str) else gateway.url
    async with http.post(url + path, json=body, headers=headers) as response:
        yield response


async def rest(
    http: aiohttp.ClientSession, gateway: GatewayProcess | str, how: str, request_id: str, last: str,
    body: dict[str, Any] = ASKED, path: str = CHAT,
) -> list[Event]:  # fmt: skip
    """What another gateway still has for a client that has seen the event ``last``."""
    url = gateway if isinstance(gateway, str) else gateway.url
    if how == "post":
        opening = http.post(url + path, json=body, headers={"Last-Event-ID": last})
    else:
        opening = http.get(f"{url}{path}/{request_id}/stream", params={"starting_after": last} if last else {})
    async with opening as response:
        assert response.status == 200, await response.text()
        assert response.headers["x-request-id"] == request_id
        return await all_events(response)


async def two(cluster: Cluster, start: Start) -> tuple[GatewayProcess, GatewayProcess]:
    gateways = start("--address", cluster.server.url), start("--address", cluster.server.url)
    for gateway in gateways:
        await gateway.ready()
    return gateways


async def undisturbed(
    http: aiohttp.ClientSession, gateway: GatewayProcess | str, body: dict[str, Any] = ASKED, path: str = CHAT
) -> list[Event]:
    async with asked(http, gateway, body, path) as response:
        return await all_events(response)


def kill(process: Any) -> None:
    process.send_signal(signal.SIGKILL)
    process.wait()


async def test_the_id_is_in_the_headers_before_the_first_output(
    cluster: Cluster, start_gateway: StartGateway, http: aiohttp.ClientSession
) -> None:
    await cluster.deploy_echo(hang_on="rest")
    url = await start_gateway(headers_after_s=0.2)
    for headers in ({}, RESUMABLE):
        async with asyncio.timeout(60), asked(http, url, **headers) as response:
            assert response.status == 200
            assert response.headers["x-request-id"].startswith("g")


async def test_every_event_with_content_has_an_id_that_tells_run_frame_and_positions(
    cluster: Cluster, start: Start, http: aiohttp.ClientSession
) -> None:
    await cluster.deploy_echo(chunk="1")
    gateway, _ = await two(cluster, start)
    *events, end = await undisturbed(http, gateway, {**ASKED, "n": 2})
    assert (end.id, end.data) == ("", "[DONE]")
    ids = [read_event_id(event.id, "id") for event in events]
    assert len({event.id for event in events}) == len(events)
    assert {found.request for found in ids} == {ids[0].request}
    assert [found.positions for found in ids[:4]] == [[1], [1, 1], [2, 1], [2, 2]]
    assert ids[-1].positions == [len(WORDS.split())] * 2


@pytest.mark.parametrize("how", ["post", "get"])
@pytest.mark.parametrize("cut", [0, 1, 2, 7, 20])
async def test_after_its_gateway_was_killed_a_stream_goes_on_elsewhere(
    cluster: Cluster, start: Start, http: aiohttp.ClientSession, cut: int, how: str
) -> None:
    await cluster.deploy_echo(interval_ms="40")
    first, second = await two(cluster, start)
    body = {**ASKED, "n": 2}
    whole = await undisturbed(http, second, body)
    # The client has got more than it remembers: it was cut between two events of what came at once.
    async with asked(http, first, body) as response:
        request_id = response.headers["x-request-id"]
        got = await some_events(response, max(cut, 3))
        kill(first.process)
    if cut == 0 and how == "post":
        return  # without an event there is nothing to send back: a POST would ask anew
    after = await rest(http, second, how, request_id, got[cut - 1].id if cut else "", body)
    assert shown([*got[:cut], *after]) == shown(whole)
    ids = [event.id for event in [*got[:cut], *after] if event.id]
    assert len(ids) == len(set(ids)) == len(whole) - 1
    await settled(cluster.bus, "echo")
    assert await outcomes(cluster.bus) == {"done": 2}


@pytest.mark.parametrize("how", ["post", "get"])
async def test_text_completions_with_logprobs_go_on_too(
    cluster: Cluster, start: Start, http: aiohttp.ClientSession, how: str
) -> None:
    await cluster.deploy_echo(interval_ms="40")
    first, second = await two(cluster, start)
    body = {"model": "echo", "prompt": [WORDS, "a short one"], "stream": True, "logprobs": 1}
    whole = await undisturbed(http, second, body, COMPLETIONS)
    async with asked(http, first, body, COMPLETIONS) as response:
        request_id = response.headers["x-request-id"]
        got = await some_events(response, 9)
        kill(first.process)
    after = await rest(http, second, how, request_id, got[-1].id, body, COMPLETIONS)
    assert shown([*got, *after]) == shown(whole)


async def test_a_client_that_moves_takes_its_stream_along(
    cluster: Cluster, start: Start, http: aiohttp.ClientSession
) -> None:
    await cluster.deploy_echo(interval_ms="40")
    gateways = await two(cluster, start)
    whole = await undisturbed(http, gateways[0])
    async with asked(http, gateways[0], **RESUMABLE) as response:
        request_id = response.headers["x-request-id"]
        got = await some_events(response, 3)
    # To the other one, back to the first, and to the first once more; each time in the middle.
    for number in (1, 0, 0):
        params = {"starting_after": got[-1].id}
        async with http.get(f"{gateways[number].url}{CHAT}/{request_id}/stream", params=params) as response:
            got += await some_events(response, 3)
    got += await rest(http, gateways[1], "get", request_id, got[-1].id)
    assert shown(got) == shown(whole)
    await settled(cluster.bus, "echo")
    assert await outcomes(cluster.bus) == {"done": 2}


async def test_an_old_connection_that_still_lives_hears_that_the_stream_has_moved(
    cluster: Cluster, start: Start, http: aiohttp.ClientSession
) -> None:
    await cluster.deploy_echo(interval_ms="60")
    first, second = await two(cluster, start)
    whole = await undisturbed(http, second)
    async with asked(http, first) as response:
        request_id = response.headers["x-request-id"]
        got = await some_events(response, 3)
        after = await rest(http, second, "get", request_id, got[-1].id)
        old = await all_events(response)
    assert shown([*got, *after]) == shown(whole)
    assert old[-1].shown["error"]["code"] == "stream_moved"
    assert await outcomes(cluster.bus) == {"done": 2}


async def test_after_its_end_and_its_workers_end_a_stream_can_still_be_read(
    cluster: Cluster, start: Start, http: aiohttp.ClientSession
) -> None:
    (worker,) = await cluster.deploy_echo(chunk="1")
    first, second = await two(cluster, start)
    body = {**ASKED, "n": 2}
    async with asked(http, first, body) as response:
        request_id = response.headers["x-request-id"]
        whole = await all_events(response)
    kill(first.process)
    for how in ("post", "get"):
        for cut in (1, 6, len(whole) - 2, len(whole) - 1):
            after = await rest(http, second, how, request_id, whole[cut - 1].id, body)
            assert shown(after) == shown(whole[cut:])
    kill(worker.process)
    for cut in (1, 6, len(whole) - 1):
        after = await rest(http, second, "get", request_id, whole[cut - 1].id)
        assert shown(after) == shown(whole[cut:])
    assert shown(await rest(http, second, "get", request_id, "")) == shown(whole)


async def test_when_the_worker_is_killed_after_the_move_another_goes_on(
    cluster: Cluster, start: Start, http: aiohttp.ClientSession
) -> None:
    workers = await cluster.deploy_echo(workers=2, interval_ms="60")
    first, second = await two(cluster, start)
    body = {**ASKED, "n": 2}
    whole = await undisturbed(http, second, body)
    async with asked(http, first, body) as response:
        request_id = response.headers["x-request-id"]
        got = await some_events(response, 5)
        kill(first.process)
    async with http.get(f"{second.url}{CHAT}/{request_id}/stream", params={"starting_after": got[-1].id}) as response:
        got += await some_events(response, 5)
        its_worker = read_event_id(got[-1].id, "id").run.rpartition(".")[2]
        kill(next(worker for worker in workers if worker.id == its_worker).process)
        got += await all_events(response)
    assert shown(got) == shown(whole)
    # And from its beginning, over both runs, by an id of the first and by one of the second.
    for cut in (2, len(whole) - 3):
        assert shown(await rest(http, second, "get", request_id, got[cut - 1].id)) == shown(whole[cut:])


@pytest.mark.parametrize("how", ["post", "get"])
async def test_when_gateway_and_worker_are_killed_the_answer_goes_on_from_what_has_passed(
    cluster: Cluster, start: Start, http: aiohttp.ClientSession, how: str
) -> None:
    workers = await cluster.deploy_echo(workers=2, interval_ms="60")
    first, second = await two(cluster, start)
    whole = await undisturbed(http, second)
    async with asked(http, first) as response:
        request_id = response.headers["x-request-id"]
        got = await some_events(response, 5)
        its_worker = read_event_id(got[-1].id, "id").run.rpartition(".")[2]
        kill(first.process)
        kill(next(worker for worker in workers if worker.id == its_worker).process)
    after = await rest(http, second, how, request_id, got[-1].id)
    assert shown([*got, *after]) == shown(whole)


async def test_a_request_that_waits_in_its_queue_is_there_for_who_comes_back(
    cluster: Cluster, start: Start, http: aiohttp.ClientSession
) -> None:
    await cluster.deploy_echo(slots="1", interval_ms="100")
    first, second = await two(cluster, start)
    async with asked(http, second) as busy:
        await next_event(busy)
        async with asked(http, first, **RESUMABLE) as response:
            request_id = response.headers["x-request-id"]
            kill(first.process)
        after = asyncio.create_task(rest(http, second, "get", request_id, ""))
        whole = await all_events(busy)
    events = await after
    assert text_of(events) == WORDS
    assert events[-1].data == "[DONE]"
    assert text_of(whole) != WORDS  # its first event was read before
    await settled(cluster.bus, "echo")
    assert await outcomes(cluster.bus) == {"done": 2}


async def test_a_client_that_moves_while_its_request_waits_gets_it_elsewhere(
    cluster: Cluster, start: Start, http: aiohttp.ClientSession
) -> None:
    await cluster.deploy_echo(slots="1", interval_ms="100")
    first, second = await two(cluster, start)
    async with asked(http, second) as busy:
        await next_event(busy)
        async with asked(http, first, **RESUMABLE) as response:
            request_id = response.headers["x-request-id"]
        async with http.get(f"{second.url}{CHAT}/{request_id}/stream") as response:
            assert response.status == 200
            await all_events(busy)
            assert text_of(await all_events(response)) == WORDS
    await settled(cluster.bus, "echo")
    assert await outcomes(cluster.bus) == {"done": 2}


async def test_without_the_header_hanging_up_cancels_and_with_it_only_after_the_grace(
    cluster: Cluster, start_gateway: StartGateway, http: aiohttp.ClientSession
) -> None:
    await cluster.deploy_echo(slots="1", tokens="100000", interval_ms="20")
    url, other = await start_gateway(orphan_grace_s=1.0), await start_gateway()
    for headers in ({}, RESUMABLE):
        async with asked(http, url, **headers) as response:
            request_id = response.headers["x-request-id"]
            last = (await some_events(response, 3))[-1]
        await settled(cluster.bus, "echo")
        async with http.get(f"{other}{CHAT}/{request_id}/stream", params={"starting_after": last.id}) as response:
            assert response.status == 410
            assert (await response.json())["error"]["code"] == "stream_not_resumable"
    assert await booked(cluster.bus, 2) == {"cancelled": 2}


async def test_what_is_no_stream_is_refused(url: str, http: aiohttp.ClientSession) -> None:
    nobody = new_request_id(new_publisher_id("gateway"))
    event = f"{new_request_id('g1')}:1.1.w1:3:2"
    for path, params, status, code in (
        (f"{CHAT}/{nobody}/stream", {}, 410, "stream_not_resumable"),
        (f"{CHAT}/nonsense/stream", {}, 410, "stream_not_resumable"),
        (f"{CHAT}/{nobody}/stream", {"starting_after": "17"}, 400, "invalid_request"),
        (f"{CHAT}/{nobody}/stream", {"starting_after": event}, 400, "invalid_request"),
    ):
        async with http.get(url + path, params=params) as response:
            body = await response.json()
            assert (response.status, body["error"]["code"]) == (status, code), body


async def test_a_stream_is_at_its_own_route(
    cluster: Cluster, start_gateway: StartGateway, http: aiohttp.ClientSession
) -> None:
    await cluster.deploy_echo(interval_ms="20")
    url = await start_gateway()
    async with asked(http, url, **RESUMABLE) as response:
        request_id = response.headers["x-request-id"]
        await next_event(response)
    async with http.get(f"{url}{COMPLETIONS}/{request_id}/stream") as response:
        assert response.status == 410
        assert f"{CHAT}/{request_id}/stream" in (await response.json())["error"]["message"]
