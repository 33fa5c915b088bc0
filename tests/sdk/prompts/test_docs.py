"""Every Python example of the pages on the SDK and on prompt functions runs as it stands there, on the engine `scripted`."""

from __future__ import annotations

import json
from collections.abc import Iterator

import modelbus
import pytest
from modelbus_broker.messages import Deployment

from tests.helpers.cluster import echo_deployment
from tests.helpers.doc_blocks import DOCS, run_page
from tests.helpers.prompting import shared_bus

#: What the model of the pages says, by what it is asked.
SAYS: dict[str, str | dict[str, object]] = {
    "people live in Paris": {"tool_calls": [{"name": "population", "arguments": {"city": "Paris"}}]},
    "2100000": "About 2.1 million.",
    "What time is it": {"tool_calls": [{"name": "compute_now", "arguments": {}}]},
    "Tell a story": '{"title": "The brave rabbit", "body": "Once there was a rabbit."}',
    "capital of France": "Paris",
    "recipe for pancakes": '{"name": "Pancakes", "minutes": 20}',
    "recipes, please": '{"value": [{"name": "Tea", "minutes": 5}, {"name": "Toast", "minutes": 3}]}',
    "good or bad": '{"value": "good"}',
    "sight of Paris": "The Louvre",
    "tale about a bus": "Once upon a time there was a bus.",
}


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    rules = [{"pattern": pattern, "answer": answer} for pattern, answer in SAYS.items()]
    script = json.dumps({"rules": rules, "otherwise": "schema"})
    scripted = Deployment(name="chat", model="chat", engine="scripted", revision="1", engine_params={"script": script})
    with shared_bus(
        tmp_path_factory.mktemp("bus"),
        {"chat": scripted, "wordy": echo_deployment("wordy"), "emb": echo_deployment("emb")},
    ) as url:
        yield url


@pytest.mark.parametrize("page", ["prompts.md", "cookbook-byzerllm.md", "sdk.md"])
def test_the_examples_of_a_page_are_right(page: str, address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MODELBUS_ADDRESS", address)
    try:
        run_page(DOCS / page)
    finally:
        modelbus.disconnect()
