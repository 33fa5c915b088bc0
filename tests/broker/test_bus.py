"""The connection, the declared topology, buckets and blobs on a real server."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import pytest
from modelbus_broker import names, topology
from modelbus_broker.blobs import delete_blob, get_blob, put_blob
from modelbus_broker.buckets import Bucket, BucketReader
from modelbus_broker.connection import Bus, JetStreamError, Msg, NoResponders
from modelbus_broker.errors import BusUnavailable, Conflict, NotFound
from modelbus_broker.server import EmbeddedServer
from modelbus_broker.settings import BusSettings


async def test_no_server_is_said_with_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(BusUnavailable, match="modelbus start --head"):
        await Bus.connect(BusSettings(url="nats://127.0.0.1:1", connect_timeout_s=0.5), name="test")


async def test_a_subject_without_listeners_answers_at_once(bus: Bus) -> None:
    with pytest.raises(NoResponders):
        await bus.request("nobody.here", timeout_s=30)


async def test_declaring_twice_changes_nothing_and_loses_nothing(bus: Bus) -> None:
    await topology.declare_model(bus, "m", shares=2, compats=["c0"])
    await bus.js_publish(names.request_subject("m", "hi", 1), b"x")
    await topology.declare_bus(bus)
    await topology.declare_model(bus, "m", shares=2, compats=["c0"])
    assert await topology.queued(bus, "m") == 1
    assert (await topology.depths(bus))[names.model_token("m")] == 1


async def test_every_consumer_is_prioritized_with_one_group(bus: Bus) -> None:
    await topology.declare_model(bus, "m", shares=2, compats=["c0"])
    for ref in topology.consumers_of("m", 2, ["c0"]):
        config = (await bus.js_request(f"CONSUMER.INFO.{ref.stream}.{ref.name}"))["config"]
        assert (config["priority_policy"], config["priority_groups"]) == ("prioritized", [names.GROUP])
        assert config["max_deliver"] == -1


async def test_removing_a_model_leaves_no_consumer_and_no_message(bus: Bus) -> None:
    for model in ("m", "n"):
        await topology.declare_model(bus, model)
        await bus.js_publish(names.request_subject(model, "lo"), b"x")
    await topology.remove_model(bus, "m")
    assert names.model_token("m") not in await topology.depths(bus)
    assert await topology.queued(bus, "n") == 1
    assert (await bus.js_request(f"CONSUMER.LIST.{names.STREAM_LO}", {"offset": 0}))["total"] == 1


async def test_a_message_id_is_stored_once(bus: Bus) -> None:
    await topology.declare_model(bus, "m")
    subject = names.request_subject("m", "hi")
    first = await bus.js_publish(subject, b"x", msg_id="a.1")
    second = await bus.js_publish(subject, b"x", msg_id="a.1")
    assert (second.duplicate, second.seq) == (True, first.seq)


async def test_a_refused_publish_carries_the_server_s_number(bus: Bus) -> None:
    with pytest.raises(JetStreamError) as caught:
        await bus.js_publish("$KV.keys.a", b"x", expected_last_subject_seq=5)
    assert caught.value.err_code in (10071, 10164)


async def test_create_update_and_delete_are_compare_and_set(bus: Bus) -> None:
    bucket = Bucket(bus, names.BUCKET_KEYS)
    seq = await bucket.create("k", b"1")
    with pytest.raises(Conflict):
        await bucket.create("k", b"2")
    seq = await bucket.update("k", b"2", seq)
    with pytest.raises(Conflict):
        await bucket.update("k", b"3", seq - 1)
    with pytest.raises(Conflict):
        await bucket.delete("k", seq - 1)
    await bucket.delete("k", seq)
    entry = await bucket.get("k")
    assert entry is not None and entry.deleted
    await bucket.create("k", b"4")
    assert {key: entry.value for key, entry in (await bucket.all()).items()} == {"k": b"4"}


async def test_a_key_that_expired_can_be_created_again_by_one(bus: Bus) -> None:
    bucket = Bucket(bus, names.BUCKET_CLAIMS)
    await bucket.create("k", b"1", ttl_s=1)
    async with asyncio.timeout(20):
        while (entry := await bucket.get("k")) is None or not entry.deleted:
            await asyncio.sleep(0.1)
    results = await asyncio.gather(*(bucket.create("k", str(n).encode()) for n in range(5)), return_exceptions=True)
    assert sum(isinstance(result, int) for result in results) == 1


async def test_a_reader_sees_changes_also_after_a_restart_of_the_server(bus: Bus, server: EmbeddedServer) -> None:
    bucket = Bucket(bus, names.BUCKET_KEYS)
    await bucket.put("a", b"1")
    reader = BucketReader(bus, names.BUCKET_KEYS, bytes.decode)
    await reader.start()
    assert dict(reader.values) == {"a": "1"}
    for round_number in range(2):
        await bucket.put("b", str(round_number).encode())
        async with asyncio.timeout(30):
            while reader.values.get("b") != str(round_number):
                await reader.changed(1.0)
        await server.restart()
        async with asyncio.timeout(30):
            while not bus.is_connected:
                await asyncio.sleep(0.01)
    await bucket.delete("a")
    async with asyncio.timeout(30):
        while "a" in reader.values:
            await reader.changed(1.0)
    await reader.close()


async def test_memory_streams_are_made_again_after_a_restart(bus: Bus, server: EmbeddedServer) -> None:
    await server.restart()
    async with asyncio.timeout(30):
        while not bus.is_connected:
            await asyncio.sleep(0.01)
    await topology.declare_memory(bus)
    assert await Bucket(bus, names.BUCKET_WORKERS).put("a", b"1") == 1


@pytest.mark.parametrize("size", [0, 1, 128 * 1024, 20_000_001])
async def test_a_blob_comes_back_whole(bus: Bus, size: int) -> None:
    data = os.urandom(size)
    ref = await put_blob(bus, f"blob-{size}", data)
    assert ref.size == size
    assert await get_blob(bus, ref) == data


async def test_a_blob_that_is_gone_is_said(bus: Bus) -> None:
    ref = await put_blob(bus, "b", b"x" * 300_000)
    await delete_blob(bus, ref)
    with pytest.raises(NotFound, match="0 of 300000"):
        await get_blob(bus, ref)


async def test_callbacks_get_messages_in_order(bus: Bus) -> None:
    seen: list[bytes] = []

    def take(msg: Msg) -> None:
        seen.append(msg.data)

    await bus.subscribe("a.b", take)
    for number in range(100):
        await bus.publish("a.b", str(number).encode())
    async with asyncio.timeout(10):
        while len(seen) < 100:
            await asyncio.sleep(0.01)
    assert seen == [str(number).encode() for number in range(100)]
