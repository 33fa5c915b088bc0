"""Decisions: from log probabilities to probabilities, and the types that can be decided for."""

from __future__ import annotations

import asyncio
import math
from enum import Enum
from typing import Any, Literal

import modelbus
import pytest
from modelbus.answers import ChoiceAnswer
from modelbus.decisions import judge, labels_of
from modelbus.decisions.decision import asked
from modelbus.errors import EngineFailed, InvalidRequest, UnsupportedField
from modelbus_broker.messages import ChatMessage, Deployment, TextPart, TokenLogprob

from tests.helpers.cluster import Cluster
from tests.helpers.doc_blocks import DOCS, run_page


class Team(Enum):
    SHIPPING = "shipping"
    BILLING = "billing"


def scored(*labels: list[tuple[int, float]]) -> list[ChoiceAnswer]:
    """Answers as an engine gives them: of each label its tokens with their probabilities."""
    return [
        ChoiceAnswer(
            index=index,
            logprobs=[TokenLogprob(token=str(token), token_id=token, logprob=math.log(p)) for token, p in label],
        )
        for index, label in enumerate(labels)
    ]


def test_probabilities_are_those_of_the_labels_among_each_other() -> None:
    judged = judge(scored([(1, 0.3)], [(2, 0.1)]), 2)
    assert judged.probabilities == pytest.approx([0.75, 0.25])
    assert judged.mass == pytest.approx(0.4)


def test_of_several_tokens_the_probabilities_are_multiplied() -> None:
    judged = judge(scored([(1, 0.5), (2, 0.5)], [(3, 0.25)], [(1, 0.5), (4, 0.2)]), 3)
    assert judged.probabilities == pytest.approx([0.25 / 0.6, 0.25 / 0.6, 0.1 / 0.6])


def test_a_label_that_begins_another_one_excludes_it() -> None:
    yes, yes_but, yes_but_no = [(1, 0.6)], [(1, 0.6), (2, 0.5)], [(1, 0.6), (2, 0.5), (3, 0.1)]
    judged = judge(scored(yes, yes_but, yes_but_no, [(9, 0.2)]), 4)
    assert judged.mass == pytest.approx(0.8)
    assert [p * 0.8 for p in judged.probabilities] == pytest.approx([0.3, 0.27, 0.03, 0.2])
    turned = judge(scored([(9, 0.2)], yes_but_no, yes_but, yes), 4)
    assert turned.probabilities == pytest.approx(judged.probabilities[::-1])


def test_what_no_float_can_say_is_still_compared() -> None:
    judged = judge(scored([(1, 1e-200), (2, 1e-200)], [(3, 1e-200), (4, 1e-201)]), 2)
    assert judged.mass == 0
    assert judged.probabilities == pytest.approx([10 / 11, 1 / 11])


def test_labels_that_cannot_be_told_apart_and_missing_scores_are_errors() -> None:
    with pytest.raises(InvalidRequest, match="label 2 is the same"):
        judge(scored([(1, 0.3)], [(1, 0.3)]), 2)
    with pytest.raises(EngineFailed, match="label 2"):
        judge(scored([(1, 0.3)]), 2)


def test_the_values_of_types() -> None:
    assert [(label.value, label.text) for label in labels_of(bool)] == [(True, "yes"), (False, "no")]
    assert [label.value for label in labels_of(Literal[1, 2])] == [1, 2]
    labels = labels_of(Team, {Team.BILLING: "about money"})
    assert [(label.value, label.text, label.description) for label in labels] == [
        (Team.SHIPPING, "shipping", ""),
        (Team.BILLING, "billing", "about money"),
    ]


@pytest.mark.parametrize("annotation", [int, list[bool], Literal["one"], Literal[1, "1"], Literal["", "x"]])
def test_types_without_values_to_decide_for_are_refused(annotation: Any) -> None:
    with pytest.raises(InvalidRequest):
        labels_of(annotation)


def test_the_question_joins_the_last_turn_of_the_user() -> None:
    labels = labels_of(bool)
    (only,) = asked([ChatMessage(role="user", content="Hi")], "Is it kind?", labels)
    assert only.text() == "Hi\n\nIs it kind?\n\nAnswer with exactly one of these and nothing else:\n- yes\n- no"
    parts = asked([ChatMessage(role="user", content=[TextPart(text="Hi")])], "Is it kind?", labels)
    assert len(parts) == 1 and parts[0].text().startswith("Hi\n\nIs it kind?")
    turns = asked([ChatMessage(role="assistant", content="Hi")], "Is it kind?", labels)
    assert [turn.role for turn in turns] == ["assistant", "user"]


async def test_decisions_over_the_bus(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    await cluster.deploy_echo("chat")
    scripted = Deployment(name="scripted", model="scripted", engine="scripted", revision="1")
    await cluster.declare(scripted)
    cluster.start_worker(scripted)
    async with modelbus.connect(cluster.server.url) as client:
        # The echo engine is the likelier to say a label the nearer to its beginning the text has it.
        decision = await client.decide("chat", "Shipping, or is it billing?", "Which team?", of=Team)
        assert decision.value is Team.SHIPPING
        assert decision.probabilities[Team.SHIPPING] > decision.probabilities[Team.BILLING]
        assert sum(decision.probabilities.values()) == pytest.approx(1)
        assert (decision.model, decision.usage.completion_tokens) == ("chat", 0)
        assert decision.usage.prompt_tokens > 0
        await cluster.wait_ready("scripted", 1)
        with pytest.raises(UnsupportedField, match="log probabilities"):
            await client.decide("scripted", "Hi", "Is it kind?")

        @modelbus.prompt(llm=client, model="chat")
        async def team_of(letter: str) -> modelbus.Decision[Team]:  # type: ignore[empty-body]
            """{{ letter }} Which team?"""

        now, later = await team_of("Shipping, or is it billing?"), await team_of.submit("Billing, or is it shipping?")
        assert (now.value, (await later).value) == (Team.SHIPPING, Team.BILLING)
        assert (await later.status()).labels["version"] == team_of.version.id
    monkeypatch.setenv("MODELBUS_ADDRESS", cluster.server.url)
    try:
        await asyncio.to_thread(run_page, DOCS / "decisions.md")
    finally:
        await asyncio.to_thread(modelbus.disconnect)
