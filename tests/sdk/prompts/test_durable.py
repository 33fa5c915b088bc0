"""Prompt functions as jobs, on a real bus."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass

import modelbus
import pytest
from modelbus.errors import InvalidRequest, PromptError
from modelbus.testing import ScriptedModel
from modelbus_broker.messages import Deployment

from tests.helpers.cluster import echo_deployment
from tests.helpers.prompting import shared_bus


@dataclass(frozen=True)
class Point:
    x: int
    y: int


@modelbus.prompt(llm="chat")
def say(text: str, more: str = "") -> str:
    """{{ text }}{{ more }}"""


@modelbus.prompt(llm="typed")
def point(name: str) -> Point:
    """{{ name }}"""


@modelbus.prompt(llm="typed")
async def point_async(name: str) -> Point:
    """{{ name }}"""


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    typed = Deployment(name="typed", model="typed", engine="scripted", revision="1")
    deployments = {"chat": echo_deployment("chat"), "typed": typed}
    with shared_bus(tmp_path_factory.mktemp("bus"), deployments) as url:
        yield url


def test_a_call_is_submitted_and_its_value_is_had_by_id_from_another_program(connected: None, url: str) -> None:
    job = point.submit("p")
    assert isinstance(job.result(60), Point)
    assert (job.status().name, job.status().labels["prompt"]) == ("point", point._declaration.name)

    program = "import modelbus, sys; print(modelbus.job(sys.argv[1]).result(60).text)"
    done = subprocess.run(
        [sys.executable, "-c", program, say.submit("one two").id],
        env={"MODELBUS_ADDRESS": url, "MODELBUS_HOME": "/nowhere", "PATH": ""},
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.stdout.strip() == "one two", done.stderr
    assert point.job(job.id).result(60) == job.result(60)


def test_rows_are_asked_as_a_batch_and_taken_up_again_under_its_name(connected: None) -> None:
    rows: list[object] = ["a", ("b", "!"), {"text": "c", "more": "?"}]

    batch = say.batch(rows, name="letters")
    again = say.batch(rows, name="letters")

    assert [row.get() for row in batch.results()] == ["a", "b!", "c?"]
    assert (len(batch), again.ids) == (3, batch.ids)
    assert {status.state for status in batch.status()} == {"done"}
    with pytest.raises(InvalidRequest, match="at least one row"):
        say.batch([])


def test_a_map_keeps_the_order_and_an_error_its_place(connected: None) -> None:
    seen: list[int] = []

    rows = say.map([str(n) for n in range(20)], concurrency=4, progress=lambda progress: seen.append(progress.done))

    assert [row.get() for row in rows] == [str(n) for n in range(20)]
    assert sorted(seen) == list(range(1, 21))
    assert say.map([]) == []


async def test_asynchronous_functions_do_the_same_on_either_connection(
    connected: None, client: modelbus.Client
) -> None:
    for mine in (point_async, point_async.with_llm(client)):
        job = await mine.submit("p")
        value = await job
        assert isinstance(value, Point)
        assert await (await mine.job(job.id)) == value
        assert [row.get() for row in await (await mine.batch(["a", "b"])).results()] == [value, value]
        assert [row.get() for row in await mine.map(["a", "b"], concurrency=1)] == [value, value]


async def test_what_no_job_can_keep_is_refused(connected: None, client: modelbus.Client) -> None:
    def refused(function: object, words: str) -> None:
        with pytest.raises(PromptError, match=words):
            function.submit("x")  # type: ignore[attr-defined]

    await asyncio.to_thread(refused, say.with_max_turns(2), "with_max_turns")
    await asyncio.to_thread(refused, say.with_tools(print_nothing), "tools")
    await asyncio.to_thread(refused, say.with_llm(client, model="chat"), "the connection that the process shares")
    await asyncio.to_thread(refused, say.with_return_type(modelbus.Result[str]), "whole value")
    refused(say, "while an event loop runs")
    with pytest.raises(PromptError, match="need a bus"):
        await point_async.with_llm(ScriptedModel("x")).submit("x")


def print_nothing() -> None:
    """Does nothing."""
