"""Typed answers over a real bus, from a model that knows nothing of forms."""

from __future__ import annotations

import dataclasses
from collections.abc import AsyncIterator

import modelbus
import pytest
import pytest_asyncio
from modelbus.structure import Ladder, OutputError, Retry, answer, output_type, tool_calls
from modelbus_broker.errors import UnsupportedField

from tests.helpers.cluster import Cluster


@dataclasses.dataclass
class City:
    name: str
    people: int


@pytest_asyncio.fixture
async def client(cluster: Cluster) -> AsyncIterator[modelbus.Client]:
    await cluster.deploy_echo("city", text='Sure! ```json\n{"name": "Ulm", "people": 126000}\n```')
    await cluster.deploy_echo("wrong", text='{"name": "Ulm", "people": "many"}')
    async with modelbus.connect(cluster.server.url) as client:
        yield client


async def test_the_ladder_over_the_bus(client: modelbus.Client) -> None:
    found = await answer(client, "city", "Which city?", City)

    assert found.value == City("Ulm", 126000)
    assert (found.rung, found.attempts, found.model) == ("prompted", 1, "city")
    assert found.raw.startswith("Sure!") and found.request_id
    assert [message.role for message in found.messages] == ["assistant"]
    assert found.usage.completion_tokens > 0

    def not_too_small(city: City) -> None:
        asked.append(city)
        if len(asked) < 3:
            raise Retry("take a larger one")

    asked: list[City] = []
    found = await answer(client, "city", "Which city?", output_type(City).with_validators(not_too_small))
    assert (found.rung, found.attempts, len(asked)) == ("reasked", 3, 3)
    assert [message.role for message in found.messages] == ["assistant", "user", "assistant", "user", "assistant"]
    assert "take a larger one" in found.messages[1].text()

    with pytest.raises(OutputError) as caught:
        await answer(client, "wrong", "Which city?", City, ladder=Ladder(reasks=1))
    assert caught.value.problems == ["people: expected a whole number, got the text 'many'"]
    assert "many" in caught.value.raw

    with pytest.raises(UnsupportedField, match="native, grammar"):
        await answer(client, "city", "Which city?", City, ladder=Ladder(rungs=("native", "grammar")))

    thought = await answer(client, "city", "Which city?", City, ladder=Ladder(reason_first=True))
    assert (thought.value.name, thought.attempts, thought.rung) == ("Ulm", 2, "prompted")

    tool = {
        "type": "function",
        "function": {"name": "look_up", "parameters": {"type": "object", "properties": {"name": {"type": "string"}}}},
    }
    with pytest.raises(OutputError, match="there is no tool 'Ulm'"):
        await answer(client, "wrong", "Which city?", tool_calls([tool], choice="required"), ladder=Ladder(reasks=0))
