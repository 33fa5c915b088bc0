"""`make chaos`: many requests through three gateways and four workers on three bus nodes, while all of them are killed.

    python -m tests.system.chaos.run [--requests N] [--seed N] [--clients N]

Every question must be answered exactly once, with the right text and the right bill, and nothing may be left behind.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import sys
import time
from collections import Counter
from pathlib import Path

import msgspec

from tests.helpers.audit import audit
from tests.helpers.http_asking import Clients

from .stage import MODEL, Stage
from .trouble import Pace, Trouble

ROOT = Path(__file__).resolve().parents[3]


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """What came of a run."""

    seed: int
    answered: int
    streams: int
    seconds: float
    trouble: Counter[str]
    again: Counter[str]
    outcomes: Counter[str]
    unbilled: int
    replaced: int
    failures: list[str]

    def table(self) -> str:
        """The counts, one a line, and the seed."""
        rows: list[tuple[str, object]] = [
            ("seed", self.seed),
            ("questions answered", self.answered),
            ("... as streams", self.streams),
            ("seconds", f"{self.seconds:.0f}"),
            *((f"trouble: {what}", count) for what, count in sorted(self.trouble.items())),
            *((f"asked again: {why}", count) for why, count in sorted(self.again.items())),
            *((f"runs: {outcome}", count) for outcome, count in sorted(self.outcomes.items())),
            ("answered, worker and gateway killed before it was billed", self.unbilled),
            ("answered, and billed by the last of several runs", self.replaced),
            ("failures", len(self.failures)),
        ]
        width = max(len(name) for name, _ in rows)
        return "\n".join(f"{name.ljust(width)}  {value}" for name, value in rows)


async def chaos(
    folder: Path, *, requests: int, seed: int, clients: int = 32, pace: Pace | None = None, least: int = 1
) -> Report:
    """Runs it once. At least so many requests are made, and more until each kind of part was in trouble ``least`` times."""
    began = time.monotonic()
    async with Stage(folder) as stage:
        trouble = Trouble(stage, seed, pace or Pace())
        asking = Clients(
            [gateway.url for gateway in stage.gateways], seed=seed, count=requests, clients=clients,
            go_on=lambda: not trouble.happened(least),
        )  # fmt: skip
        async with asyncio.TaskGroup() as group:
            making = group.create_task(trouble.run())
            await asking.run()
            trouble.stop()
            await making
        answered = [answer.id for answer in asking.answers.values()]
        failures = list(asking.failures)
        failures += [f"the id {id} stands for {count} answers" for id, count in Counter(answered).items() if count > 1]
        books = await audit(stage.bus, MODEL, answered)
        # The answer goes out before its bill is stored, which takes its time while a leader is chosen. Another worker
        # stores the bill of one that is killed in between, if the gateway still lives: a few for each kill, and not more.
        if books.unbilled > 4 * trouble.done["worker SIGKILL"]:
            failures.append(f"{books.unbilled} answers were never billed")
    return Report(
        seed=seed, answered=len(answered), streams=asking.streams, seconds=time.monotonic() - began,
        trouble=trouble.done, again=asking.again, outcomes=books.outcomes, unbilled=books.unbilled,
        replaced=books.replaced, failures=failures + books.failures,
    )  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(prog="make chaos", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--requests", type=int, default=10_000, help="(default: 10000)")
    parser.add_argument("--seed", type=int, default=None, help="repeat a run; the default is a new one")
    parser.add_argument("--clients", type=int, default=32, help="that ask at the same time (default: 32)")
    given = parser.parse_args()
    seed = random.randrange(1 << 32) if given.seed is None else given.seed
    folder = ROOT / ".cache" / "chaos" / f"{time.strftime('%Y%m%d-%H%M%S')}-{seed}"
    folder.mkdir(parents=True)
    print(f"seed {seed}; logs in {folder.relative_to(ROOT)}", flush=True)
    report = asyncio.run(chaos(folder, requests=given.requests, seed=seed, clients=given.clients))
    print(report.table())
    for failure in report.failures:
        print(f"FAILED: {failure}")
    return 1 if report.failures else 0


if __name__ == "__main__":
    sys.exit(main())
