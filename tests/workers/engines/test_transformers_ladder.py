"""The ladder beside a real model: with a grammar, and with words alone."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import pytest_asyncio
from modelbus_broker.errors import OutputError, UnsupportedHere
from modelbus_broker.messages import Chat, ChatMessage, Ladder, Sampling
from modelbus_workers.engines.base import Attempted, EngineConfig, Finished, Output, Prompt, Run
from modelbus_workers.engines.transformers import TransformersEngine
from modelbus_workers.forms import Forms

from tests.helpers.smollm2 import smollm2

pytest.importorskip("torch")
pytest.importorskip("transformers")

pytestmark = [
    pytest.mark.asyncio(loop_scope="module"),
    pytest.mark.timeout(300),
    # The library's own deprecations are not ours to repair.
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]

REQUESTS: Any = json.loads((Path(__file__).parents[2] / "data" / "tool_requests.json").read_text())
PARIS = Chat(
    messages=[ChatMessage(role="user", content="What is the weather in Paris?")],
    sampling=Sampling(temperature=0.0, max_tokens=48),
    tools=REQUESTS["tools"],
    parallel_tool_calls=False,
)
PROMPTED = Ladder(rungs=("prompted",))


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def forms() -> AsyncIterator[Forms]:
    params = {"dtype": "float32", "num_threads": "1"}
    engine = TransformersEngine(EngineConfig(model="m", model_path=str(smollm2()), params=params))
    await engine.start()
    yield Forms(engine)
    await engine.close()


async def asked(forms: Forms, task: Chat, **run: Any) -> tuple[list[Output], Finished, list[Any]]:
    made = [output async for output in forms.answer(task, Run(id="test", **run))]
    last = made[-1]
    assert isinstance(last, Finished)
    return [output for output in made if isinstance(output, Output)], last, made


@pytest.mark.parametrize("ladder", [None, PROMPTED], ids=["grammar", "prompted"])
async def test_a_small_model_calls_a_tool(forms: Forms, ladder: Ladder | None) -> None:
    (output,), finished, made = await asked(
        forms, msgspec.structs.replace(PARIS, tool_choice="required", ladder=ladder)
    )

    (call,) = output.tool_calls
    assert call.name == "get_weather" and json.loads(call.arguments)["city"] == "Paris"
    assert (output.finish_reason, output.text) == ("tool_calls", "")
    assert (finished.rung, finished.attempts) == ("prompted" if ladder else "grammar", 1)
    assert finished.usage.completion_tokens == len(output.token_ids) > 0
    assert [part.usage for part in made if isinstance(part, Attempted)][-1] == finished.usage
    again, second, _ = await asked(forms, msgspec.structs.replace(PARIS, tool_choice="required", ladder=ladder))
    assert (again, second.usage) == ([output], finished.usage), "the ids of calls too"


async def test_the_tool_that_is_meant_is_called_wherever_it_stands(forms: Forms) -> None:
    umbrella = [ChatMessage(role="user", content="Do I need an umbrella in Hamburg?")]
    for tools in (REQUESTS["tools"], REQUESTS["tools"][::-1]):
        task = msgspec.structs.replace(PARIS, messages=umbrella, tools=tools, tool_choice="required")
        (output,), finished, _ = await asked(forms, task)
        assert [call.name for call in output.tool_calls] == ["get_weather"]
        alone, told_of_one, _ = await asked(forms, msgspec.structs.replace(task, tools=REQUESTS["tools"][:1]))
        assert alone == [output], "as if there were no other"
        assert finished.usage.prompt_tokens > told_of_one.usage.prompt_tokens, "what it took to choose counts"


async def test_what_an_earlier_run_has_said_is_not_said_again(forms: Forms) -> None:
    outputs, finished, made = await asked(
        forms, PARIS, output_token_ids=[[1, 2, 3]], emitted_chars=[0], prompt_tokens=9
    )

    assert outputs == [] and not any(isinstance(part, Prompt) for part in made)
    assert (finished.usage.prompt_tokens, finished.usage.completion_tokens) == (9, 3)


async def test_what_no_grammar_can_say_is_asked_for_in_words(forms: Forms) -> None:
    schema = {"type": "object", "properties": {"city": {"type": "string"}}, "not": {"required": ["zip"]}}
    question = 'Say {"city": "Paris"} and nothing else.'
    task = Chat(
        messages=[ChatMessage(role="user", content=question)],
        sampling=PARIS.sampling,
        response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": schema}},
    )
    (output,), finished, _ = await asked(forms, task)

    assert "zip" not in json.loads(output.text)
    assert finished.rung in ("prompted", "reasked") and finished.attempts >= 1
    with pytest.raises(UnsupportedHere, match="native"):
        await asked(forms, msgspec.structs.replace(task, ladder=Ladder(rungs=("native",))))


async def test_who_cannot_do_it_says_what_was_written(forms: Forms) -> None:
    task = Chat(
        messages=[ChatMessage(role="user", content="Say hello.")],
        sampling=Sampling(temperature=0.0, max_tokens=40, stop=["{", " "]),  # a word, and so never cut by its length
        response_format={"type": "json_object"},
        ladder=msgspec.structs.replace(PROMPTED, reasks=1, retry_temperature=0.5),
    )
    with pytest.raises(OutputError) as caught:
        await asked(forms, task)
    assert caught.value.problems and "{" not in caught.value.raw
