"""Requests to the echo model whose answers are compared word for word, and how their runs ended."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Collection

from modelbus.testing.echo import echo_answer
from modelbus_broker import names
from modelbus_broker.asking import CallOptions
from modelbus_broker.calls import Call, Restarted
from modelbus_broker.connection import Bus
from modelbus_broker.messages import Chat, ChatMessage, Delta, Sampling, UsageEvent, decode_usage_events
from modelbus_broker.publisher import Publisher
from modelbus_broker.reading import read_stream
from modelbus_broker.topology import queued, running


def chat(text: str) -> Chat:
    return Chat(messages=[ChatMessage(role="user", content=text)])


def whole(text: str, tokens: int) -> str:
    """What an echo deployment with this parameter ``tokens`` says to a text."""
    return echo_answer(text, Sampling(), tokens=tokens).text


async def read(call: Call, first: asyncio.Event | None = None) -> str:
    """The whole answer; ``first`` is set at its first piece."""
    said: list[str] = []
    async for batch in call.batches():
        for frame in batch:
            match frame:
                case Delta():
                    said.append(frame.text)
                    if first is not None:
                        first.set()
                case Restarted():
                    assert not call.request.stream
                    said.clear()
    return "".join(said)


async def begun(publisher: Publisher, model: str, text: str, *, stream: bool = True) -> tuple[Call, asyncio.Task[str]]:
    """A request whose first piece has come, and its answer to be."""
    call = await publisher.submit(model, chat(text), CallOptions(stream=stream))
    first = asyncio.Event()
    task = asyncio.create_task(read(call, first))
    async with asyncio.timeout(60):
        await first.wait()
    return call, task


class Load:
    """Clients that ask without a pause, streams and plain requests in turn; no request may fail."""

    def __init__(self, publisher: Publisher, model: str, answers: Collection[str], clients: int = 8) -> None:
        self.calls: list[Call] = []
        self.answers: Counter[str] = Counter()
        self._publisher, self._model, self._right = publisher, model, answers
        self._stopping = False
        self._clients = [asyncio.create_task(self._client(n)) for n in range(clients)]

    async def _client(self, number: int) -> None:
        turn = number
        while not self._stopping:
            turn += 1
            call = await self._publisher.submit(self._model, chat("go"), CallOptions(stream=turn % 2 > 0))
            self.calls.append(call)
            answer = await read(call)
            assert answer in self._right
            self.answers[answer] += 1

    async def more(self, count: int, answer: str = "") -> None:
        """Until so many more requests were answered, or answered so."""
        goal = self._count(answer) + count
        async with asyncio.timeout(60):
            while self._count(answer) < goal:
                for client in self._clients:
                    if client.done():
                        client.result()
                await asyncio.sleep(0.02)

    def _count(self, answer: str) -> int:
        return self.answers[answer] if answer else self.answers.total()

    async def end(self) -> None:
        """Waits for what still runs; raises what a client has met."""
        self._stopping = True
        async with asyncio.timeout(60):
            await asyncio.gather(*self._clients)


async def settled(bus: Bus, model: str) -> None:
    """Until nothing of the model is left in a queue."""
    async with asyncio.timeout(60):
        while await queued(bus, model) + await running(bus, model):
            await asyncio.sleep(0.05)


async def usage_events(bus: Bus) -> list[UsageEvent]:
    """One for each run that has ended, in the order in which they were booked: of a run with several the last one."""
    found = [message async for message in read_stream(bus, names.STREAM_USAGE, names.USAGE)]
    events = [event for message in found for event in decode_usage_events(message.data)]
    return list({names.run_key(event.id, event.run): event for event in events}.values())


async def outcomes(bus: Bus) -> Counter[str]:
    """How all runs ended, by their usage events."""
    return Counter(event.outcome for event in await usage_events(bus))


async def booked(bus: Bus, count: int) -> Counter[str]:
    """How so many runs ended, once all of them are booked: one that is taken back leaves its queue before that."""
    async with asyncio.timeout(60):
        while (found := await outcomes(bus)).total() < count:
            await asyncio.sleep(0.05)
    return found
