"""What goes wrong, in an order that the seed decides: one loop for each kind of part, all at once."""

from __future__ import annotations

import asyncio
import random
import signal
from collections import Counter
from collections.abc import Awaitable, Callable

import msgspec

from .stage import Stage


class Pace(msgspec.Struct, frozen=True, kw_only=True):
    """Seconds between two troubles of one kind, from and to."""

    workers: tuple[float, float] = (1.0, 4.0)
    freezes: tuple[float, float] = (2.0, 6.0)
    gateways: tuple[float, float] = (3.0, 9.0)
    bus: tuple[float, float] = (5.0, 15.0)  #: counted from when the last one is back and in sync


class Trouble:
    """Kills, freezes and stops parts of the stage, and brings them back.

    Attributes:
        done: how often each thing was done.
    """

    def __init__(self, stage: Stage, seed: int, pace: Pace) -> None:
        self.done: Counter[str] = Counter()
        self._stage = stage
        self._seed = seed
        self._pace = pace
        self._stopping = asyncio.Event()

    async def run(self) -> None:
        """Makes trouble until told to stop; then everything runs again."""
        pace = self._pace
        async with asyncio.TaskGroup() as group:
            group.create_task(self._repeat("worker", pace.workers, self._worker))
            group.create_task(self._repeat("freeze", pace.freezes, self._freeze))
            group.create_task(self._repeat("gateway", pace.gateways, self._gateway))
            group.create_task(self._repeat("bus", pace.bus, self._bus_node))

    def stop(self) -> None:
        """Lets what was begun come to its end, and begins nothing new."""
        self._stopping.set()

    def happened(self, times: int) -> bool:
        """Every kind of part was in trouble at least so often."""
        kinds = Counter(what.split()[0] for what in self.done.elements())
        return all(kinds[kind] >= times for kind in ("worker", "freeze", "gateway", "bus"))

    async def _repeat(
        self, kind: str, pause: tuple[float, float], trouble: Callable[[random.Random], Awaitable[str]]
    ) -> None:
        # Each kind has dice of its own, so that what it does next does not depend on how fast the others are.
        dice = random.Random(f"{self._seed}/{kind}")
        while not await self._stopped_within(dice.uniform(*pause)):
            self.done[f"{kind} {await trouble(dice)}"] += 1

    async def _stopped_within(self, seconds: float) -> bool:
        try:
            async with asyncio.timeout(seconds):
                await self._stopping.wait()
        except TimeoutError:
            return False
        return True

    async def _worker(self, dice: random.Random) -> str:
        worker = dice.choice(self._stage.workers)
        how = dice.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGTERM])
        worker.send_signal(how)
        if how is signal.SIGTERM:
            worker.send_signal(signal.SIGCONT)  # one that stands still would not hear it
        await worker.wait(60)
        await self._stage.replace(worker)
        return how.name

    async def _freeze(self, dice: random.Random) -> str:
        worker = dice.choice(self._stage.workers)
        worker.send_signal(signal.SIGSTOP)
        await asyncio.sleep(dice.choice([0.5, 2.0, 4.0, 12.0]))
        worker.send_signal(signal.SIGCONT)
        return "SIGSTOP, SIGCONT"

    async def _gateway(self, dice: random.Random) -> str:
        gateway = dice.choice(self._stage.gateways)
        how = dice.choice([signal.SIGKILL, signal.SIGTERM])
        gateway.send_signal(how)
        await gateway.ended()
        gateway.start()
        await gateway.ready()
        return how.name

    async def _bus_node(self, dice: random.Random) -> str:
        server = dice.choice(self._stage.nodes.servers)
        how, down_s = dice.choice([signal.SIGKILL, signal.SIGTERM]), dice.uniform(0.2, 4.0)
        if how is signal.SIGKILL:
            server.kill()
        else:
            await server.stop()
        await asyncio.sleep(down_s)
        await server.start()
        await self._stage.nodes.in_sync()
        return how.name
