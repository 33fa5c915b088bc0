"""POST /v1/decisions with the real openai package, on the echo engine."""

from __future__ import annotations

import json
from typing import Any

import openai
import pytest
from modelbus.errors import InvalidRequest, UnsupportedField
from modelbus_broker.messages import Decision, Deployment
from modelbus_gateway.decisions import DECISIONS_BODY, translate_decisions

from tests.helpers.cluster import Cluster

QUESTIONS: list[dict[str, Any]] = [
    {"type": "predicate", "instructions": "Is the customer angry?", "name": "angry"},
    {
        "type": "choice", "instructions": "Which team?",
        "choices": [{"value": "billing", "description": "money"}, {"value": "sales"}, {"value": True}],
    },
    {"type": "score", "instructions": "How urgent?", "levels": [{"label": "low"}, {"label": "high"}, {"label": "highest of all"}]},
]  # fmt: skip


def body(**more: Any) -> bytes:
    return json.dumps({"model": "m", "input": "Hello", "questions": QUESTIONS} | more).encode()


@pytest.mark.parametrize(
    ("more", "param"),
    [
        ({"questions": []}, "questions"),
        ({"questions": [{"type": "guess", "instructions": "?"}]}, "questions[0].type"),
        ({"questions": [{"type": "choice", "instructions": "?", "choices": [{"value": "a"}]}]}, "questions[0].choices"),
        (
            {"questions": [{"type": "choice", "instructions": "?", "choices": [{"value": "a"}, {"value": "a"}]}]},
            "questions[0].choices[1]",
        ),
        ({"questions": [{"type": "score", "instructions": "", "levels": [{"label": "a"}, {"label": "b"}]}]}, "questions[0].instructions"),
        ({"questions": [{"type": "predicate", "instructions": 7}]}, "questions[0].instructions"),
        ({"input": ""}, "input"),
        ({"input": [{"type": "message", "role": "king", "content": "x"}]}, "input[0].role"),
        ({"input": [{"type": "reasoning"}]}, "input[0].type"),
        ({"input": [{"role": "user", "content": [{"type": "input_image", "file_id": "f"}]}]}, "input[0].content[0]"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_told_with_its_place(more: dict[str, Any], param: str) -> None:
    with pytest.raises((InvalidRequest, UnsupportedField)) as caught:
        translate_decisions(DECISIONS_BODY.read(body(**more)))
    assert caught.value.param == param


def test_every_kind_of_input_reaches_the_model() -> None:
    given = [
        {"role": "system", "content": "Be fair."},
        {
            "role": "user",
            "content": [{"type": "input_text", "text": "Look:"}, {"type": "input_json", "data": {"a": 1}}],
        },
        {"type": "function_call", "name": "find", "arguments": "{}", "call_id": "1"},
        {"type": "function_call_output", "output": "nothing", "call_id": "1"},
    ]
    first, *_ = translate_decisions(DECISIONS_BODY.read(body(input=given)))
    task = first.translation.task
    assert isinstance(task, Decision) and task.labels == ["yes", "no"]
    assert [message.role for message in task.messages] == ["system", "user", "assistant", "user"]
    assert task.messages[1].text() == 'Look:\n{"a": 1}'
    assert task.messages[2].text() == "[calls find with {}]"
    assert task.messages[3].text().startswith("[the tool gave] nothing\n\nIs the customer angry?")


async def test_the_openai_package_gets_decisions(client: openai.AsyncOpenAI, cluster: Cluster) -> None:
    scripted = Deployment(name="scripted", model="scripted", engine="scripted", revision="1")
    await cluster.declare(scripted)
    cluster.start_worker(scripted)
    found = await client.decisions.create(model="echo", input="High and low: yes, billing.", questions=QUESTIONS)  # type: ignore[arg-type]
    predicate, choice, score = found.answers
    assert predicate.type == "predicate" and predicate.name == "angry"
    assert predicate.probability > 0.5
    assert choice.type == "choice" and choice.choice == "billing" and choice.name is None
    assert [one.value for one in choice.probabilities] == ["billing", "sales", True]
    assert choice.confidence == max(one.probability for one in choice.probabilities)
    assert score.type == "score"
    assert [(one.label, one.value) for one in score.probabilities] == [("low", 0), ("high", 1), ("highest of all", 2)]
    assert score.score == pytest.approx(sum(one.value * one.probability for one in score.probabilities))
    for answer in (choice, score):
        assert sum(one.probability for one in answer.probabilities) == pytest.approx(1)
    assert (found.model, found.usage.output_tokens) == ("echo", 0)
    assert found.usage.input_tokens == found.usage.total_tokens > 0
    await cluster.wait_ready("scripted", 1)
    with pytest.raises(openai.BadRequestError, match="gives no log probabilities") as refused:
        await client.decisions.create(model="scripted", input="Hi", questions=QUESTIONS[:1])  # type: ignore[arg-type]
    assert refused.value.code == "unsupported_field" and refused.value.param == "model"
    with pytest.raises(openai.NotFoundError):
        await client.decisions.create(model="nobody", input="Hi", questions=QUESTIONS[:1])  # type: ignore[arg-type]
