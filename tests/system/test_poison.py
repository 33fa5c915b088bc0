"""Requests that crash their worker, cannot be read, or fail: they end with the dead letters, the others are answered."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator

import pytest
from modelbus_broker import dead, names
from modelbus_broker.blobs import INLINE_LIMIT
from modelbus_broker.connection import Bus
from modelbus_broker.dead import StoredLetter
from modelbus_broker.errors import EngineFailed, ModelBusError, NotFound, PoisonRequest
from modelbus_broker.messages import Chat, ChatMessage, Delta, Request, encode
from modelbus_broker.publisher import Publisher
from modelbus_broker.topology import depths

from tests.helpers.cluster import Cluster


def chat(text: str) -> Chat:
    return Chat(messages=[ChatMessage(role="user", content=text)])


async def ask(publisher: Publisher, text: str) -> str:
    call = await publisher.submit("echo", chat(text))
    return "".join([f.text async for batch in call.batches() for f in batch if isinstance(f, Delta)])


async def letters(bus: Bus) -> list[StoredLetter]:
    return [stored async for stored in dead.letters(bus)]


async def emptied(bus: Bus) -> None:
    """Until the request streams hold nothing at all, seen or unseen by their consumers."""
    async with asyncio.timeout(60):
        while any((await depths(bus)).values()):
            await asyncio.sleep(0.05)


@pytest.fixture
async def publisher(cluster: Cluster) -> AsyncIterator[Publisher]:
    yield await cluster.publisher()


async def test_a_request_that_kills_its_workers_ends_after_three_and_its_neighbours_are_answered(
    cluster: Cluster, publisher: Publisher
) -> None:
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")
    workers = await cluster.deploy_echo(
        workers=4, slots="4", interval_ms="20", tokens="20", crash_on="boom", fail_after="3"
    )
    texts = [f"innocent {n}" for n in range(63)]
    texts.insert(random.Random(seed).randrange(64), "boom")

    answers = await asyncio.gather(*(ask(publisher, text) for text in texts), return_exceptions=True)

    right = await asyncio.gather(*(ask(publisher, text) for text in texts if text != "boom"))
    for text, answer in zip(texts, answers, strict=True):
        if text == "boom":
            assert isinstance(answer, PoisonRequest), answer
        else:
            assert answer == right.pop(0), text
    died = [worker for worker in workers if worker.process.poll() is not None]
    assert len(died) <= 3
    (stored,) = await letters(cluster.bus)
    assert stored.letter.reason == "poison_request"
    assert {names.parse_run(run)[2] for run in stored.letter.runs} == {worker.id for worker in died}
    assert stored.letter.crashes == 3
    await emptied(cluster.bus)


async def test_a_request_that_crashes_at_once_is_counted_too(cluster: Cluster, publisher: Publisher) -> None:
    workers = await cluster.deploy_echo(workers=4, slots="1", crash_on="boom")

    with pytest.raises(PoisonRequest, match="lost 3 times"):
        await ask(publisher, "boom")

    assert sum(worker.process.poll() is not None for worker in workers) == 3
    assert await ask(publisher, "hello") == "hello"
    await emptied(cluster.bus)


async def test_what_cannot_be_decoded_is_a_dead_letter_and_its_client_hears_of_it(
    cluster: Cluster, publisher: Publisher
) -> None:
    await cluster.deploy_echo(slots="1", delay_ms="500")
    busy = await publisher.submit("echo", chat("first"))
    call = await publisher.submit("echo", chat("second"))
    # In place of the second request comes garbage that names it.
    async with asyncio.timeout(20):
        while not busy.accepted:
            await asyncio.sleep(0.01)
    await publisher.bus.js_request("STREAM.PURGE.MB_HI", {"filter": names.request_subject("echo", "hi")})
    subject = names.request_subject("echo", "hi")
    await publisher.bus.js_publish(subject, b"\xc1garbage", headers={"Nats-Msg-Id": f"{call.id}.2"})

    with pytest.raises(PoisonRequest, match="cannot be decoded"):
        async for _ in call.batches():
            pass

    nameless = b"no id at all"
    await publisher.bus.js_publish(subject, nameless)
    foreign = encode(Request(id="foreign", model="echo", task=chat("who answers?")))
    await publisher.bus.js_publish(subject, foreign)
    await emptied(cluster.bus)
    found = [stored.letter for stored in await letters(cluster.bus)]
    assert [letter.reason for letter in found] == ["not_decodable"] * 3
    assert found[0].id == call.id
    assert {letter.original for letter in found} == {b"\xc1garbage", nameless, foreign}


async def test_what_the_engine_fails_on_is_kept(cluster: Cluster, publisher: Publisher) -> None:
    await cluster.deploy_echo(fail="always", fail_text="CUDA error: an illegal memory access")

    with pytest.raises(EngineFailed, match="illegal memory"):
        await ask(publisher, "hello")

    await emptied(cluster.bus)
    (stored,) = await letters(cluster.bus)
    assert (stored.letter.reason, len(stored.letter.runs)) == ("engine_failed", 1)
    assert "illegal memory" in stored.letter.detail


async def test_a_provider_s_refusal_is_no_dead_letter(cluster: Cluster, publisher: Publisher) -> None:
    await cluster.deploy_echo(fail="always", fail_code="upstream_failed")

    with pytest.raises(ModelBusError):
        await ask(publisher, "hello")

    await emptied(cluster.bus)
    assert await letters(cluster.bus) == []


async def test_a_large_request_keeps_its_body_and_can_be_replayed_and_dropped(
    cluster: Cluster, publisher: Publisher
) -> None:
    text = "boom " * (INLINE_LIMIT // 4)
    deadly = await cluster.deploy_echo(workers=3, slots="1", crash_on="boom", tokens="2")
    spare = cluster.start_worker(deadly[0].deployment, replica=3)
    await cluster.wait_ready("echo", 4)
    with pytest.raises(PoisonRequest):
        await ask(publisher, text)
    # The blob store forgets after a day.
    await publisher.bus.js_request(f"STREAM.PURGE.OBJ_{names.BLOBS}")
    (stored,) = await letters(cluster.bus)
    assert stored.letter.body is not None
    for worker in [*deadly, spare]:
        worker.process.kill()
    await cluster.deploy_echo(tokens="2")  # mended: it survives the prompt

    call = await dead.replay(publisher, await dead.find_letter(publisher.bus, stored.letter.id))
    frames = [frame async for batch in call.batches() for frame in batch if isinstance(frame, Delta)]
    assert "".join(frame.text for frame in frames) == "boom boom"
    assert call.id != stored.letter.id

    await dead.drop(publisher.bus, stored)
    assert await letters(cluster.bus) == []
    with pytest.raises(NotFound, match="modelbus dead list"):
        await dead.find_letter(publisher.bus, stored.letter.id)
    state = (await publisher.bus.js_request("STREAM.INFO.MB_DEAD"))["state"]
    assert state["messages"] == 0
    await emptied(cluster.bus)


async def test_no_consumer_gives_up_on_a_message_by_itself(cluster: Cluster) -> None:
    await cluster.deploy_echo()
    for stream in names.LANE_STREAMS.values():
        found = await cluster.bus.js_request(f"CONSUMER.LIST.{stream}", {"offset": 0})
        assert found["consumers"]
        assert {info["config"]["max_deliver"] for info in found["consumers"]} == {-1}
