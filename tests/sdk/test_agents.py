"""Agents that hand over to each other, use each other as tools, and talk in turns."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pydantic
import pytest
from modelbus.chats import Agent, AgentEvent, AgentsEndEvent, Group, GroupRun, HandOffEvent, Team
from modelbus.errors import ConfigurationError, InvalidRequest, TooManyRounds
from modelbus.testing import ScriptedAnswer, ScriptedCall, ScriptedModel
from modelbus_broker.messages import Chat, ChatMessage


def calls(*names: str, **arguments: Any) -> ScriptedAnswer:
    return ScriptedAnswer(tool_calls=[ScriptedCall(name=name, arguments=arguments) for name in names])


def refund(order: str = "") -> str:
    """Gives the money back."""
    return f"refunded {order}"


def system(chat: Chat) -> str:
    return chat.messages[0].text() if chat.messages[0].role == "system" else ""


async def test_an_agent_hands_over_and_the_other_one_answers() -> None:
    class Outcome(pydantic.BaseModel):
        done: bool

    money = Agent("money", "You give refunds.", tools=[refund], output=Outcome, temperature=0.1)
    desk = Agent("desk", "You find out what is wanted.\nMore.", handoffs=[money])
    model = ScriptedModel(
        calls("hand_over_to_money", reason="wants a refund"), calls("refund", order="7"), '{"done": true}'
    )
    team = Team(desk, money, llm=model, model="m")

    events = [event async for event in team.aio_events("My order 7 is broken.")]

    end = events[-1]
    assert isinstance(end, AgentsEndEvent)
    run = end.run
    assert (run.agent, run.path, run.value, run.answer) == (
        money,
        ["desk", "money"],
        Outcome(done=True),
        '{"done": true}',
    )
    assert [(event.agent, event.by, event.reason) for event in events if isinstance(event, HandOffEvent)] == [
        (money, desk, "wants a refund")
    ]
    assert {event.agent.name for event in events if isinstance(event, AgentEvent)} == {"desk", "money"}
    assert [outcome.name for outcome in run.calls] == ["hand_over_to_money", "refund"]
    assert [(message.role, message.name) for message in run.messages] == [
        ("user", None), ("assistant", "desk"), ("tool", None), ("assistant", "money"), ("tool", None), ("assistant", "money")
    ]  # fmt: skip
    first, second = model.requests[0].chat, model.requests[1].chat
    assert (system(first), system(second)) == ("You find out what is wanted.\nMore.", "You give refunds.")
    assert (
        first.tools
        and first.tools[0]["function"]["description"] == "Hands the conversation over to money: You give refunds."
    )
    assert [tool["function"]["name"] for tool in second.tools or ()] == ["refund"]
    assert second.messages[1:] == run.messages[:3] and second.sampling.temperature == 0.1
    assert run.usage.completion_tokens > 3


async def test_a_conversation_goes_on_with_the_agent_that_had_it() -> None:
    one, two = Agent("one"), Agent("two", "2")
    one.may_hand_over_to(two)
    two.may_hand_over_to(one)
    team = Team(one, llm=ScriptedModel(calls("hand_over_to_two"), "first", "second"), model="m")

    run = await team.aio_run("go")
    more = await team.aio_run([*run.messages, ChatMessage(role="user", content="more")], first=run.agent)

    assert (run.agent, run.answer, more.agent, more.answer, more.path) == (two, "first", two, "second", ["two"])
    assert len(more.messages) == len(run.messages) + 2


async def test_handing_over_without_end_is_ended() -> None:
    one, two = Agent("one"), Agent("two")
    one.may_hand_over_to(two)
    two.may_hand_over_to(one)
    model = ScriptedModel(respond=lambda chat: calls((chat.tools or [])[0]["function"]["name"]))

    with pytest.raises(TooManyRounds, match="one -> two -> one -> two"):
        await Team(one, llm=model, model="m", max_handoffs=3).aio_run("go")


async def test_only_one_agent_can_get_the_conversation() -> None:
    left, right = Agent("left", "l"), Agent("right", "r")
    model = ScriptedModel(calls("hand_over_to_left", "hand_over_to_right"), "here")

    run = await Team(Agent("first", handoffs=[left, right]), llm=model, model="m").aio_run("go")

    assert run.path == ["first", "left"]
    assert [outcome.failure for outcome in run.calls] == ["", "failed"]


async def test_an_agent_is_a_tool_of_another_one() -> None:
    expert = Agent("expert", "You know.", description="knows all", output=int)
    model = ScriptedModel(calls("ask_expert", question="6 * 7?"), "42", "The answer is 42.")

    run = await Team(Agent("boss", tools=[expert.as_tool()]), llm=model, model="m").aio_run("What is 6 * 7?")

    assert run.answer == "The answer is 42." and run.calls[0].value == 42
    asked = model.requests[1].chat
    assert [message.text() for message in asked.messages] == ["You know.", "6 * 7?"]
    assert (model.requests[0].chat.tools or [])[0]["function"]["description"] == "Asks expert: knows all"


async def test_agents_have_models_of_their_own_and_some_are_no_models() -> None:
    own = ScriptedModel("from my own")
    person = Agent("person", respond=lambda said: f"I read {len(said)}")

    assert (
        await Team(Agent("a", llm=own, model="x"), llm=ScriptedModel(), model="m").aio_run("hi")
    ).answer == "from my own"
    run = await Team(person).aio_run("hi")
    assert (run.answer, [message.name for message in run.messages]) == ("I read 1", [None, "person"])
    with pytest.raises(ConfigurationError, match="agent a has no model"):
        await Team(Agent("a")).aio_run("hi")


def test_names_are_checked_and_plain_programs_may_run_teams() -> None:
    for agents in ([], [Agent("a"), Agent("a")], [Agent("a", handoffs=[Agent("b"), Agent("b")])]):
        with pytest.raises(InvalidRequest):
            Team(*agents)
    with pytest.raises(InvalidRequest, match="no name"):
        Agent("two words")
    assert Team(Agent("a"), llm=ScriptedModel("ok"), model="m").run("hi").answer == "ok"
    with pytest.raises(InvalidRequest, match="at least two"):
        Group(Agent("a"))
    with pytest.raises(InvalidRequest, match="max_turns"):
        Group(Agent("a"), Agent("b"), max_turns=0)


def spoken(run: GroupRun) -> list[tuple[str | None, str]]:
    return [(message.name, message.text()) for message in run.messages]


async def test_a_group_talks_in_turn_until_somebody_says_so() -> None:
    model = ScriptedModel("an idea", "a doubt", "agreed, DONE")
    group = Group(Agent("maker", "make"), Agent("critic", "doubt"), llm=model, model="m", until="DONE")

    run = await group.aio_run("Let us talk.")

    assert spoken(run) == [
        (None, "Let us talk."),
        ("maker", "an idea"),
        ("critic", "a doubt"),
        ("maker", "agreed, DONE"),
    ]
    assert (run.speakers, run.ended, run.answer) == (["maker", "critic", "maker"], "until", "agreed, DONE")
    seen = [[(m.role, m.text()) for m in asked.messages] for asked in model.requests]
    assert seen[1] == [("system", "doubt"), ("user", "Let us talk.\n\nmaker: an idea")]
    assert seen[2] == [
        ("system", "make"),
        ("user", "Let us talk."),
        ("assistant", "an idea"),
        ("user", "critic: a doubt"),
    ]
    assert run.usage.completion_tokens == 6


async def test_who_speaks_can_be_chosen_by_a_function_or_by_the_model() -> None:
    async def choose(said: Sequence[ChatMessage], agents: Sequence[Agent]) -> Agent | None:
        return agents[1] if len(said) < 3 else None

    one, two = Agent("one", description="first"), Agent("two", respond=lambda said: f"two hears {len(said)}")
    chosen = await Group(one, two, choose=choose).aio_run("hi")
    assert (chosen.speakers, chosen.ended) == (["two", "two"], "nobody")

    model = ScriptedModel('"two"', '"one"', "one speaks")
    by_model = await Group(one, two, llm=model, model="m", choose="model", max_turns=2).aio_run("hi")
    assert (by_model.speakers, by_model.ended, by_model.answer) == (["two", "one"], "max_turns", "one speaks")
    assert "- one: first" in model.requests[0].messages[-1].text()


def test_plain_programs_may_run_groups() -> None:
    group = Group(Agent("a", respond=lambda said: "x"), Agent("b", respond=lambda said: "y"), max_turns=3)
    assert group.run("hi").speakers == ["a", "b", "a"]


async def test_a_group_gives_events() -> None:
    group = Group(
        Agent("a", tools=[refund]), Agent("b"), llm=ScriptedModel(calls("refund"), "done", "ok"), model="m", max_turns=2
    )

    events = [event async for event in group.aio_events("hi")]

    assert isinstance(events[-1], GroupRun) and spoken(events[-1]) == [(None, "hi"), ("a", "done"), ("b", "ok")]
    assert {event.agent.name for event in events if isinstance(event, AgentEvent)} == {"a", "b"}
