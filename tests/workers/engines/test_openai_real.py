"""The openai engine against ``transformers serve``, a server that this project did not write."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator

import pytest
from modelbus_broker.errors import DeploymentFailed
from modelbus_workers.engines.base import EngineConfig
from modelbus_workers.engines.openai import OpenAIEngine

from tests.helpers.smollm2 import smollm2
from tests.helpers.transformers_serve import Served, transformers_serve
from tests.workers.engines import contract
from tests.workers.engines.contract import ask, chat

pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")
pytest.importorskip("torch")

#: The server leaves the stop string in the text and ignores ``n`` and ``logprobs``.
NOT_THIS_SERVER = {
    contract.check_a_stop_string_ends_the_text_before_it,
    contract.check_several_choices_are_told_apart,
    contract.check_log_probabilities_are_probabilities,
}


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with transformers_serve(smollm2(), tmp_path_factory.mktemp("serve")) as served:
        yield served


def make(served: Served, model: str = "") -> OpenAIEngine:
    params = {"base_url": served.base_url, "api_key": "xxxx", "model": model or served.model}
    return OpenAIEngine(EngineConfig(model="chat", params=params, pretrained_model_type="saas/openai"))


@pytest.fixture
async def engine(served: Served) -> AsyncIterator[OpenAIEngine]:
    engine = make(served)
    await engine.start()
    yield engine
    await engine.close()


@pytest.mark.parametrize(
    "check", [check for check in contract.CHECKS if check not in NOT_THIS_SERVER], ids=lambda check: check.__name__
)
async def test_openai_keeps_the_contract(check: contract.Check, engine: OpenAIEngine) -> None:
    await check(engine)


async def test_a_real_model_answers(engine: OpenAIEngine) -> None:
    answer = await ask(engine, chat("What is the capital of France?", max_tokens=20))
    assert "Paris" in answer.texts[0]
    assert answer.reasons == {0: "stop"}
    assert len(answer.outputs) > 3, "it streams"
    assert not answer.usage.estimated
    assert answer.usage.prompt_tokens == 37


async def test_a_wrong_model_name_fails_the_self_test_with_the_servers_words(served: Served) -> None:
    engine = make(served, "gpt-17")
    await engine.start()
    try:
        with pytest.raises(DeploymentFailed, match="Server is pinned to .*; requested 'gpt-17'"):
            await engine.self_test()
    finally:
        await engine.close()
