"""Workers that are killed, frozen or cut off in the middle of streams: every answer is the one of an undisturbed run."""

from __future__ import annotations

import asyncio
import json
import random
import signal
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import msgspec
import pytest
from modelbus.testing.echo import count_tokens
from modelbus_broker import names
from modelbus_broker.asking import CallOptions
from modelbus_broker.calls import Call
from modelbus_broker.connection import Bus, Msg
from modelbus_broker.kept import read_kept
from modelbus_broker.messages import Chat, ChatMessage, Delta, Deployment, Done, Sampling, Usage, decode_frames, encode
from modelbus_broker.publisher import Publisher
from modelbus_broker.server import EmbeddedServer, ServerSettings
from modelbus_broker.settings import BusSettings
from modelbus_broker.topology import declare_bus

from tests.helpers.asking import booked, chat, outcomes, read, settled, usage_events, whole
from tests.helpers.cluster import Cluster, WorkerProcess, echo_deployment
from tests.helpers.faulty_upstream import ANSWER, HALF, Fault, faulty_upstream
from tests.helpers.gateways import Start
from tests.helpers.hosts import until
from tests.helpers.namespaces import Namespace
from tests.helpers.smollm2 import smollm2, smollm2_gguf

SEED = 2_718
TOKENS = 150
PACE: dict[str, Any] = {"tokens": str(TOKENS), "interval_ms": "25"}


class Stream:
    """A client that reads a stream and checks every token's place."""

    def __init__(self, call: Call) -> None:
        self.call = call
        self.text = ""
        self.ids: list[int] = []
        self.finish = ""
        self.usage = Usage()
        self.calls: dict[int, list[str]] = {}  #: of tools: name and arguments
        self.reading = asyncio.create_task(self._read())

    async def _read(self) -> None:
        async for batch in self.call.batches():
            for frame in batch:
                if isinstance(frame, Delta):
                    assert not self.finish, "nothing comes after the finish reason"
                    self.text += frame.text
                    self.ids += frame.token_ids
                    for call in frame.tool_calls:
                        known = self.calls.setdefault(call.index, ["", ""])
                        known[0] += call.name
                        known[1] += call.arguments
                    assert frame.position == len(self.ids), "no token is missing, none comes twice"
                    self.finish = frame.finish_reason
                elif isinstance(frame, Done):
                    self.usage = frame.usage
                else:
                    assert type(frame).__name__ == "Started", "a stream does not begin anew"

    @property
    def worker(self) -> str:
        """Who runs it now, "" if nobody is known to."""
        run = self.call.reception.run
        return names.parse_run(run)[2] if run and not self.call.over else ""

    @property
    def result(self) -> tuple[str, dict[int, list[str]], list[int], str, Usage]:
        return self.text, self.calls, self.ids, self.finish, self.usage


async def tokens_come(streams: list[Stream], count: int) -> None:
    """Until so many tokens have come, over all streams."""
    async with asyncio.timeout(100):
        while sum(len(stream.ids) for stream in streams) < count:
            assert not any(stream.reading.done() and stream.reading.exception() for stream in streams)
            await asyncio.sleep(0.01)


async def all_read(streams: list[Stream]) -> None:
    async with asyncio.timeout(110):
        await asyncio.gather(*(stream.reading for stream in streams))


async def echo_streams(publisher: Publisher, count: int) -> list[Stream]:
    return [Stream(await publisher.submit("echo", chat(f"the {n} th of many 流 streams"))) for n in range(count)]


def check_echo(streams: list[Stream], tokens: int = TOKENS) -> None:
    for number, stream in enumerate(streams):
        said = f"the {number} th of many 流 streams"
        usage = Usage(prompt_tokens=count_tokens(said), completion_tokens=tokens)
        assert (stream.text, len(stream.ids), stream.usage) == (whole(said, tokens), tokens, usage)


def most_busy(workers: list[WorkerProcess], streams: list[Stream]) -> WorkerProcess:
    held = Counter(stream.worker for stream in streams)
    return max(workers, key=lambda worker: held[worker.id])


async def test_killed_workers_streams_go_on_where_they_stopped_also_when_all_slots_are_taken(cluster: Cluster) -> None:
    print(f"seed {SEED}")
    chance = random.Random(SEED)
    workers = await cluster.deploy_echo(workers=4, slots="6", **PACE)
    publisher = await cluster.publisher()
    streams = await echo_streams(publisher, 36)  # 24 run, 12 wait
    plain = [asyncio.create_task(_plain(publisher, n)) for n in range(6)]
    for _ in range(2):
        await tokens_come(streams, sum(len(s.ids) for s in streams) + chance.randrange(100, 500))
        victim = most_busy(workers, streams)
        assert sum(stream.worker == victim.id for stream in streams) > 0
        victim.send_signal(signal.SIGKILL)
        workers.remove(victim)
    await all_read(streams)

    check_echo(streams)
    assert await asyncio.gather(*plain) == [whole(f"plain {n}", TOKENS) for n in range(6)]
    attempts = Counter(stream.call.attempt.attempt for stream in streams)
    print(dict(attempts))
    assert attempts[2] > 0
    assert all(stream.call.attempt.crashes == stream.call.attempt.attempt - 1 for stream in streams)
    await settled(cluster.bus, "echo")
    await booked(cluster.bus, 42)
    assert await outcomes(cluster.bus) == {"done": 42}  # each answer is billed once


async def _plain(publisher: Publisher, number: int) -> str:
    return await read(await publisher.submit("echo", chat(f"plain {number}"), CallOptions(stream=False)))


@pytest.mark.parametrize("wakes", ["in the middle", "after the end"])
async def test_a_frozen_worker_that_wakes_up_harms_no_stream_and_its_work_is_waste(
    cluster: Cluster, wakes: str
) -> None:
    print(f"seed {SEED}")
    chance = random.Random(SEED)
    tokens = 600 if wakes == "in the middle" else TOKENS  # none shall have ended by then
    first, second = await cluster.deploy_echo(workers=2, slots="32", **PACE | {"tokens": str(tokens)})
    await cluster.all_pull("echo", 2)
    publisher = await cluster.publisher()
    streams = await echo_streams(publisher, 24)
    await tokens_come(streams, chance.randrange(100, 600))
    first.send_signal(signal.SIGSTOP)
    if wakes == "in the middle":
        async with asyncio.timeout(60):
            while any(stream.worker in ("", first.id) for stream in streams if not stream.call.over):
                await asyncio.sleep(0.01)
        assert not any(stream.reading.done() for stream in streams)
        first.send_signal(signal.SIGCONT)
    await all_read(streams)
    check_echo(streams, tokens)
    first.send_signal(signal.SIGCONT)

    lost = [stream.call for stream in streams if stream.call.attempt.attempt == 2]
    assert 0 < len(lost) < 24
    await booked(cluster.bus, 24 + len(lost))
    await settled(cluster.bus, "echo")
    events = await usage_events(cluster.bus)
    assert Counter(event.outcome for event in events) == {"done": 24, "waste": len(lost)}
    assert {event.id for event in events if event.outcome == "waste"} == {call.id for call in lost}
    assert {names.parse_run(event.run)[2] for event in events if event.outcome == "waste"} == {first.id}
    # It serves on.
    second.send_signal(signal.SIGKILL)
    await second.wait()
    assert await read(await publisher.submit("echo", chat("hello there"))) == whole("hello there", tokens)


@pytest.fixture
async def far(namespace: Namespace, tmp_path: Path) -> AsyncIterator[Cluster]:
    """A bus that the second host reaches."""
    async with (
        EmbeddedServer(ServerSettings(store=tmp_path / "nats", host=namespace.host)) as server,
        await Bus.connect(BusSettings(url=server.url), name="test") as bus,
    ):
        await declare_bus(bus)
        cluster = Cluster(bus=bus, server=server, folder=tmp_path)
        yield cluster
        await cluster.close()


async def test_streams_of_a_host_that_is_cut_off_go_on_and_what_it_did_alone_is_waste(
    far: Cluster, namespace: Namespace
) -> None:
    print(f"seed {SEED}")
    chance = random.Random(SEED)
    deployment = echo_deployment(workers=2, slots="32", **PACE)
    await far.declare(deployment)
    near = far.start_worker(deployment)
    there = far.start_worker(deployment, replica=1, prefix=namespace.prefix)
    await far.wait_ready("echo", 2)
    await far.all_pull("echo", 2)
    publisher = await far.publisher()
    streams = await echo_streams(publisher, 24)
    await tokens_come(streams, chance.randrange(100, 600))
    namespace.cut()
    await all_read(streams)
    check_echo(streams)
    lost = [stream.call for stream in streams if stream.call.attempt.attempt == 2]
    assert 0 < len(lost) < 24
    namespace.mend()

    await booked(far.bus, 24 + len(lost))
    await settled(far.bus, "echo")
    events = await usage_events(far.bus)
    assert Counter(event.outcome for event in events) == {"done": 24, "waste": len(lost)}
    assert {names.parse_run(event.run)[2] for event in events if event.outcome == "waste"} == {there.id}
    near.send_signal(signal.SIGKILL)
    await near.wait()
    # The one that was cut off serves on.
    assert await read(await publisher.submit("echo", chat("hello there"))) == whole("hello there", TOKENS)


#: The last one's answer has characters of several tokens, which a cut may halve.
TASKS = [
    Chat(messages=[ChatMessage(role="user", content=text)], sampling=sampling)
    for text, sampling in (
        ("What is the capital of France?", Sampling(max_tokens=40, ignore_eos=True)),
        ("Count from one to twenty in words.", Sampling(max_tokens=60, stop=["ten,", "\n\n\n"])),
        ("Write one sentence about the sea.", Sampling(max_tokens=40, ignore_eos=True, frequency_penalty=0.4)),
        ("Repeat exactly: 🦙🎉 日本語 é", Sampling(max_tokens=40, ignore_eos=True)),
    )
]
WEATHER = {
    "type": "object", "properties": {"city": {"type": "string", "maxLength": 20}, "native": {"const": "東京 🗼"}},
    "required": ["city", "native"], "additionalProperties": False,
}  # fmt: skip
TASKS += [
    Chat(
        messages=[ChatMessage(role="user", content="Describe the city of Tokyo.")], sampling=Sampling(max_tokens=60),
        response_format={"type": "json_schema", "json_schema": {"name": "city", "schema": WEATHER}},
    ),
    Chat(
        messages=[ChatMessage(role="user", content="What is the weather in Tokyo?")], sampling=Sampling(max_tokens=80),
        tools=[{"type": "function", "function": {"name": "get_weather", "parameters": WEATHER}}],
        tool_choice="required", parallel_tool_calls=False,
    ),
]  # fmt: skip


@pytest.fixture
def real_model(request: pytest.FixtureRequest) -> Deployment:
    """Made before a test's bus starts, as its weights may take longer than a connection may be silent."""
    engine: str = request.param
    if engine == "transformers":
        pytest.importorskip("torch")
        pytest.importorskip("transformers")
        path, params = smollm2(), {"dtype": "float32", "num_threads": "1"}
    else:
        pytest.importorskip("llama_cpp", reason="there is no llama-cpp-python: make llama-cpp-setup")
        path, params = smollm2_gguf(), {"n_ctx": "1024", "n_threads": "1"}
    return Deployment(
        name="chat", model="chat", engine=engine, revision="1", model_path=str(path), replicas=3, slots=3,
        engine_params=params,
    )  # fmt: skip


@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("real_model", "how"),
    [("transformers", signal.SIGKILL), ("transformers", signal.SIGSTOP), ("llama_cpp", signal.SIGKILL)],
    ids=["transformers killed", "transformers frozen", "llama_cpp killed"],
    indirect=["real_model"],
)
async def test_a_real_model_goes_on_token_for_token(
    real_model: Deployment, cluster: Cluster, how: signal.Signals
) -> None:
    print(f"seed {SEED}")
    chance, deployment = random.Random(SEED + how), real_model
    await cluster.declare(deployment)
    workers = [cluster.start_worker(deployment, replica=n) for n in range(2)]
    await cluster.wait_ready("chat", 2, timeout_s=120)
    publisher = await cluster.publisher()
    undisturbed = [Stream(await publisher.submit("chat", task)) for task in TASKS]
    await all_read(undisturbed)
    described, called = undisturbed[-2:]
    assert msgspec.json.decode(described.text)["native"] == "東京 🗼"
    assert (called.calls[0][0], msgspec.json.decode(called.calls[0][1])["native"]) == ("get_weather", "東京 🗼")

    streams = [Stream(await publisher.submit("chat", task)) for task in TASKS]  # all slots are taken
    spare = cluster.start_worker(deployment, replica=2)
    await tokens_come(streams, chance.randrange(12, 90))
    victim = most_busy(workers, streams)
    victim.send_signal(how)
    await all_read(streams)

    assert [stream.result for stream in streams] == [stream.result for stream in undisturbed]
    assert any(stream.call.attempt.attempt == 2 and stream.call.attempt.output_token_ids for stream in streams)
    if how == signal.SIGSTOP:
        victim.send_signal(signal.SIGCONT)
    assert spare.process.poll() is None
    await settled(cluster.bus, "chat")


async def saas(cluster: Cluster, upstream: str) -> list[WorkerProcess]:
    params = {"base_url": upstream, "model": "m", "max_retries": "1"}
    deployment = Deployment(
        name="saas", model="saas", engine="openai", revision="1", engine_params=params, replicas=2, slots=4,
        pretrained_model_type="saas/openai_compatible",
    )  # fmt: skip
    await cluster.declare(deployment)
    workers = [cluster.start_worker(deployment, replica=n) for n in range(2)]
    await cluster.wait_ready("saas", 2)
    return workers


@pytest.mark.parametrize(
    ("fault", "stream", "rescued"),
    [("silent mid-stream", True, False), ("silent mid-stream", False, True), ("slow first byte", True, True)],
    ids=["shown", "not shown", "nothing yet"],
)
async def test_what_cannot_be_gone_on_with_begins_anew_unseen_or_ends_with_an_error(
    cluster: Cluster, start: Start, fault: Fault, stream: bool, rescued: bool
) -> None:
    async with faulty_upstream() as upstream, aiohttp.ClientSession() as http:
        workers = await saas(cluster, upstream.url)
        gateway = start("--address", cluster.server.url)
        await gateway.ready()
        publisher = await cluster.publisher()
        await upstream.breaks(fault)
        body = {"model": "saas", "stream": stream, "messages": [{"role": "user", "content": "hi"}]}
        asking = asyncio.create_task(http.post(f"{gateway.url}/v1/chat/completions", json=body).__aenter__())
        if stream and not rescued:
            response = await asking
            seen = b""
            while HALF.encode() not in _text(seen).encode():
                seen += await response.content.readany()
        await until(lambda: upstream.asked and _busy(publisher), "a worker has it", 60)
        if fault == "silent mid-stream" and rescued:
            await asyncio.sleep(0.5)  # the half has come to the gateway, most likely; either way is right
        await upstream.breaks("none")  # for whoever asks again
        (victim,) = [worker for worker in workers if worker.id in _busy(publisher)]
        victim.send_signal(signal.SIGKILL)

        response = await asking
        data = await response.read()
        if not rescued:
            text = (seen + data).decode()
            assert _text(seen + data) == HALF
            assert "[DONE]" not in text
            assert json.loads(text.rstrip().rpartition("data: ")[2])["error"]["code"] == "worker_lost"
        elif stream:
            assert _text(data) == ANSWER
            assert data.decode().rstrip().endswith("data: [DONE]")
        else:
            (choice,) = json.loads(data)["choices"]
            assert (choice["message"]["content"], choice["finish_reason"]) == (ANSWER, "stop")
    await settled(cluster.bus, "saas")


def _busy(publisher: Publisher) -> list[str]:
    return [worker.id for worker in publisher.registry.workers_of("saas") if worker.busy]


def _text(events: bytes) -> str:
    """The text of the whole events that have come."""
    text = ""
    for event in events.decode(errors="ignore").split("\n\n")[:-1]:
        data = event.rpartition("data: ")[2]
        if data.startswith("{"):
            for choice in msgspec.json.decode(data).get("choices", ()):
                text += choice["delta"].get("content") or ""
    return text


async def test_an_answer_that_its_worker_kept_before_it_died_is_not_made_again(cluster: Cluster) -> None:
    [worker] = await cluster.deploy_echo()
    publisher = await cluster.publisher()
    hears = publisher._on_frames

    def first_only(msg: Msg) -> None:
        frames = [frame for frame in decode_frames(msg.data) if frame.seq == 0]
        hears(Msg(msg.subject, msg.reply, encode(frames)))

    frames, *_ = publisher._subscriptions
    await frames.unsubscribe()
    publisher._subscriptions[0] = await publisher.bus.subscribe(names.response_subject(publisher.id, "*"), first_only)
    options = CallOptions(answer_kept_s=600)
    async with asyncio.timeout(60):
        call = await publisher.submit("echo", chat("kept and not heard"), options)
        while await read_kept(cluster.bus, call.id) is None:
            await asyncio.sleep(0.02)
        worker.send_signal(signal.SIGKILL)
        await worker.wait()
        cluster.start_worker(worker.deployment)
        assert await read(call) == whole("kept and not heard", 0)
    await settled(cluster.bus, "echo")
    # Nothing of another attempt; of the first neither, where its worker died before it could book it.
    assert {names.parse_run(event.run)[0] for event in await usage_events(cluster.bus)} <= {1}
