"""Runs that may not be the only ones: their worker stood still, or the bus delivered their message again."""

from __future__ import annotations

import asyncio
import signal

from modelbus.testing.echo import count_tokens
from modelbus_broker import names
from modelbus_broker.asking import CallOptions
from modelbus_broker.kept import read_kept
from modelbus_broker.messages import encode
from modelbus_broker.topology import ACK_WAIT_S, declare_bus, running
from modelbus_workers.pulse import STOOD_STILL_S, Pulse

from tests.helpers.asking import begun, chat, outcomes, read, settled, usage_events, whole
from tests.helpers.cluster import Cluster, echo_deployment

WORDS = "the quick brown fox jumps over the lazy dog"


def test_a_pulse_that_missed_its_beats_tells_for_how_long() -> None:
    gaps: list[float] = []
    pulse = Pulse(gaps.append)
    pulse.beat()
    pulse._last -= STOOD_STILL_S / 2
    pulse.beat()
    assert gaps == []
    pulse._last -= STOOD_STILL_S + 1
    pulse.beat()
    pulse.beat()
    (gap,) = gaps
    assert STOOD_STILL_S < gap < STOOD_STILL_S + 60


async def test_a_worker_that_wakes_up_asks_before_it_ends_what_went_on_elsewhere(cluster: Cluster) -> None:
    workers = await cluster.deploy_echo(workers=2, slots="8", interval_ms="50", tokens="40")
    publisher = await cluster.publisher()
    asked = [await begun(publisher, "echo", f"{WORDS} {n}", stream=n % 2 > 0) for n in range(6)]
    frozen = next(worker for worker in workers if asked[0][0].reception.run.endswith(worker.id))
    lost = [call for call, _ in asked if call.reception.run.endswith(frozen.id)]
    frozen.send_signal(signal.SIGSTOP)
    async with asyncio.timeout(60):
        answers = await asyncio.gather(*(task for _, task in asked))
    assert answers == [whole(f"{WORDS} {n}", 40) for n in range(6)]
    # All that it still had to say is overdue: it would say it, and bill it, in the first moment.
    frozen.send_signal(signal.SIGCONT)
    async with asyncio.timeout(60):
        while (await outcomes(cluster.bus)).total() < 6 + len(lost):
            await asyncio.sleep(0.1)
    ends = await outcomes(cluster.bus)
    assert ends.pop("done") == 6
    assert ends.total() == len(lost)
    await settled(cluster.bus, "echo")


async def test_a_message_that_comes_again_to_the_worker_that_has_it_starts_no_second_run(cluster: Cluster) -> None:
    await cluster.deploy_echo(slots="8", interval_ms="50", tokens="40")
    publisher = await cluster.publisher()
    call, task = await begun(publisher, "echo", WORDS)
    assert call.accepted is not None
    await cluster.bus.publish(call.accepted.ack_subject, b"-NAK")
    async with asyncio.timeout(60):
        assert await task == whole(WORDS, 40)
    await settled(cluster.bus, "echo")
    assert await outcomes(cluster.bus) == {"done": 1}


async def test_what_is_delivered_again_when_its_publisher_is_gone_is_not_run_for_nobody(cluster: Cluster) -> None:
    workers = await cluster.deploy_echo(workers=2, slots="8", interval_ms="100", tokens="200")
    publisher = await cluster.publisher()
    call, task = await begun(publisher, "echo", WORDS)
    # Both die: as far as the bus knows the request is with a worker until its ack wait is over.
    holder = next(worker for worker in workers if call.reception.run.endswith(worker.id))
    await publisher.bus.close()
    holder.send_signal(signal.SIGKILL)
    async with asyncio.timeout(ACK_WAIT_S + 60):
        while not await outcomes(cluster.bus):
            await asyncio.sleep(0.2)
    assert await outcomes(cluster.bus) == {"waste": 1}
    await settled(cluster.bus, "echo")
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def test_a_message_that_comes_again_before_its_answer_is_kept_stays_until_it_is(cluster: Cluster) -> None:
    (worker,) = await cluster.deploy_echo()
    publisher = await cluster.publisher()
    answers = names.bucket_stream(names.BUCKET_ANSWERS)
    config = (await cluster.bus.js_request(f"STREAM.INFO.{answers}"))["config"]
    # It can be read, and nothing is stored there.
    await cluster.bus.js_request(f"STREAM.UPDATE.{answers}", config | {"subjects": ["elsewhere"]})
    call = await publisher.submit("echo", chat(WORDS), CallOptions(idempotency_key="k", answer_kept_s=3600))
    assert await read(call) == WORDS
    assert call.accepted is not None
    async with asyncio.timeout(60):
        while "waits" not in worker.log():
            await asyncio.sleep(0.1)
        await cluster.bus.publish(call.accepted.ack_subject, b"-NAK")
        consumer = f"{names.STREAM_HI}.{names.consumer_name('echo', 'hi', 0)}"
        while (await cluster.bus.js_request(f"CONSUMER.INFO.{consumer}"))["delivered"]["consumer_seq"] < 2:
            await asyncio.sleep(0.1)
    await asyncio.sleep(1.0)  # what it would say of a message that is done
    assert await running(cluster.bus, "echo") == 1

    # Both die with the answer: another worker gets the message.
    await publisher.bus.close()
    worker.process.kill()
    await declare_bus(cluster.bus)
    cluster.start_worker(echo_deployment())
    async with asyncio.timeout(ACK_WAIT_S + 60):
        while await read_kept(cluster.bus, call.id) is None:
            await asyncio.sleep(0.2)
    await settled(cluster.bus, "echo")


async def test_an_answer_whose_worker_died_before_it_was_billed_is_billed_by_the_next_one(cluster: Cluster) -> None:
    first, second = await cluster.deploy_echo(workers=2)
    publisher = await cluster.publisher()
    config = (await cluster.bus.js_request(f"STREAM.INFO.{names.STREAM_USAGE}"))["config"]
    # It can be read, and nothing is stored there.
    await cluster.bus.js_request(f"STREAM.UPDATE.{names.STREAM_USAGE}", config | {"subjects": ["elsewhere"]})
    calls = [await publisher.submit("echo", chat(f"{WORDS} {n}"), CallOptions(stream=n % 2 > 0)) for n in range(8)]
    assert await asyncio.gather(*map(read, calls)) == [f"{WORDS} {n}" for n in range(8)]
    by_worker = {worker.id: [c for c in calls if c.reception.run.endswith(worker.id)] for worker in (first, second)}
    dies = first if by_worker[first.id] else second
    dies.send_signal(signal.SIGKILL)
    await declare_bus(cluster.bus)
    async with asyncio.timeout(ACK_WAIT_S + 60):
        while (await outcomes(cluster.bus))["done"] < 8:
            await asyncio.sleep(0.2)
    await settled(cluster.bus, "echo")
    events = {event.id: event for event in await usage_events(cluster.bus) if event.outcome == "done"}
    assert {call.id: call.reception.run for call in calls} == {id: event.run for id, event in events.items()}
    tokens = count_tokens(f"{WORDS} 0")
    for event in events.values():
        assert (event.usage.prompt_tokens, event.usage.completion_tokens) == (tokens, tokens)
    assert (await outcomes(cluster.bus)) == {"done": 8, "waste": len(by_worker[dies.id])}


async def test_an_answer_that_was_billed_before_its_worker_died_is_not_billed_again(cluster: Cluster) -> None:
    workers = await cluster.deploy_echo(workers=2, interval_ms="50")
    publisher = await cluster.publisher()
    call = await publisher.submit("echo", chat(WORDS))
    assert await read(call) == WORDS and call.accepted is not None
    await settled(cluster.bus, "echo")
    (event,) = await usage_events(cluster.bus)
    holder = next(worker for worker in workers if call.reception.run.endswith(worker.id))
    holder.send_signal(signal.SIGKILL)
    # As if its acknowledgement had died with a server, and the queue had been told nothing.
    await cluster.bus.js_publish(names.request_subject("echo", "hi"), encode(call.request))
    async with asyncio.timeout(60):
        while (await outcomes(cluster.bus))["waste"] < 1:
            await asyncio.sleep(0.2)
    await settled(cluster.bus, "echo")
    assert [e for e in await usage_events(cluster.bus) if e.outcome == "done"] == [event]
