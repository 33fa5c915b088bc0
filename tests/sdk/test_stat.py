from __future__ import annotations

import json
import re
from typing import Any

import msgspec
from modelbus.stat import model_info, model_stat
from modelbus_broker.messages import Capabilities, Deployment, WorkerRecord

#: The keys of the seed's output, in its order.
SEED_KEYS = [
    "total_workers", "busy_workers", "idle_workers", "load_balance_strategy", "total_requests", "state",
    "worker_max_concurrency", "workers_last_work_time",
]  # fmt: skip


def worker(replica: int, **fields: Any) -> WorkerRecord:
    given = {"state": "ok", "slots": 1, **fields}
    return WorkerRecord(
        id=f"w{replica}",
        model="chat",
        deployment="chat",
        revision="r",
        replica=replica,
        node="n",
        engine="echo",
        **given,
    )


def test_the_stat_has_the_fields_of_the_seed_in_its_order_and_types() -> None:
    workers = [worker(1, total_requests=33, last_work_ms=1_000), worker(0, total_requests=32, last_work_ms=2_000)]

    stat = json.loads(msgspec.json.encode(model_stat(workers, now_ms=632_700)))

    assert list(stat) == SEED_KEYS
    assert stat == {
        "total_workers": 2, "busy_workers": 0, "idle_workers": 2, "load_balance_strategy": "lru",
        "total_requests": [32, 33], "state": [1, 1], "worker_max_concurrency": 1,
        "workers_last_work_time": ["630.700s", "631.700s"],
    }  # fmt: skip
    assert all(re.fullmatch(r"\d+\.\d+s", text) for text in stat["workers_last_work_time"])


def test_free_slots_are_what_is_left_of_each_worker() -> None:
    stat = model_stat([worker(0, slots=4, busy=3), worker(1, slots=4)], now_ms=0)

    assert (stat.state, stat.busy_workers, stat.idle_workers) == ([1, 4], 1, 1)
    assert stat.worker_max_concurrency == 4


def test_a_worker_that_never_worked_counts_from_its_start() -> None:
    assert model_stat([worker(0, started_ms=1_000)], now_ms=3_500).workers_last_work_time == ["2.500s"]


def test_workers_that_are_not_ready_are_not_counted() -> None:
    assert model_stat([worker(0, state="starting"), worker(1, state="draining")], now_ms=0).total_workers == 0


def test_a_model_without_workers_is_listed_with_what_is_wanted() -> None:
    info = model_info("chat", [Deployment(name="chat", model="chat", engine="echo", revision="r", replicas=3)], [])

    assert (info.workers, info.wanted, info.engine, info.tasks) == (0, 3, "echo", [])


def test_the_shortest_context_of_the_workers_is_the_model_s() -> None:
    workers = [worker(n, capabilities=Capabilities(tasks=["chat"], context_length=c)) for n, c in enumerate((0, 8, 4))]

    info = model_info("chat", [], workers)

    assert (info.context_length, info.tasks, info.workers) == (4, ["chat"], 3)
