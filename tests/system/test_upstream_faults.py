"""What a client sees when a provider breaks, in every way we know: rescued where that is possible, else told, never cut.

``docs/upstreams.md`` shows this table to users; a test compares the two.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any, get_args

import aiohttp
import msgspec
import pytest
import pytest_asyncio
from modelbus_broker.connection import Bus
from modelbus_broker.messages import Deployment
from modelbus_broker.server import EmbeddedServer, ServerSettings
from modelbus_broker.settings import BusSettings
from modelbus_broker.topology import declare_bus, queued
from modelbus_gateway.server import listening
from modelbus_gateway.settings import GatewaySettings

from tests.helpers.cluster import Cluster
from tests.helpers.command_line import free_port
from tests.helpers.faulty_upstream import ANSWER, HALF, LARGE, Fault, FaultyUpstream, faulty_upstream

DOCS = Path(__file__).parents[2] / "docs" / "upstreams.md"


class Expected(msgspec.Struct, frozen=True):
    """What becomes of a fault."""

    status: int = 200  #: when nobody can rescue it; 200: the answer is whole all the same
    code: str = ""
    words: str = ""  #: part of the message; the provider's own where it has some
    shown: str = ""  #: of the answer before the fault: a stream that has shown it cannot be rescued
    retry_after: str = ""
    answer: str = ANSWER


TABLE: dict[Fault, Expected] = {
    "none": Expected(),
    "connection refused": Expected(502, "upstream_failed", "cannot be reached"),
    "429 with Retry-After": Expected(429, "upstream_failed", "slow down, please", retry_after="1"),
    "500": Expected(502, "upstream_failed", "out of memory"),
    "503": Expected(502, "upstream_failed", "overloaded"),
    "slow first byte": Expected(504, "upstream_failed", "sent nothing for 1 s"),
    "silent after headers": Expected(504, "upstream_failed", "sent nothing for 1 s"),
    "cut before the first token": Expected(502, "stream_cut", "was cut"),
    "silent mid-stream": Expected(504, "upstream_failed", "sent nothing for 1 s", HALF),
    "cut mid-stream": Expected(502, "stream_cut", "was cut", HALF),
    "malformed chunk": Expected(502, "stream_cut", "was cut", HALF),
    "garbage JSON": Expected(502, "upstream_failed", "malformed chunk", HALF),
    "wrong content type": Expected(502, "upstream_failed", "Welcome to the router"),
    "empty answer": Expected(502, "stream_cut", "with nothing in it"),
    "no finish_reason": Expected(502, "stream_cut", "without a finish_reason", HALF),
    "duplicate done": Expected(),
    "large chunk": Expected(answer=LARGE),
    "huge chunk": Expected(502, "upstream_failed", "more than 16 MiB"),
    "truncated UTF-8": Expected(502, "stream_cut", "in the middle of an event", HALF),
    "never-ending stream": Expected(502, "upstream_failed", "does not end the answer", HALF + " and" * 1062),
    "error event mid-stream": Expected(502, "upstream_failed", "the GPU fell off the bus", HALF),
}
MAX_TOKENS = 10


class Stand:
    """Two models behind one gateway: ``alone`` on a provider that breaks, ``pair`` on it and on a healthy one."""

    def __init__(self, url: str, bus: Bus, faulty: FaultyUpstream, healthy: FaultyUpstream) -> None:
        self.url = url
        self.bus = bus
        self.faulty = faulty
        self.healthy = healthy


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def stand(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Stand]:
    folder = tmp_path_factory.mktemp("faults")
    async with AsyncExitStack() as stack:
        server = await stack.enter_async_context(EmbeddedServer(ServerSettings(store=folder / "nats")))
        bus = await stack.enter_async_context(await Bus.connect(BusSettings(url=server.url), name="test"))
        await declare_bus(bus)
        cluster = Cluster(bus=bus, server=server, folder=folder)
        stack.push_async_callback(cluster.close)
        faulty = await stack.enter_async_context(faulty_upstream())
        healthy = await stack.enter_async_context(faulty_upstream())
        # The faulty one is served first, so that every request meets it.
        deployments = [
            saas("alone", "alone", faulty), saas("pair-1", "pair", faulty), saas("pair-2", "pair", healthy, priority=5)
        ]  # fmt: skip
        for deployment in deployments:
            await cluster.declare(deployment)
            cluster.start_worker(deployment)
        await cluster.wait_ready("alone", 1)
        await cluster.wait_ready("pair", 2)
        settings = GatewaySettings(bus=bus.settings, port=free_port(), shutdown_grace_s=2.0, headers_after_s=60.0)
        await stack.enter_async_context(listening(settings))
        yield Stand(settings.address, bus, faulty, healthy)


def saas(name: str, model: str, upstream: FaultyUpstream, *, priority: int = 0) -> Deployment:
    params = {
        "base_url": upstream.url, "model": "m", "first_byte_timeout_s": "1", "stall_timeout_s": "1", "max_retries": "1"
    }  # fmt: skip
    return Deployment(
        name=name, model=model, engine="openai", revision="1", engine_params=params, priority=priority,
        pretrained_model_type="saas/openai_compatible",
    )  # fmt: skip


class Seen(msgspec.Struct):
    """What a client saw."""

    status: int
    text: str = ""
    finish_reason: str = ""
    done: bool = False  #: the stream said [DONE]
    error: dict[str, Any] = {}
    retry_after: str = ""


async def ask(url: str, model: str, *, stream: bool) -> Seen:
    body = {
        "model": model, "stream": stream, "max_tokens": MAX_TOKENS, "messages": [{"role": "user", "content": "hi"}]
    }  # fmt: skip
    async with (
        aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=60)) as session,
        session.post(f"{url}/v1/chat/completions", json=body) as response,
    ):
        seen = Seen(response.status, retry_after=response.headers.get("Retry-After", ""))
        data = await response.read()
    if response.status != 200:
        seen.error = json.loads(data)["error"]
    elif not stream:
        (choice,) = json.loads(data)["choices"]
        seen.text, seen.finish_reason = choice["message"]["content"], choice["finish_reason"]
    else:
        for event in data.decode().split("\n\n"):
            line = event.rpartition("\n")[2]  # an id may come before
            payload = line.removeprefix("data: ")
            if payload == "[DONE]":
                seen.done = True
            elif line.startswith("data: "):
                assert not seen.done and not seen.error, "nothing follows the end"
                read_event(seen, json.loads(payload))
    return seen


def read_event(seen: Seen, event: dict[str, Any]) -> None:
    seen.error = event.get("error", {})
    for choice in event.get("choices", ()):
        seen.text += choice["delta"].get("content") or ""
        seen.finish_reason = choice["finish_reason"] or seen.finish_reason


@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.parametrize("stream", [False, True], ids=["plain", "stream"])
@pytest.mark.parametrize("model", ["alone", "pair"])
@pytest.mark.parametrize("fault", TABLE)
async def test_what_the_client_sees(stand: Stand, fault: Fault, model: str, stream: bool) -> None:
    expected = TABLE[fault]
    await stand.faulty.breaks(fault)
    seen = await ask(stand.url, model, stream=stream)
    rescued = model == "pair" and not (stream and expected.shown)
    if expected.status == 200 or rescued:
        assert (seen.status, seen.error, seen.finish_reason, seen.done) == (200, {}, "stop", stream)
        assert seen.text == expected.answer
    else:
        begun = stream and bool(expected.shown)
        assert seen.status == (200 if begun else expected.status)
        assert (seen.text, seen.finish_reason, seen.done) == (expected.shown if begun else "", "", False)
        assert seen.error["code"] == expected.code
        assert expected.words in seen.error["message"]
        if not begun:
            assert seen.retry_after == expected.retry_after
    if fault != "connection refused":
        assert stand.faulty.asked > 0, "the request has met the fault"
    assert await queued(stand.bus, model) == 0


def documented(fault: Fault, expected: Expected) -> str:
    """The fault's row in the documentation."""
    if expected.status == 200:
        return f"| {fault} | the whole answer | the whole answer | the whole answer |"
    error = f"{expected.status} `{expected.code}`"
    retry = f", `Retry-After: {expected.retry_after}`" if expected.retry_after else ""
    stream = f"what came, then the error event `{expected.code}`" if expected.shown else "rescued"
    return f"| {fault} | {error}{retry} | rescued | {stream} |"


def test_the_documentation_says_the_same() -> None:
    assert set(TABLE) == set(get_args(Fault))
    rows = [documented(fault, expected) for fault, expected in TABLE.items() if fault != "none"]
    page = DOCS.read_text()
    assert [row for row in rows if row not in page] == []
