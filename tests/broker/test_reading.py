"""Reading a stream without taking from it, also while no server answers for it."""

from __future__ import annotations

import asyncio

import pytest
from modelbus_broker import names, reading
from modelbus_broker.connection import Bus
from modelbus_broker.errors import BusUnavailable
from modelbus_broker.reading import read_batch, read_stream

DEAD = "mb.dead.m"


async def test_messages_are_read_in_order_and_stay(bus: Bus) -> None:
    for number in range(10):
        await bus.js_publish(DEAD, b"%d" % number, msg_id=f"id-{number}")
    for _ in range(2):
        found = [message async for message in read_stream(bus, names.STREAM_DEAD, "mb.dead.*", batch=3)]
        assert [int(message.data) for message in found] == list(range(10))
        assert [message.message_id for message in found] == [f"id-{number}" for number in range(10)]
    assert await read_batch(bus, names.STREAM_DEAD, "mb.dead.*", seq=found[-1].seq + 1) == []
    assert await read_batch(bus, names.STREAM_DEAD, "mb.dead.other") == []


async def test_a_stream_that_nobody_answers_for_is_not_an_empty_one(bus: Bus, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = "COMES_LATER"
    reader = asyncio.create_task(read_batch(bus, stream, "late.>"))
    await asyncio.sleep(0.5)
    assert not reader.done()
    await bus.js_request(f"STREAM.CREATE.{stream}", {"name": stream, "subjects": ["late.>"], "allow_direct": True})
    assert await reader == []
    await bus.js_publish("late.a", b"x")
    assert [message.data for message in await read_batch(bus, stream, "late.>")] == [b"x"]

    monkeypatch.setattr(reading, "TIMEOUT_S", 0.5)
    with pytest.raises(BusUnavailable, match="does not answer"):
        await read_batch(bus, "NEVER_THERE", ">")
