"""Jobs and batches as their users see them: errors, times, progress, what is listed."""

from __future__ import annotations

import asyncio

import modelbus
import pytest
from modelbus.errors import (
    AnswerNotKept,
    DeadlineExceeded,
    EngineFailed,
    InvalidRequest,
    ModelNotFound,
    NotFound,
    QueueFull,
)
from modelbus.jobs.batch import in_order, row_id
from modelbus_broker import dead, names
from modelbus_broker.asking import CallOptions
from modelbus_broker.buckets import Bucket
from modelbus_workers.detached import TRIES, again_s

from tests.helpers.cluster import Cluster, echo_deployment
from tests.helpers.command_line import modelbus as command
from tests.helpers.command_line import modelbus_ok
from tests.helpers.doc_blocks import DOCS, run_page


async def test_errors_times_and_lists_of_jobs(cluster: Cluster) -> None:
    await cluster.deploy_echo("flaky", fail="first:1", fail_code="upstream_failed", fail_text="come back later")
    await cluster.deploy_echo("broken", fail="always", fail_text="no such head: 7")
    await cluster.declare(echo_deployment("nobody"))
    url = cluster.server.url
    async with modelbus.connect(url) as client:
        # What may succeed later is tried again; nobody has to be there for it.
        flaky = await client.submit("flaky", "hello", name="greeting", labels={"version": "v1"}, kept_s=3600)
        broken = await client.submit("broken", "hello")
        late = await client.submit("nobody", "hello", options=CallOptions(budget_ms=1000))
        assert (await flaky.result(60)).text == "hello"
        # The engine's own words, as an error of its own class; the letter is with the dead.
        with pytest.raises(EngineFailed, match="no such head: 7"):
            await broken.result(60)
        assert (await dead.find_letter(cluster.bus, broken.id)).letter.reason == "engine_failed"

        status = await flaky.status()
        assert (status.state, status.name, status.labels, status.kept_s) == (
            "done",
            "greeting",
            {"version": "v1"},
            3600,
        )
        assert status.submitted_ms < status.ended_ms
        status = await broken.status()
        assert (status.state, status.code, status.message) == (
            "failed",
            "engine_failed",
            "no such head: 7",
        )

        listed = await client.find_jobs()
        assert [job.id for job in listed] == [late.id, broken.id, flaky.id]
        assert [job.id for job in await client.find_jobs(model="flaky")] == [flaky.id]

        # Nobody serves it: when its time is up it has failed, and it says so without a worker.
        with pytest.raises(TimeoutError):
            await late.result(0.05)
        cluster.start_worker(echo_deployment("nobody"))
        with pytest.raises(DeadlineExceeded, match="over before a worker was free"):
            await late.result(60)

        # The same on the command line.
        shown = await asyncio.to_thread(modelbus_ok, "jobs", "show", flaky.id, "--address", url)
        assert (shown.json()["state"], shown.json()["answer"]["choices"][0]["text"]) == ("done", "hello")
        table = await asyncio.to_thread(modelbus_ok, "jobs", "list", "--address", url, "--limit", "2")
        assert [row["id"] for row in table.json()] == [late.id, broken.id]
        ran = await asyncio.to_thread(command, "jobs", "cancel", flaky.id, "--address", url)
        assert (ran.code, ran.json()[0]["state"]) == (1, "done")
        ran = await asyncio.to_thread(command, "jobs", "show", "jabc-0-def", "--address", url)
        assert ran.code == 4 and "there is no job" in ran.err

        # Its answer is gone after its time.
        answers = Bucket(cluster.bus, names.BUCKET_ANSWERS)
        await answers.delete(flaky.id)
        with pytest.raises(AnswerNotKept, match="3600 s"):
            await flaky.result(60)
        assert (await flaky.status()).state == "gone"

        with pytest.raises(NotFound, match="modelbus jobs list"):
            await client.job("jabc-0-def").status()
        with pytest.raises(InvalidRequest, match="not the id of a job"):
            await client.job("what").result()
        with pytest.raises(InvalidRequest, match="60 s to 30 days"):
            await client.submit("flaky", "hello", kept_s=5)
        with pytest.raises(InvalidRequest, match="budget_ms of a job"):
            await client.submit("flaky", "hello", options=CallOptions(budget_ms=25 * 3600 * 1000))
        with pytest.raises(ModelNotFound):
            await client.submit("unknown", "hello")


async def test_rows_keep_their_order_and_their_errors(cluster: Cluster) -> None:
    deployment = echo_deployment("echo", slots="2", crash_on="never said", fail="first:1", fail_text="bad luck")
    await cluster.declare(deployment)
    cluster.start_worker(deployment)
    await cluster.wait_ready("echo", 1)
    rows = [f"row {n}" for n in range(6)]
    async with modelbus.connect(cluster.server.url) as client:
        batch = await client.batch("echo", rows, name="once", temperature=0)
        found = await batch.results()
        failed = [row.index for row in found if row.error is not None]
        assert len(failed) == 1 and isinstance(found[failed[0]].error, EngineFailed)
        assert [row.get().text for row in found if row.error is None] == [
            row for n, row in enumerate(rows) if n not in failed
        ]
        with pytest.raises(EngineFailed, match="bad luck"):
            found[failed[0]].get()
        # The same name again: only what failed, and what has changed, is asked.
        changed = [*rows[:5], "another row"]
        again = await client.batch("echo", changed, name="once", temperature=0)
        assert [row.get().text for row in await again.results()] == changed
        assert sum(a == b for a, b in zip(batch.ids, again.ids, strict=True)) == (5 if failed == [5] else 4)
        assert [job.index for job in await again.status()] == list(range(6))

        with pytest.raises(NotFound, match="no batch 'twice'"):
            await client.open_batch("twice")
        with pytest.raises(InvalidRequest, match="at least one row"):
            await client.batch("echo", [])
        with pytest.raises(InvalidRequest, match="concurrency"):
            await client.map("echo", rows, concurrency=0)


async def test_the_page_on_jobs_is_right_and_plain_programs_have_jobs_too(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    await cluster.deploy_echo("chat")
    monkeypatch.setenv("MODELBUS_ADDRESS", cluster.server.url)
    await asyncio.to_thread(run_page, DOCS / "jobs.md")

    def plain() -> tuple[str, str, list[str]]:
        try:
            llm = modelbus.LLM("chat")
            job_id = llm.submit("one two three", llm_config={"max_tokens": 2}).id
            job = modelbus.job(job_id)
            rows = llm.map(["a", "b"], concurrency=1)
            return job.result(60).text, job.status().state, [row.get().text for row in rows]
        finally:
            modelbus.disconnect()

    assert await asyncio.to_thread(plain) == ("one two", "done", ["a", "b"])


async def test_coroutines_run_side_by_side_and_come_out_in_order() -> None:
    running = most = 0

    async def one(n: int) -> int:
        nonlocal running, most
        running += 1
        most = max(most, running)
        for _ in range((n * 7) % 5):
            await asyncio.sleep(0)
        running -= 1
        return n

    assert [n async for n in in_order((one(n) for n in range(50)), 4)] == list(range(50))
    assert 1 < most <= 4

    async def fails() -> int:
        raise QueueFull("full")

    with pytest.raises(QueueFull):
        [n async for n in in_order(iter([one(1), fails(), one(2)]), 2)]


def test_the_same_row_has_the_same_id_and_a_changed_one_another() -> None:
    ids = {row_id("", "b", 0, "x"), row_id("t", "b", 0, "x"), row_id("", "b", 1, "x"), row_id("", "b", 0, "y")}
    assert len(ids | {row_id("", "b", 0, "x", 1), row_id("", "c", 0, "x")}) == 6
    assert row_id("", "b", 0, "x") == row_id("", "b", 0, "x")
    assert names.publisher_of(row_id("", "b", 0, "x")).startswith("j")


@pytest.mark.parametrize(
    ("delivery", "left_s", "asked_s", "expected"),
    [
        (1, 600.0, 0.0, 1.0),
        (4, 600.0, 0.0, 8.0),
        (11, 6000.0, 0.0, 300.0),
        (1, 600.0, 20.0, 20.0),
        (1, 6000.0, 4000.0, 300.0),
        (1, 1.5, 0.0, None),
        (TRIES, 6000.0, 0.0, None),
    ],
)
def test_when_a_job_is_tried_again(delivery: int, left_s: float, asked_s: float, expected: float | None) -> None:
    assert again_s(delivery=delivery, left_s=left_s, retry_after_s=asked_s) == expected
