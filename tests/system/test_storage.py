"""`modelbus storage`, with real processes: a bus, a node and a search service, embedded and on Elasticsearch."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import modelbus as sdk
import psutil
import pytest
from modelbus_broker.names import random_token

from tests.helpers.command_line import modelbus, modelbus_ok, processes_of
from tests.helpers.link import Link
from tests.helpers.search import needs_elasticsearch

TEXTS: list[dict[str, Any]] = [
    {"id": "bus", "text": "The bus stores requests"},
    {"id": "zh", "text": "部署一个大模型", "vector": [1, 0]},
]


@pytest.fixture
def head(isolated_home: Path) -> Iterator[Path]:
    modelbus_ok("start", "--head")
    yield isolated_home
    sdk.disconnect()
    modelbus("stop")
    assert processes_of(isolated_home) == []


def worker_pids() -> list[int]:
    return [worker["pid"] for worker in modelbus_ok("storage", "status").json()["workers"]]


def test_a_search_service_starts_is_killed_copied_and_stopped(head: Path, tmp_path: Path) -> None:
    missing = modelbus("storage", "status")
    assert missing.code == 4 and "`modelbus storage start` starts one" in missing.err

    started = modelbus_ok("storage", "start").json()
    folder = head / "storage" / "storage"
    assert (started["model"], started["engine"], started["workers"]) == ("storage", "search", 1)
    assert (folder / "lock").exists()
    store = sdk.Store("notes")
    store.upsert(TEXTS)

    # Killed, the node starts it again; what is asked meanwhile waits.
    (pid,) = worker_pids()
    psutil.Process(pid).send_signal(signal.SIGKILL)
    assert [hit.chunk.id for hit in store.search("部署模型").hits] == ["zh"]
    assert set(worker_pids()) - {pid}  # the record of a worker that was killed lives for some seconds

    status = modelbus_ok("storage", "status").json()
    assert [(s["record"]["name"], s["chunks"], s["vectors"]) for s in status["stores"]] == [("notes", 2, 1)]
    file = tmp_path / "notes.jsonl"
    assert modelbus_ok("storage", "export", "notes", "--file", str(file)).json()["chunks"] == 2
    again = modelbus("storage", "restore", "--file", str(file))
    assert again.code == 1 and "--replace" in again.err
    assert modelbus_ok("storage", "restore", "--file", str(file), "--store", "copy").json()["chunks"] == 2
    assert sdk.Store("copy").search(vector=[1, 0]).hits[0].chunk.id == "zh"
    assert modelbus_ok("storage", "drop", "copy", "--yes").json()["chunks"] == 2
    assert modelbus("storage", "drop", "copy", "--yes").code == 4

    # A second service cannot have the same folder; the first serves on.
    second = modelbus("storage", "start", "--service", "other", "--folder", str(folder))
    assert second.code == 1 and "an embedded store has one owner" in second.err
    assert "storage" in modelbus_ok("models").out
    # Changed while it runs, stopped, started: the stores stay.
    assert modelbus_ok("storage", "start", "--worker-concurrency", "4").json()["replaced"]
    assert len(store.search("bus").hits) == 1
    modelbus_ok("storage", "stop")
    assert modelbus("storage", "status").code == 4
    modelbus_ok("storage", "start")
    assert len(store.search("bus").hits) == 1


def test_what_cannot_be_meant_is_refused_with_what_to_do(head: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for flags, code, words in (
        (["--num-workers", "2"], 2, "--engine elasticsearch has many"),
        (["--engine", "elasticsearch"], 2, "needs --url"),
        (["--url", "http://127.0.0.1:1"], 2, "belongs to --engine elasticsearch"),
        (["--engine", "elasticsearch", "--url", "x", "--folder", "y"], 2, "belongs to --engine embedded"),
        (["--folder", str(tmp_path / "file")], 2, "cannot be made"),
        (["--infer_params", "speed=1"], 1, "has no parameter speed; known are: "),
        (
            ["--engine", "elasticsearch", "--url", "http://127.0.0.1:9", "--infer_params", "outage_s=0.1"], 1,
            "Elasticsearch at http://127.0.0.1:9 does not answer",
        ),
    ):  # fmt: skip
        ran = modelbus("storage", "start", *flags)
        assert (ran.code, words in ran.err) == (code, True), (flags, ran)
    assert modelbus_ok("models").json() == []


@needs_elasticsearch
@pytest.mark.timeout(300)
async def test_workers_share_the_stores_of_an_elasticsearch_and_wait_for_one_that_is_down(head: Path) -> None:
    """Each start of the service is tried for a second only, so that the test need not wait for half a minute."""
    async with Link(urlsplit(os.environ["MODELBUS_TEST_ES"]).port or 9200) as link:
        url = link.url.replace("nats:", "http:")
        start = [
            "start",
            "--engine",
            "elasticsearch",
            "--url",
            url,
            "--num-workers",
            "2",
            "--infer_params",
            "outage_s=1",
        ]
        await asyncio.to_thread(modelbus_ok, "storage", *start, f"prefix=t{random_token(8)}", "refresh=50ms")
        store = sdk.Store("notes")
        await asyncio.to_thread(two_workers_share_the_load, store)

        # All of it stops; the cluster is down when it starts again.
        await link.cut()
        sdk.disconnect()
        await asyncio.to_thread(modelbus_ok, "stop")
        await asyncio.to_thread(modelbus_ok, "start", "--head")
        for _ in range(100):
            status = await asyncio.to_thread(modelbus, "storage", "status")
            if "tried again" in status.err:
                break
        assert (status.code, status.json()["stores"]) == (1, [])
        assert f"cannot start: Elasticsearch at {url} does not answer" in status.err
        assert status.json()["failures"][0]["again_ms"]
        waiting = asyncio.create_task(asyncio.to_thread(store.search, "部署模型"))
        await link.mend()
        assert [hit.chunk.id for hit in (await waiting).hits] == ["zh"]
        for _ in range(100):
            served = await asyncio.to_thread(lambda: modelbus("storage", "status").json())
            if not served["failures"] and len(served["workers"]) == 2:
                break
        assert [item["chunks"] for item in served["stores"]] == [502] and not served["failures"]
        assert await asyncio.to_thread(store.drop) == 502


def two_workers_share_the_load(store: sdk.Store) -> None:
    store.upsert([*TEXTS, *({"text": f"filler {n}", "vector": [n / 500, 1]} for n in range(500))])
    workers = modelbus_ok("storage", "status").json()["workers"]
    assert len(workers) == 2
    psutil.Process(workers[0]["pid"]).send_signal(signal.SIGKILL)
    for _ in range(20):
        assert store.search("部署模型", vector=[1, 0]).hits[0].chunk.id == "zh"
    assert (store.status().engine, store.status().chunks) == ("elasticsearch", 502)
