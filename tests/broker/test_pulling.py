"""Pulling from real queues."""

from __future__ import annotations

import asyncio

import pytest
from modelbus_broker import names
from modelbus_broker.connection import Bus
from modelbus_broker.pulling import Pulled, Puller, ask_order, credits_for, parse_ack_subject
from modelbus_broker.server import EmbeddedServer
from modelbus_broker.topology import consumers_of, declare_model


def test_both_forms_of_ack_subjects_are_read() -> None:
    old = "$JS.ACK.MB_HI.m_hi_0.2.77.5.1700000000000000000.3"
    new = "$JS.ACK.hub.ACCHASH.MB_HI.m_hi_0.2.77.5.1700000000000000000.3.rnd"
    for subject in (old, new):
        assert parse_ack_subject(subject) == ("MB_HI", "m_hi_0", 2, 77, 1700000000000000000)
    with pytest.raises(ValueError, match="ack subject"):
        parse_ack_subject("a.b.c")


def test_shares_are_asked_from_where_it_stopped_and_lanes_in_their_order() -> None:
    consumers = consumers_of("m", 3)
    order = [consumer.name.split("_", 1)[1] for consumer in ask_order(consumers, {"hi": 2})]
    assert order == ["re_any", "hi_2", "hi_0", "hi_1", "lo_0", "lo_1", "lo_2"]


def test_credits_are_shared_among_the_consumers_of_a_lane() -> None:
    consumers = consumers_of("m", 4)
    assert credits_for(64, consumers, "hi") == 16
    assert credits_for(64, consumers, "re") == 64
    assert credits_for(1, consumers, "lo") == 1


class Taker:
    """A worker's side: some slots, and what came."""

    def __init__(self, bus: Bus, slots: int, shares: int = 1) -> None:
        self.slots = slots
        self.came: list[Pulled] = []
        self.over: list[Pulled] = []
        self.arrived = asyncio.Event()
        self.bus = bus
        self.puller = Puller(bus, consumers_of("m", shares), free=lambda: self.slots, take=self.take)

    def take(self, pulled: Pulled) -> None:
        if self.slots <= 0:
            self.over.append(pulled)
            asyncio.ensure_future(self.bus.publish(pulled.ack_subject, b"-NAK"))
            return
        self.slots -= 1
        self.came.append(pulled)
        self.arrived.set()

    async def finish(self, pulled: Pulled) -> None:
        await self.bus.publish(pulled.ack_subject, b"+ACK")
        self.slots += 1
        self.puller.wake()

    async def until(self, count: int) -> None:
        async with asyncio.timeout(30):
            while len(self.came) < count:
                self.arrived.clear()
                await self.arrived.wait()


async def test_a_waiting_pull_gets_a_message_and_order_is_kept(bus: Bus) -> None:
    await declare_model(bus, "m")
    taker = Taker(bus, slots=100)
    await taker.puller.start()
    for number in range(50):
        await bus.js_publish(names.request_subject("m", "hi"), str(number).encode())
    await taker.until(50)
    assert [pulled.data for pulled in taker.came] == [str(number).encode() for number in range(50)]
    assert {pulled.delivery for pulled in taker.came} == {1}
    await taker.puller.stop()


async def test_full_workers_take_nothing_and_nothing_is_lost(bus: Bus) -> None:
    await declare_model(bus, "m", shares=2)
    for number in range(60):
        lane = "lo" if number % 3 == 0 else "hi"
        await bus.js_publish(names.request_subject("m", lane, number % 2), str(number).encode())
    takers = [Taker(bus, slots=2, shares=2) for _ in range(3)]
    for taker in takers:
        await taker.puller.start()
    done: set[bytes] = set()
    async with asyncio.timeout(60):
        while len(done) < 60:
            for taker in takers:
                assert taker.slots >= 0
                while taker.came:
                    pulled = taker.came.pop(0)
                    assert pulled.data not in done
                    done.add(pulled.data)
                    await taker.finish(pulled)
            await asyncio.sleep(0.005)
    for taker in takers:
        await taker.puller.stop()


async def test_the_hi_lane_is_served_before_the_lo_lane(bus: Bus) -> None:
    await declare_model(bus, "m")
    for number in range(5):
        await bus.js_publish(names.request_subject("m", "lo"), f"lo{number}".encode())
    for number in range(5):
        await bus.js_publish(names.request_subject("m", "hi"), f"hi{number}".encode())
    taker = Taker(bus, slots=1)
    await taker.puller.start()
    order: list[bytes] = []
    while len(order) < 10:
        await taker.until(1)
        pulled = taker.came.pop(0)
        order.append(pulled.data)
        await taker.finish(pulled)
    await taker.puller.stop()
    assert order == [b"hi%d" % n for n in range(5)] + [b"lo%d" % n for n in range(5)]


async def test_pulls_are_armed_again_after_a_restart_of_the_server(bus: Bus, server: EmbeddedServer) -> None:
    await declare_model(bus, "m")
    taker = Taker(bus, slots=10)
    await taker.puller.start()
    await bus.js_publish(names.request_subject("m", "hi"), b"before")
    await taker.until(1)
    await server.restart()
    await bus.js_publish(names.request_subject("m", "hi"), b"after", msg_id="after", timeout_s=30)
    await taker.until(2)
    assert taker.came[-1].data == b"after"
    await taker.puller.stop()


async def test_a_consumer_that_is_made_later_is_found(bus: Bus) -> None:
    await declare_model(bus, "other")
    taker = Taker(bus, slots=10)
    await taker.puller.start()
    await asyncio.sleep(0.5)
    await declare_model(bus, "m")
    await bus.js_publish(names.request_subject("m", "hi"), b"x")
    await taker.until(1)
    await taker.puller.stop()
