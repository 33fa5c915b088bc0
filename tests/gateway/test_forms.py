"""Forms for every model: response_format and tools, of models that know nothing of them, with the openai package."""

from __future__ import annotations

import asyncio
import json
import signal
from collections.abc import AsyncIterator, Sequence
from typing import Any

import aiohttp
import openai
import pydantic
import pytest
from modelbus_broker.messages import Deployment
from modelbus_broker.topology import running
from openai.types.chat import ChatCompletionUserMessageParam

from tests.gateway.conftest import StartGateway
from tests.helpers.asking import booked, outcomes, settled
from tests.helpers.cluster import Cluster
from tests.helpers.gateways import Start
from tests.helpers.streams import all_events, text_of

CHAT = "/v1/chat/completions"
USER: ChatCompletionUserMessageParam = {"role": "user", "content": "Which city?"}
WEATHER: Any = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Tells the weather in a city.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}, "days": {"type": "integer", "minimum": 1}},
            "required": ["city"],
        },
    },
}
NOW: Any = {"type": "function", "function": {"name": "now"}}


class City(pydantic.BaseModel):
    name: str
    people: int


FORMAT: Any = {
    "type": "json_schema",
    "json_schema": {"name": "city", "schema": City.model_json_schema(), "strict": True},
}
RIGHT = '{"name": "Ulm", "people": 126000}'
WRONG = '{"name": "Ulm", "people": "many"}'


async def deploy(cluster: Cluster, model: str, answers: Sequence[Any], *, knows: bool = False, **more: Any) -> None:
    """A model that gives these answers in turn, and after the last one that again."""
    last = answers[-1]
    rules = [{"pattern": "", "answer": last}] if len(answers) == 1 else []
    script = {"answers": [] if rules else list(answers), "rules": rules, "tools": knows, "json_schema": knows, **more}
    wish = Deployment(
        name=model, model=model, engine="scripted", revision="1", engine_params={"script": json.dumps(script)}
    )
    await cluster.declare(wish)
    cluster.start_worker(wish)
    await cluster.wait_ready(model, 1)


@pytest.fixture
async def openai_client(cluster: Cluster, start_gateway: StartGateway) -> AsyncIterator[openai.AsyncOpenAI]:
    url = await start_gateway()
    async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="any", max_retries=0) as client:
        yield client


async def test_a_schema_is_kept_by_a_model_that_knows_none_plain_streamed_and_parsed(
    cluster: Cluster, openai_client: openai.AsyncOpenAI
) -> None:
    await deploy(cluster, "city", [f"Sure!\n```json\n{RIGHT}\n```\nHope that helps."])
    create = openai_client.chat.completions.with_raw_response.create

    raw = await create(model="city", messages=[USER], response_format=FORMAT)
    plain = raw.parse()
    assert (plain.choices[0].message.content, plain.choices[0].finish_reason) == (RIGHT, "stop")
    assert (raw.headers["x-modelbus-rung"], raw.headers["x-modelbus-attempts"]) == ("prompted", "1")

    stream = await openai_client.chat.completions.create(
        model="city", messages=[USER], response_format={"type": "json_object"}, stream=True
    )
    assert "".join([chunk.choices[0].delta.content or "" async for chunk in stream]) == RIGHT

    parsed = await openai_client.chat.completions.parse(model="city", messages=[USER], response_format=City)
    assert parsed.choices[0].message.parsed == City(name="Ulm", people=126000)

    async with openai_client.chat.completions.stream(model="city", messages=[USER], response_format=City) as events:
        final = await events.get_final_completion()
    assert final.choices[0].message.parsed == City(name="Ulm", people=126000)

    several = await openai_client.chat.completions.create(model="city", messages=[USER], response_format=FORMAT, n=2)
    assert [choice.message.content for choice in several.choices] == [RIGHT, RIGHT]


async def test_a_wrong_answer_is_asked_again_and_all_of_it_is_counted(
    cluster: Cluster, openai_client: openai.AsyncOpenAI
) -> None:
    await deploy(
        cluster, "learner", [WRONG, RIGHT, WRONG, "no", RIGHT, WRONG, WRONG, WRONG, WRONG, WRONG, WRONG, RIGHT]
    )
    create = openai_client.chat.completions.with_raw_response.create

    raw = await create(model="learner", messages=[USER], response_format=FORMAT)
    once = raw.parse()
    assert once.choices[0].message.content == RIGHT
    assert (raw.headers["x-modelbus-rung"], raw.headers["x-modelbus-attempts"]) == ("reasked", "2")
    assert once.usage is not None and once.usage.completion_tokens == len(WRONG.split()) + len(RIGHT.split())

    stream = await openai_client.chat.completions.create(
        model="learner", messages=[USER], response_format=FORMAT, stream=True, stream_options={"include_usage": True}
    )
    chunks = [chunk async for chunk in stream]
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == RIGHT, "nothing wrong was shown"
    words = len(WRONG.split()) + len(RIGHT.split()) + 1
    assert chunks[-1].usage is not None and chunks[-1].usage.completion_tokens == words

    with pytest.raises(openai.InternalServerError) as caught:
        await openai_client.chat.completions.create(model="learner", messages=[USER], response_format=FORMAT)
    assert caught.value.status_code == 502
    error: Any = caught.value.body
    assert (error["code"], error["upstream"]) == ("invalid_output", WRONG)
    assert "people" in error["message"]
    with pytest.raises(openai.APIError, match="people"):
        failing = await openai_client.chat.completions.create(
            model="learner", messages=[USER], response_format=FORMAT, stream=True
        )
        async for _ in failing:
            raise AssertionError("something wrong was shown")

    none = {"ladder": {"reasks": 0}}
    right = await openai_client.chat.completions.create(
        model="learner", messages=[USER], response_format=FORMAT, extra_body=none
    )
    assert right.choices[0].message.content == RIGHT
    await settled(cluster.bus, "learner")
    assert (await outcomes(cluster.bus)) == {"done": 3, "failed": 2}


async def test_tools_of_a_model_that_knows_none(cluster: Cluster, openai_client: openai.AsyncOpenAI) -> None:
    call = '{"name": "get_weather", "arguments": {"city": "Ulm", "days": "3"}}'
    await deploy(cluster, "caller", [call])
    await deploy(cluster, "two", [f'[{call}, {{"name": "now", "arguments": {{}}}}]'])
    await deploy(cluster, "talker", ['{"answer": "It is warm."}'])
    create = openai_client.chat.completions.create

    for choice in ("auto", "required", {"type": "function", "function": {"name": "get_weather"}}):
        got: Any = await create(model="caller", messages=[USER], tools=[WEATHER, NOW], tool_choice=choice)  # type: ignore[call-overload]
        (made,) = got.choices[0].message.tool_calls
        assert (made.function.name, json.loads(made.function.arguments)) == ("get_weather", {"city": "Ulm", "days": 3})
        assert got.choices[0].finish_reason == "tool_calls" and got.choices[0].message.content is None

    async with openai_client.chat.completions.stream(model="two", messages=[USER], tools=[WEATHER, NOW]) as events:
        final = await events.get_final_completion()
    calls = final.choices[0].message.tool_calls or []
    assert [made.function.name for made in calls] == ["get_weather", "now"]
    assert len({made.id for made in calls}) == 2 and final.choices[0].finish_reason == "tool_calls"

    with pytest.raises(openai.InternalServerError, match="only one may be at once"):
        await create(model="two", messages=[USER], tools=[WEATHER, NOW], parallel_tool_calls=False)
    with pytest.raises(openai.InternalServerError, match="there is no tool"):
        await create(
            model="caller", messages=[USER], tools=[WEATHER, NOW],
            tool_choice={"type": "function", "function": {"name": "now"}},
        )  # fmt: skip

    said = await create(model="talker", messages=[USER], tools=[WEATHER])
    assert (said.choices[0].message.content, said.choices[0].finish_reason) == ("It is warm.", "stop")
    with pytest.raises(openai.InternalServerError, match="expected an object with"):
        await create(model="talker", messages=[USER], tools=[WEATHER], tool_choice="required")
    history: Any = [
        USER,
        {"role": "assistant", "tool_calls": [{"id": "c1", "type": "function", "function": {"name": "now", "arguments": "{}"}}]},
        {"role": "tool", "tool_call_id": "c1", "content": "noon"},
    ]  # fmt: skip
    for more in ({"tools": [NOW]}, {"tools": [NOW], "tool_choice": "none"}, {}):
        later: Any = await create(model="talker", messages=history, **more)
        assert "It is warm." in later.choices[0].message.content


async def test_what_a_provider_was_made_for_passes_through_and_is_looked_at(
    cluster: Cluster, openai_client: openai.AsyncOpenAI
) -> None:
    wrong = {"tool_calls": [{"name": "get_weather", "arguments": {"town": "Ulm"}}]}
    right = {"tool_calls": [{"name": "get_weather", "arguments": {"city": "Ulm"}}]}
    await deploy(cluster, "native", [wrong, right, {"text": WRONG}, {"text": RIGHT}], knows=True)
    create = openai_client.chat.completions.with_raw_response.create

    raw = await create(model="native", messages=[USER], tools=[WEATHER])
    assert (raw.headers["x-modelbus-rung"], raw.headers["x-modelbus-attempts"]) == ("reasked", "2")
    made: Any = (raw.parse().choices[0].message.tool_calls or [])[0]
    assert json.loads(made.function.arguments) == {"city": "Ulm"}

    raw = await create(model="native", messages=[USER], response_format=FORMAT)
    assert raw.parse().choices[0].message.content == RIGHT


async def test_what_makes_no_sense_is_a_400_before_a_token_is_spent(
    cluster: Cluster, openai_client: openai.AsyncOpenAI
) -> None:
    await deploy(cluster, "city", [RIGHT])

    def schema(schema: Any) -> Any:
        return {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}}

    def tool(schema: Any) -> Any:
        return {"tools": [WEATHER, {"type": "function", "function": {"name": "f", "parameters": schema}}]}

    for fields, param in (
        (schema({"type": "objekt"}), "response_format"),
        (schema({"$ref": "https://example.com/schema.json"}), "response_format"),
        (schema({"$ref": "#/$defs/nothing"}), "response_format"),
        (tool({"properties": {"a": {"type": "texxt"}}}), "tools[1].function.parameters"),
        ({"tools": [WEATHER, WEATHER]}, "tools[1].function.name"),
        ({**schema({}), "extra_body": {"ladder": {"rungs": []}}}, "ladder.rungs"),
        ({**schema({}), "extra_body": {"ladder": {"rungs": ["magic"]}}}, "ladder.rungs[0]"),
        ({**schema({}), "extra_body": {"ladder": {"reasks": 99}}}, "ladder.reasks"),
        ({**schema({}), "extra_body": {"ladder": {"rungs": ["native", "grammar"]}}}, "response_format"),
        ({"tools": [WEATHER], "extra_body": {"ladder": {"rungs": ["grammar"]}}}, "tools"),
    ):
        with pytest.raises(openai.BadRequestError) as caught:
            await openai_client.chat.completions.create(model="city", messages=[USER], **fields)
        assert caught.value.param == param, fields
    assert await outcomes(cluster.bus) == {}


async def test_the_clients_own_limit_ends_an_answer_in_the_words_of_the_api(
    cluster: Cluster, openai_client: openai.AsyncOpenAI
) -> None:
    await deploy(
        cluster,
        "city",
        ['{"name": "Ulm an der Donau in', '{"name": "Ulm an der Donau in', '{"name": "Ulm an der Donau in'],
    )
    asked: Any = {"model": "city", "messages": [USER], "max_tokens": 3}
    got = await openai_client.chat.completions.create(**asked, response_format=FORMAT)
    assert got.choices[0].finish_reason == "length"
    with pytest.raises(openai.LengthFinishReasonError):
        await deploy(cluster, "city2", ['{"name": "Ulm an der Donau in'])
        await openai_client.chat.completions.parse(**{**asked, "model": "city2"}, response_format=City)


async def test_one_key_is_one_run_however_often_the_model_was_asked(
    cluster: Cluster, start: Start, http: aiohttp.ClientSession
) -> None:
    # Each attempt gives another text: who asks the model again hears something else.
    await deploy(cluster, "learner", ["no", "still no", RIGHT, '{"name": "Bonn", "people": 1}'], interval_ms=100)
    first, second = start("--address", cluster.server.url), start("--address", cluster.server.url)
    for gateway in (first, second):
        await gateway.ready()
    body = {"model": "learner", "messages": [USER], "response_format": FORMAT, "stream": True}
    headers = {"Idempotency-Key": "k"}

    async def asked(url: str) -> str:
        async with http.post(url + CHAT, json=body, headers=headers) as response:
            assert response.status == 200
            return text_of(await all_events(response))

    lost = asyncio.create_task(asked(first.url))
    async with asyncio.timeout(60):
        while not await running(cluster.bus, "learner"):
            await asyncio.sleep(0.05)
    first.process.send_signal(signal.SIGKILL)  # in the middle of the attempts
    await asyncio.gather(lost, return_exceptions=True)
    async with asyncio.timeout(60):
        answers = await asyncio.gather(*(asked(second.url) for _ in range(3)))
        assert [*answers, await asked(second.url)] == [RIGHT] * 4
    await settled(cluster.bus, "learner")
    assert await outcomes(cluster.bus) == {"done": 1}


async def test_a_stream_is_read_on_elsewhere_and_who_hangs_up_leaves_nothing(
    cluster: Cluster, start_gateway: StartGateway, http: aiohttp.ClientSession
) -> None:
    await deploy(cluster, "learner", ["no", RIGHT], interval_ms=50)
    await deploy(cluster, "slow", ["no"], delay_ms=60_000)
    url, other = await start_gateway(headers_after_s=0.05), await start_gateway()
    body = {"model": "learner", "messages": [USER], "response_format": FORMAT, "stream": True}
    async with http.post(url + CHAT, json=body, headers={"X-Modelbus-Resumable": "true"}) as response:
        request_id = response.headers["x-request-id"]  # and gone, before the first word
    async with asyncio.timeout(60):
        async with http.get(f"{other}{CHAT}/{request_id}/stream") as response:
            events = await all_events(response)
        assert text_of(events) == RIGHT and events[-1].data == "[DONE]"
        async with http.get(f"{other}{CHAT}/{request_id}/stream", params={"starting_after": events[0].id}) as response:
            assert (await all_events(response)) == events[1:]

    async with http.post(url + CHAT, json={**body, "model": "slow"}) as response:
        assert response.status == 200
        async with asyncio.timeout(60):
            # What no worker has had is taken out of the queue, and not booked.
            while not await running(cluster.bus, "slow"):
                await asyncio.sleep(0.05)
    await settled(cluster.bus, "slow")
    assert await booked(cluster.bus, 2) == {"done": 1, "cancelled": 1}
