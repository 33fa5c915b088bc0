from __future__ import annotations

import asyncio
import os
import signal
import time
from pathlib import Path
from typing import Literal

import msgspec
import pytest
from modelbus_broker import names
from modelbus_broker.connection import Bus
from modelbus_broker.errors import BusUnavailable
from modelbus_broker.messages import UsageEvent, encode
from modelbus_broker.pulling import Pulled, Puller
from modelbus_broker.server import EmbeddedServer
from modelbus_broker.topology import consumers_of, declare_model
from modelbus_workers.ledger import Ledger

from tests.helpers.asking import usage_events
from tests.helpers.bus_nodes import BusNodes
from tests.helpers.hosts import freeze

CONSUMER = f"{names.STREAM_HI}.{names.consumer_name('m', 'hi', 0)}"


async def pulled(bus: Bus, count: int, *, new: bool = True) -> list[Pulled]:
    """So many messages of the model, not acknowledged; ``new``: put there now."""
    got: list[Pulled] = []
    for n in range(count if new else 0):
        await bus.js_publish(names.request_subject("m", "hi"), b"%d" % n)
    puller = Puller(bus, consumers_of("m"), free=lambda: count - len(got), take=got.append)
    await puller.start()
    async with asyncio.timeout(60):
        while len(got) < count:
            await asyncio.sleep(0.05)
    await puller.stop()
    return got


async def left(bus: Bus) -> int:
    """Messages in the stream; -1 while it elects a leader and nobody answers."""
    try:
        return int((await bus.js_request(f"STREAM.INFO.{names.STREAM_HI}"))["state"]["messages"])
    except BusUnavailable:
        return -1


def event(n: int) -> UsageEvent:
    return UsageEvent(id=f"g-1-{n}", run="1.1.w", model="m", deployment="m")


async def test_all_that_ended_is_acknowledged_and_billed(bus: Bus) -> None:
    await declare_model(bus, "m")
    messages = await pulled(bus, 5)
    ledger = Ledger(bus)
    ledger.start()
    for n, message in enumerate(messages):
        ledger.book(event(n), message.ack_subject)
    ledger.book(event(5), "")
    await ledger.close(timeout_s=60)
    assert not ledger.waiting
    info = await bus.js_request(f"CONSUMER.INFO.{CONSUMER}")
    assert (info["num_ack_pending"], info["num_pending"]) == (0, 0)
    assert (await bus.js_request(f"STREAM.INFO.{names.STREAM_HI}"))["state"]["messages"] == 0


async def test_what_turns_out_not_to_count_is_booked_once_more_as_waste(bus: Bus) -> None:
    await declare_model(bus, "m")
    messages = await pulled(bus, 2)
    ledger = Ledger(bus)
    ledger.start()
    for n, message in enumerate(messages):
        ledger.book(event(n), message.ack_subject)
    async with asyncio.timeout(60):
        while ledger.waiting:
            await asyncio.sleep(0.05)
    for _ in range(2):  # said twice, heard once
        ledger.disown(names.run_key(event(1).id, event(1).run))
    await ledger.close(timeout_s=60)
    assert [(e.id, e.outcome) for e in await usage_events(bus)] == [("g-1-0", "done"), ("g-1-1", "waste")]


async def test_what_is_disowned_while_it_is_booked_is_waste_and_keeps_its_message(
    bus: Bus, server: EmbeddedServer
) -> None:
    await declare_model(bus, "m")
    messages = await pulled(bus, 2)
    ledger = Ledger(bus)
    ledger.start()
    freeze(server.pid)
    for n, message in enumerate(messages):
        ledger.book(event(n), message.ack_subject)
    await asyncio.sleep(0.3)  # the events are on their way
    ledger.disown(names.run_key(event(1).id, event(1).run))
    os.kill(server.pid, signal.SIGCONT)
    await ledger.close(timeout_s=60)
    assert [(e.id, e.outcome) for e in await usage_events(bus)] == [("g-1-0", "done"), ("g-1-1", "waste")]
    assert await left(bus) == 1


async def test_a_message_that_comes_again_while_its_answer_is_stored_goes_after_that_and_by_its_new_name(
    bus: Bus,
) -> None:
    await declare_model(bus, "m")
    (message,) = await pulled(bus, 1)
    ledger, stored = Ledger(bus), asyncio.Event()
    ledger.start()

    async def keep() -> bool:
        await stored.wait()
        return True

    key = names.run_key(event(0).id, event(0).run)
    ledger.book(event(0), message.ack_subject, first=keep())
    for wait_s in (0.0, 0.3):  # before it is looked at, and while it is stored
        await asyncio.sleep(wait_s)
        await bus.publish(message.ack_subject, b"-NAK")
        (message,) = await pulled(bus, 1, new=False)
        assert ledger.delivered_again(key, message.ack_subject)
        assert ledger.waiting == {message.ack_subject}
    assert await left(bus) == 1
    stored.set()
    await ledger.close(timeout_s=60)
    assert not ledger.waiting and not ledger.delivered_again(key, message.ack_subject)
    assert [e.id for e in await usage_events(bus)] == ["g-1-0"]
    assert await left(bus) == 0


async def test_a_message_that_comes_again_while_its_publisher_is_asked_goes_by_its_new_name(bus: Bus) -> None:
    await declare_model(bus, "m")
    (message,) = await pulled(bus, 1)
    ledger, asked, later = Ledger(bus), asyncio.Event(), asyncio.Event()

    async def ask(publisher: str) -> Literal["gone"]:
        return "gone"

    async def booked_later(entries: object) -> set[str]:
        asked.set()
        await later.wait()
        return set()

    ledger.ask, ledger._booked_later = ask, booked_later  # type: ignore[method-assign]  # held up in its middle
    ledger.start()
    ledger.book(event(0), message.ack_subject, publisher="g", since=time.monotonic() - 60)
    await asked.wait()
    await bus.publish(message.ack_subject, b"-NAK")
    (message,) = await pulled(bus, 1, new=False)
    assert ledger.delivered_again(names.run_key(event(0).id, event(0).run), message.ack_subject)
    later.set()
    await ledger.close(timeout_s=60)
    assert not ledger.waiting
    assert await left(bus) == 0


async def test_when_its_publisher_is_gone_the_ledger_says_whether_a_later_run_has_answered(bus: Bus) -> None:
    await declare_model(bus, "m")
    messages = await pulled(bus, 2)
    later = msgspec.structs.replace(event(1), run="1.2.other")
    await bus.js_publish(names.USAGE, encode([later]))
    ledger = Ledger(bus)  # nobody can be asked
    ledger.start()
    for n, message in enumerate(messages):
        ledger.book(event(n), message.ack_subject, publisher="g", since=time.monotonic() - 60)
    await ledger.close(timeout_s=60)
    booked = {(e.id, e.run): e.outcome for e in await usage_events(bus)}
    assert booked == {("g-1-0", "1.1.w"): "done", ("g-1-1", "1.1.w"): "waste", ("g-1-1", "1.2.other"): "done"}


@pytest.mark.timeout(240)
async def test_an_acknowledgement_that_dies_with_a_server_is_said_again(tmp_path: Path) -> None:
    async with BusNodes(tmp_path) as nodes:
        async with await nodes.connect("admin") as admin:
            await nodes.declare(admin)
            await declare_model(admin, "m")
            leader = (await admin.js_request(f"CONSUMER.INFO.{CONSUMER}"))["cluster"]["leader"]
            lost = next(server for server in nodes.servers if server.settings.store.name == leader)
            other = next(server for server in nodes.servers if server is not lost)
        # Connected elsewhere, it does not notice by its connection that the consumer's leader has died.
        settings = msgspec.structs.replace(admin.settings, url=other.url)
        async with await Bus.connect(settings, name="worker") as bus:
            messages = await pulled(bus, 3)
            ledger = Ledger(bus, events=False)
            ledger.start()
            freeze(lost.pid)
            for n, message in enumerate(messages):
                ledger.book(event(n), message.ack_subject)
            await asyncio.sleep(0.5)  # they are in the hands of the server that dies now
            lost.kill()
            await ledger.close(timeout_s=60)
            async with asyncio.timeout(60):
                while await left(bus):
                    await asyncio.sleep(0.1)
