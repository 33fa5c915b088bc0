"""The tool loop, with models that follow a script."""

from __future__ import annotations

import asyncio
import contextvars
import threading
from contextlib import aclosing
from typing import Any

import msgspec
import pydantic
import pytest
from modelbus.errors import InvalidRequest, TooManyRounds, UpstreamFailed
from modelbus.structure import output_type
from modelbus.testing import ScriptedAnswer, ScriptedCall, ScriptedModel
from modelbus.tools import (
    CallsEvent,
    EndEvent,
    Injected,
    OutcomeEvent,
    PendingCall,
    Retry,
    RoundEvent,
    TextEvent,
    ToolContext,
    run_tools,
    tool,
    tool_events,
)
from modelbus_broker.messages import Capabilities


def add(a: int, b: int) -> int:
    """Adds."""
    return a + b


async def double(x: int) -> int:
    """Doubles."""
    await asyncio.sleep(0)
    return 2 * x


def calls(*wanted: tuple[str, Any], text: str = "") -> ScriptedAnswer:
    return ScriptedAnswer(
        text=text, tool_calls=[ScriptedCall(name=name, arguments=arguments) for name, arguments in wanted]
    )


async def test_calls_are_made_until_the_model_answers() -> None:
    model = ScriptedModel(
        calls(("add", {"a": 1, "b": 2}), ("double", {"x": 5}), text="let me see"),
        calls(("double", {"x": 3})),
        "It is 6.",
    )

    run = await run_tools(model, "m", "How much?", [add, double], sampling={"temperature": 0.5})

    assert (run.answer, run.value, run.values, run.rounds, run.rung) == (
        "It is 6.",
        "It is 6.",
        [3, 10, 6],
        2,
        "native",
    )
    assert [message.role for message in run.messages] == [
        "user",
        "assistant",
        "tool",
        "tool",
        "assistant",
        "tool",
        "assistant",
    ]
    assert run.messages[1].content == "let me see"
    assert [(m.tool_call_id, m.content) for m in run.messages if m.role == "tool"] == [
        ("call_1", "3"),
        ("call_2", "10"),
        ("call_3", "6"),
    ]
    assert [asked.messages for asked in model.requests] == [run.messages[:1], run.messages[:4], run.messages[:6]]
    assert all(asked.chat.sampling.temperature == 0.5 and asked.chat.tools for asked in model.requests)
    assert run.usage.completion_tokens > 5 and run.finish_reason == "stop" and run.model == "m"
    assert not run.pending and all(outcome.ok for outcome in run.calls)


async def test_the_schema_driven_model_calls_each_tool_once() -> None:
    run = await run_tools(ScriptedModel(text="done"), "m", "go", [add, double])

    assert (run.answer, run.values, run.rounds) == ("done", [2, 2], 2)


async def test_without_execution_the_calls_are_returned() -> None:
    run = await run_tools(ScriptedModel(), "m", "go", [add], execute=False, choice="required")

    assert [call.function.name for call in run.pending] == ["add"] and run.calls == [] and run.rounds == 0


async def test_what_fails_is_told_to_the_model_and_it_goes_on() -> None:
    def broken(x: int) -> int:
        raise ValueError("no such file")

    def again(x: int) -> int:
        raise Retry("x must be even")

    async def slow() -> None:
        await asyncio.sleep(60)

    model = ScriptedModel(
        calls(("broken", {"x": 1}), ("again", {"x": 1}), ("slow", {}), ("add", {"a": 1, "b": 1})), "sorry"
    )  # fmt: skip
    tools: list[Any] = [broken, again, tool(timeout_s=0.05)(slow), add]

    run = await run_tools(model, "m", "go", tools)

    assert [(outcome.failure, outcome.text) for outcome in run.calls] == [
        ("failed", "Error: ValueError: no such file"),
        ("failed", "Error: x must be even"),
        ("timeout", "Error: slow gave no result within 0.05 s"),
        ("", "2"),
    ]
    assert isinstance(run.calls[0].error, ValueError)
    assert run.values == [2] and run.answer == "sorry"


async def test_a_function_that_is_no_coroutine_runs_on_a_thread_with_the_caller_s_context() -> None:
    variable = contextvars.ContextVar("variable", default="unset")
    release = threading.Event()

    def where() -> str:
        return f"{threading.current_thread().name} {variable.get()}"

    def stuck() -> None:
        release.wait(30)

    def leaves() -> None:
        raise SystemExit(3)

    def stops() -> None:
        raise StopIteration

    variable.set("set")
    model = ScriptedModel(calls(("where", {}), ("stuck", {}), ("leaves", {}), ("stops", {})), "ok")

    run = await run_tools(model, "m", "go", [where, tool(timeout_s=0.05)(stuck), leaves, stops])
    release.set()

    assert run.calls[0].value == "modelbus-tool set"
    assert [outcome.failure for outcome in run.calls[1:]] == ["timeout", "failed", "failed"]
    assert "SystemExit" in run.calls[2].text


async def test_at_most_so_many_calls_run_at_once() -> None:
    running = most = 0

    async def work() -> None:
        nonlocal running, most
        running += 1
        most = max(most, running)
        await asyncio.sleep(0.01)
        running -= 1

    for parallel in (1, 3):
        most = 0
        await run_tools(ScriptedModel(calls(*[("work", {})] * 8), "ok"), "m", "go", [work], parallel=parallel)
        assert most == parallel


async def test_what_is_wrong_with_calls_is_told_to_the_model() -> None:
    class Even(pydantic.BaseModel):
        n: int

        @pydantic.field_validator("n")
        @classmethod
        def even(cls, n: int) -> int:
            if n % 2:
                raise ValueError("n is odd")
            return n

    def half(x: Even) -> int:
        return x.n // 2

    model = ScriptedModel(
        calls(("add", {"a": "one", "b": 2}), ("nothing", {}), ("add", {"a": 1, "b": 2})), calls(("add", "{broken")),
        calls(("half", {"x": {"n": 3}})), calls(("half", {"x": {"n": 4}})), "3 and 2",
    )  # fmt: skip

    run = await run_tools(model, "m", "go", [add, half])

    assert run.values == [3, 2] and run.rounds == 4
    assert [outcome.failure for outcome in run.calls] == [
        "bad_arguments", "unknown_tool", "", "bad_arguments", "bad_arguments", ""
    ]  # fmt: skip
    told = [outcome.text for outcome in run.calls]
    assert "a: expected a whole number, got the text 'one'" in told[0] and "the tools are: add, half" in told[1]
    assert "no JSON" in told[3] and "n is odd" in told[4]


async def test_the_number_of_rounds_is_limited() -> None:
    def forever(chat: Any) -> Any:
        return "fine, 2" if chat.tool_choice == "none" else calls(("add", {"a": 1, "b": 1}))

    with pytest.raises(TooManyRounds, match="2 times") as error:
        await run_tools(ScriptedModel(respond=forever), "m", "go", [add], max_rounds=2)
    run: Any = error.value.run
    assert (error.value.rounds, run.values, len(run.pending)) == (2, [2, 2], 1)

    run = await run_tools(ScriptedModel(respond=forever), "m", "go", [add], max_rounds=2, at_limit="answer")
    assert (run.answer, run.rounds, run.pending) == ("fine, 2", 2, [])
    with pytest.raises(InvalidRequest, match="max_rounds"):
        await run_tools(ScriptedModel(), "m", "go", [add], max_rounds=0)


async def test_a_choice_holds_for_the_first_round_only() -> None:
    model = ScriptedModel()

    run = await run_tools(model, "m", "go", [add, double], choice="double")

    assert [outcome.name for outcome in run.calls] == ["double", "add"]
    assert [asked.chat.tool_choice for asked in model.requests] == [
        {"type": "function", "function": {"name": "double"}},
        None,
        None,
    ]


async def test_calls_need_consent() -> None:
    asked: list[tuple[str, Any]] = []

    async def approve(pending: PendingCall) -> bool | str:
        asked.append((pending.tool.name, dict(pending.arguments)))
        verdicts: dict[str, bool | str] = {"add": True, "double": "not today"}
        return verdicts.get(pending.tool.name, False)

    def wipe() -> None:
        raise AssertionError("it must not be called")

    guarded = tool(needs_approval=True)(wipe)
    wanted = calls(("add", {"a": 1, "b": 1}), ("double", {"x": 1}), ("wipe", {}))

    run = await run_tools(ScriptedModel(wanted, "ok"), "m", "go", [add, double, guarded], approve=approve, parallel=1)
    alone = await run_tools(ScriptedModel(calls(("wipe", {})), "ok"), "m", "go", [guarded])
    agreed = await run_tools(
        ScriptedModel(calls(("add", {"a": 1, "b": 1})), "ok"), "m", "go", [add], approve=lambda pending: True
    )

    assert asked == [("add", {"a": 1, "b": 1}), ("double", {"x": 1}), ("wipe", {})]
    assert [(o.failure, o.text) for o in run.calls] == [
        ("", "2"),
        ("refused", "Error: not today"),
        ("refused", "Error: the call of wipe was not approved"),
    ]
    assert "nobody is there" in alone.calls[0].text and agreed.values == [2]


async def test_dependencies_are_injected_and_the_model_cannot_give_them() -> None:
    class Stop(Exception):
        pass

    async def look(key: str, db: Injected[dict[str, int]], context: Injected[ToolContext]) -> str:
        answer = await context.client.chat(context.model, f"{key} {len(context.messages)} {context.round}")
        return f"{db[key]} {answer.text}"

    def end() -> None:
        raise Stop

    model = ScriptedModel(calls(("look", {"key": "a"})), "inner", "ok")
    run = await run_tools(model, "m", "go", [look], inject={"db": {"a": 1}})

    assert run.values == ["1 inner"]
    assert model.requests[1].messages[0].text() == "a 2 1"
    with pytest.raises(InvalidRequest, match="needs db"):
        await run_tools(model, "m", "go", [look])
    assert len(model.requests) == 3
    given = ScriptedModel(calls(("look", {"key": "a", "db": {"a": 9}})), "ok")
    run = await run_tools(given, "m", "go", [look], inject={"db": {"a": 1}})
    assert "no such argument" in run.calls[0].text
    with pytest.raises(Stop):
        await run_tools(ScriptedModel(calls(("end", {}))), "m", "go", [end], propagate=(Stop,))


async def test_an_answer_has_the_form_that_is_asked_for() -> None:
    class Sum(pydantic.BaseModel):
        value: int

    form = output_type(Sum)
    as_it_is = await run_tools(
        ScriptedModel(calls(("add", {"a": 1, "b": 1})), '{"value": 2}'), "m", "go", [add], output=form
    )
    asked_for = await run_tools(
        ScriptedModel(calls(("add", {"a": 1, "b": 1})), "It is two.", {"value": 2}), "m", "go", [add], output=form
    )

    assert as_it_is.value == asked_for.value == Sum(value=2)
    assert asked_for.answer == "It is two."


async def test_a_model_without_tools_goes_through_the_ladder() -> None:
    said = [
        '{"name": "add", "arguments": {"a": "x"}}',
        '{"name": "add", "arguments": {"a": 2, "b": 2}}',
        '{"answer": "It is 4."}',
    ]
    model = ScriptedModel(*said, tools=False, json_schema=False)

    run = await run_tools(model, "m", "What is 2 + 2?", [add])

    assert (run.values, run.answer, run.rung, run.rounds) == ([4], "It is 4.", "prompted", 1)
    first = model.requests[0]
    assert first.chat.tools is None and "add" in first.messages[-1].text()
    assert "Result of add: 4" in model.requests[2].messages[-1].text()


async def test_a_model_that_turns_out_to_take_no_tools_goes_through_the_ladder() -> None:
    class Claims(ScriptedModel):
        def capabilities(self, model: str) -> Capabilities:
            return msgspec.structs.replace(super().capabilities(model), tools=True, native_tools=True)

    model = Claims('{"name": "add", "arguments": {"a": 2, "b": 2}}', '{"answer": "4"}', tools=False, json_schema=False)

    async with aclosing(tool_events(model, "m", "What is 2 + 2?", [add])) as events:
        end = [event async for event in events][-1]

    assert isinstance(end, EndEvent) and (end.run.values, end.run.answer, len(model.requests)) == ([4], "4", 3)


async def test_events_come_as_things_happen() -> None:
    model = ScriptedModel(calls(("add", {"a": 1, "b": 1}), text="one moment please"), "that makes two", chunks=0)

    async with aclosing(tool_events(model, "m", "go", [add])) as events:
        got = [event async for event in events]

    kinds = [type(event) for event in got]
    assert kinds == [*[TextEvent] * 3, CallsEvent, OutcomeEvent, RoundEvent, *[TextEvent] * 3, EndEvent]
    assert "".join(event.text for event in got if isinstance(event, TextEvent)) == "one moment pleasethat makes two"
    end = got[-1]
    assert isinstance(end, EndEvent) and (end.run.answer, end.run.values, end.run.rung) == (
        "that makes two",
        [2],
        "native",
    )


async def test_wrong_calls_of_a_stream_count_as_a_round() -> None:
    model = ScriptedModel(calls(("nothing", {}), ("add", {"a": "x", "b": 1})), calls(("add", "{broken")), "sorry")

    async with aclosing(tool_events(model, "m", "go", [add])) as events:
        end = [event async for event in events][-1]

    assert isinstance(end, EndEvent) and end.run.rounds == 2 and end.run.answer == "sorry"
    assert [outcome.failure for outcome in end.run.calls] == ["unknown_tool", "bad_arguments", "bad_arguments"]


async def test_errors_of_the_model_and_cancellation_end_the_run() -> None:
    with pytest.raises(UpstreamFailed):
        await run_tools(ScriptedModel(calls(("add", {"a": 1, "b": 1})), UpstreamFailed("down")), "m", "go", [add])

    began, ended = asyncio.Event(), asyncio.Event()

    async def wait() -> None:
        began.set()
        try:
            await asyncio.sleep(60)
        finally:
            ended.set()

    task = asyncio.create_task(run_tools(ScriptedModel(calls(("wait", {}))), "m", "go", [wait]))
    await asyncio.wait_for(began.wait(), 20)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert ended.is_set()


async def test_a_run_without_tools_is_a_chat() -> None:
    run = await run_tools(ScriptedModel("hello"), "m", "hi", [])

    assert (run.answer, run.rounds, len(run.messages)) == ("hello", 0, 2)
