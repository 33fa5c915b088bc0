"""Queues that stand still are told from busy, idle and moving ones."""

from __future__ import annotations

import asyncio

import pytest
from modelbus_broker import names
from modelbus_broker.messages import Chat, ChatMessage, Delta
from modelbus_broker.publisher import Publisher
from modelbus_broker.registry import Registry
from modelbus_broker.standstill import Look, Standstill, standing_models, stands
from modelbus_broker.storing import PublisherSettings

from tests.helpers.cluster import Cluster
from tests.helpers.command_line import modelbus_ok


def look(pending: int = 1, waiting: int = 1, delivered: int = 5, at: float = 0.0) -> Look:
    return Look(pending=pending, waiting=waiting, delivered=delivered, at=at)


@pytest.mark.parametrize(
    ("before", "now", "expected"),
    [
        (look(), look(), True),
        (look(), look(pending=9), True),
        (look(), look(delivered=6), False),
        (look(waiting=0), look(), False),
        (look(), look(waiting=0), False),
        (look(pending=0), look(), False),
        (look(), look(pending=0), False),
    ],
)
def test_it_stands_when_both_sides_wait_and_nothing_moves(before: Look, now: Look, expected: bool) -> None:
    assert stands(before, now) is expected


def test_it_is_told_after_a_time_and_forgotten_when_it_moves() -> None:
    standstill = Standstill(after_s=10)
    assert standstill.take({"a": look(at=0), "b": look(at=0)}) == {}
    assert standstill.take({"a": look(at=5), "b": look(at=5)}) == {}
    assert standstill.take({"a": look(at=10), "b": look(at=10, delivered=6)}) == {"a": 10}
    assert standstill.take({"a": look(at=15), "b": look(at=15, delivered=6)}) == {"a": 15}
    assert standstill.take({"a": look(at=20, delivered=6), "b": look(at=20, delivered=6)}) == {"b": 10}
    assert standstill.take({}) == {}
    assert standstill.take({"b": look(at=30, delivered=6)}) == {}


async def test_a_queue_that_delivers_nothing_is_found(
    cluster: Cluster, registry: Registry, caplog: pytest.LogCaptureFixture
) -> None:
    await cluster.deploy_echo()
    # A paused consumer is the one way to make a healthy server deliver nothing.
    consumer = names.consumer_name("echo", "hi", 0)
    pause = f"CONSUMER.PAUSE.{names.STREAM_HI}.{consumer}"
    publisher = Publisher(cluster.bus, registry, kind="sdk", settings=PublisherSettings(stuck_after_s=0.4))
    await publisher.start()
    try:
        assert await standing_models(cluster.bus, registry, ["echo"], apart_s=0.1) == set()
        await cluster.bus.js_request(pause, {"pause_until": "2100-01-01T00:00:00Z"})
        call = await publisher.submit("echo", Chat(messages=[ChatMessage(role="user", content="hello")]))
        async with asyncio.timeout(60):
            while "echo" not in publisher.standstill.standing:
                await asyncio.sleep(0.05)
        assert await standing_models(cluster.bus, registry, ["echo"], apart_s=0.1) == {"echo"}
        stat = await asyncio.to_thread(modelbus_ok, "stat", "--json", env={"MODELBUS_ADDRESS": cluster.server.url})
        assert [(model["model"], model["queued"], model["stuck"]) for model in stat.json()] == [("echo", 1, True)]
        assert f"1 request(s) and 1 pull(s) wait at consumer {consumer}" in caplog.text
        await cluster.bus.js_request(pause, {})
        async with asyncio.timeout(60):
            text = [f.text async for batch in call.batches() for f in batch if isinstance(f, Delta)]
            while publisher.standstill.standing:
                await asyncio.sleep(0.05)
        assert "".join(text) == "hello"
    finally:
        await publisher.close()
