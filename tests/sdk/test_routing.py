"""Which of several models is asked, and which of several answers is taken."""

from __future__ import annotations

import asyncio

import modelbus
import pytest
from modelbus.errors import ConfigurationError, EngineFailed
from modelbus.fusion import fuse, reciprocal_ranks
from modelbus.routing import Measured, Metric, Router, Sample
from modelbus.testing import ScriptedModel
from modelbus_broker.messages import Chat

from tests.helpers.cluster import Cluster
from tests.helpers.doc_blocks import DOCS, run_page


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.mark.parametrize(("metric", "expected"), [("first_token", "b"), ("duration", "a"), ("tokens_per_second", "c")])
def test_models_take_turns_until_they_are_known_then_the_fastest_is_asked(metric: Metric, expected: str) -> None:
    clock = Clock()
    measured = Measured(["a", "b", "c"], metric=metric, window_s=10, min_samples=2, clock=clock)
    samples = {"a": (3.0, 4.0, 10.0), "b": (1.0, 6.0, 20.0), "c": (2.0, 5.0, 30.0)}
    asked = []
    for _ in range(6):
        asked.append(model := measured.pick())
        measured.add(model, Sample(clock.now, *samples[model]))
    assert sorted(asked) == ["a", "a", "b", "b", "c", "c"]
    assert {measured.pick() for _ in range(3)} == {expected}
    # What is old is forgotten, and measured anew.
    clock.now = 11.0
    assert measured.mean(expected) is None
    assert len({measured.pick() for _ in range(6)}) == 3


def test_a_router_needs_a_choice() -> None:
    with pytest.raises(ConfigurationError, match="two different"):
        Measured(["a", "a"])
    with pytest.raises(ConfigurationError, match="min_samples"):
        Measured(["a", "b"], min_samples=0)


async def test_a_router_is_a_client_like_any_other(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    await cluster.deploy_echo("quick")
    await cluster.deploy_echo("slow", delay_ms="150")
    async with modelbus.connect(cluster.server.url) as client:
        router = Router(client, ["slow", "quick"], min_samples=2)
        for n in range(8):
            assert (await router.chat("any", f"question {n}")).text == f"question {n}"
        async with router.stream("any", "as it comes") as stream:
            assert "".join([delta.text async for delta in stream]) == "as it comes"
        slow, quick = router.measured.mean("slow"), router.measured.mean("quick")
        assert slow is not None and quick is not None and slow > 0.15 > quick
        assert len(router.measured._samples["slow"]) == 2
        assert router.capabilities("any").tasks == client.capabilities("quick").tasks

    await cluster.deploy_echo("chat")
    await cluster.deploy_echo("other")
    monkeypatch.setenv("MODELBUS_ADDRESS", cluster.server.url)
    await asyncio.to_thread(run_page, DOCS / "routing.md")

    @modelbus.prompt()
    def greet(name: str) -> str:  # type: ignore[empty-body]
        """Hello {{ name }}"""

    one, two = ScriptedModel(respond=lambda chat: "from the only engine"), ["a", "b"]
    assert await greet.with_llm(Router(one, two), model="any").aio("you") == "from the only engine"


def ranks_by_words(chat: Chat) -> str:
    """A reviewer that likes what has "good" in it, then what is long."""
    shown = chat.messages[-1].text().split("Answer ")[1:]
    answers = {int(part.partition(":")[0]): part.partition(":\n")[2].split("\n\n")[0] for part in shown}
    best_first = sorted(answers, key=lambda number: ("good" not in answers[number], -len(answers[number])))
    return str(best_first)


async def test_the_answer_that_reviewers_like_best_is_taken() -> None:
    said = {"a": "short", "b": "a good one", "c": "rather long and bad"}

    def respond(chat: Chat) -> str:
        return ranks_by_words(chat) if "Rank them" in chat.messages[-1].text() else said[names.pop(0)]

    names = ["a", "b", "c"]
    model = ScriptedModel(respond=respond)
    fused = await fuse(model, ["a", "b", "c"], "Say something", reviewers=["r1", "r2"], rounds=2, seed=7)
    assert fused.text == "a good one"
    assert [candidate.answer.text for candidate in fused.candidates if candidate.answer] == list(said.values())
    assert len(fused.reviews) == 4
    assert {tuple(review.order) for review in fused.reviews} == {(1, 2, 0)}, "whatever order they saw them in"
    assert fused.candidates[1].score == pytest.approx(4 / 61)
    assert fused.usage.completion_tokens > sum(c.answer.usage.completion_tokens for c in fused.candidates if c.answer)


async def test_who_fails_is_left_out() -> None:
    answers = ScriptedModel(EngineFailed("no head"), "fine")
    fused = await fuse(answers, ["a", "b"], "Say something", reviewers=["r"])
    assert (fused.text, fused.reviews) == ("fine", [])
    assert isinstance(fused.candidates[0].error, EngineFailed)

    nonsense = ScriptedModel("one", "two", *["[1, 1]"] * 3)
    fused = await fuse(nonsense, ["a", "b"], "Say something", reviewers=["r"])
    assert fused.text == "one" and fused.reviews[0].error is not None

    with pytest.raises(EngineFailed, match="no head"):
        await fuse(ScriptedModel(EngineFailed("no head")), ["a"], "Say something", reviewers=["r"])
    with pytest.raises(ConfigurationError, match="reviewers"):
        await fuse(answers, ["a"], "Say something", reviewers=[])


def test_places_are_added_up_by_reciprocal_rank() -> None:
    assert reciprocal_ranks([[1, 0], [1]], 3) == pytest.approx([1 / 62, 2 / 61, 0.0])
