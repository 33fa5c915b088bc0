"""The vllm engine on a real vLLM for CPUs and a real model. Run inside .venv-vllm; see test_vllm_environment.py."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import pytest_asyncio
from modelbus.answers import ChoiceAnswer
from modelbus.decisions import judge
from modelbus_broker.connection import Bus
from modelbus_broker.errors import (
    ConfigurationError,
    ContextLengthExceeded,
    DeploymentFailed,
    EngineFailed,
    InvalidRequest,
    UnsupportedField,
    WorkerLost,
)
from modelbus_broker.messages import Adapter, Chat, ChatMessage, Completion, Decision, Delta, Deployment, Sampling
from modelbus_broker.names import new_worker_id
from modelbus_broker.server import EmbeddedServer, ServerSettings
from modelbus_broker.settings import BusSettings
from modelbus_broker.topology import declare_bus
from modelbus_workers.engines.base import EngineConfig, Output, Run
from modelbus_workers.engines.openai import OpenAIEngine
from modelbus_workers.engines.torch_model.plan import Plan
from modelbus_workers.engines.torch_model.prompts import chat_prompt
from modelbus_workers.engines.vllm import VllmEngine
from modelbus_workers.engines.vllm_model.arguments import engine_arguments
from modelbus_workers.engines.vllm_model.last_words import cause
from modelbus_workers.engines.vllm_model.loading import settled
from modelbus_workers.engines.vllm_model.stretches import Stretch, next_stretch
from modelbus_workers.forms import Forms
from modelbus_workers.job import WorkerJob
from modelbus_workers.worker import Worker

from tests.helpers.cluster import Cluster
from tests.helpers.smollm2 import smollm2
from tests.helpers.vllm_forks import vllm_forks
from tests.workers.engines.contract import CHECKS, GREEDY, Check, ask, chat, goes_on_anywhere, outputs_of

pytestmark = [
    pytest.mark.asyncio(loop_scope="module"),
    pytest.mark.timeout(300),
    # vLLM's and its libraries' own are not ours to repair.
    pytest.mark.filterwarnings("ignore"),
]

#: Little memory, no compiling, and numbers as exact as an answer that is cut and gone on with needs.
PARAMS = {
    "dtype": "float32",
    "enforce_eager": "true",
    "kv_cache_memory_bytes": str(256 << 20),
    "max_model_len": "1024",
    "max_num_seqs": "4",
}
WEATHER: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "enum": ["Paris", "Rome"]}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}


def made(folder: Path, **params: str) -> VllmEngine:
    return VllmEngine(EngineConfig(model="m", model_path=str(folder), params=PARAMS | params))


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def engine() -> AsyncIterator[VllmEngine]:
    engine = made(smollm2())
    with pytest.MonkeyPatch.context() as patch, vllm_forks():
        # vLLM compiles a helper for log probabilities at its first use even when told to be eager.
        patch.setenv("TORCHDYNAMO_DISABLE", "1")
        await engine.start()
    yield engine
    await engine.close()


def question(text: str = "What is the capital of France?", **fields: Any) -> Chat:
    sampling = {"max_tokens": 24} | GREEDY | fields.pop("sampling", {})
    return Chat(messages=[ChatMessage(role="user", content=text)], sampling=Sampling(**sampling), **fields)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
async def test_it_keeps_the_contract_of_engines(engine: VllmEngine, check: Check) -> None:
    await check(engine)


async def test_the_capital_of_france_is_paris(engine: VllmEngine) -> None:
    answer = await ask(engine, question())

    assert "Paris" in answer.texts[0]
    assert answer.reasons == {0: "stop"}
    assert engine.slots == 4


async def test_labels_are_scored_as_if_the_model_had_written_them(engine: VllmEngine) -> None:
    asked, labels = question().messages, ["Paris", "London", "Kuala Lumpur"]
    made = [output async for output in engine.answer(Decision(messages=asked, labels=labels), Run(id="labels"))]
    scores = [output.logprobs for output in made if isinstance(output, Output)]
    judged = judge([ChoiceAnswer(index=index, logprobs=own) for index, own in enumerate(scores)], len(labels))
    assert judged.probabilities[0] == max(judged.probabilities) and 0 < judged.mass <= 1
    assert [len(own) for own in scores][:2] == [1, 1] and len(scores[2]) > 2
    # The same by another way: the label at the end of a prompt that is echoed with its scores.
    prompt = chat_prompt(engine._running.text, question())
    task = Completion(
        prompt=[[*prompt, *(score.token_id for score in scores[2])]],
        echo=True,
        sampling=Sampling(max_tokens=1, logprobs=0),
    )
    echoing = [output async for output in engine.answer(task, Run(id="echo")) if isinstance(output, Output)]
    echoed = [score for output in echoing for score in output.logprobs][len(prompt) :]
    assert [s.token_id for s in echoed[: len(scores[2])]] == [s.token_id for s in scores[2]]
    assert [s.logprob for s in echoed[: len(scores[2])]] == pytest.approx([s.logprob for s in scores[2]], abs=1e-3)
    with pytest.raises(ContextLengthExceeded):
        long = Decision(messages=asked, labels=["yes", "no " * 2000])
        [output async for output in engine.answer(long, Run(id="long"))]


async def test_the_tool_that_is_meant_is_called_wherever_it_stands(engine: VllmEngine) -> None:
    music = {"type": "function", "function": {"name": "play_music", "description": "Plays a song.", "parameters": {}}}
    weather = {"type": "function", "function": {**WEATHER["function"], "description": "Tells the weather in a city."}}
    for tools in ([music, weather], [weather, music]):
        task = question(
            "Do I need an umbrella in Paris?", tools=tools, tool_choice="required", parallel_tool_calls=False
        )
        outputs = [output async for output in Forms(engine).answer(task, Run(id="tools")) if isinstance(output, Output)]
        assert [call.name for output in outputs for call in output.tool_calls] == ["weather"]


async def test_a_stop_string_across_the_cut_is_honoured(engine: VllmEngine) -> None:
    whole = (await ask(engine, question())).texts[0]
    stop = whole[3:18]

    outputs = await goes_on_anywhere(engine, question(sampling={"stop": [stop]}))

    assert "".join(output.text for output in outputs) == whole[:3]


async def test_min_tokens_and_max_tokens_count_what_an_earlier_run_made(engine: VllmEngine) -> None:
    outputs = await goes_on_anywhere(
        engine, question("Say yes.", sampling={"min_tokens": 12, "max_tokens": 14}), cuts=(0, 5, 12)
    )

    assert 12 <= sum(len(output.token_ids) for output in outputs) <= 14


async def test_a_repetition_penalty_counts_what_an_earlier_run_made(engine: VllmEngine) -> None:
    await goes_on_anywhere(engine, question(sampling={"repetition_penalty": 1.3, "max_tokens": 10}), cuts=(0, 3, 7))


async def test_a_seed_repeats_an_answer_and_choices_differ(engine: VllmEngine) -> None:
    sampling = {"temperature": 1.5, "seed": 7, "n": 2, "max_tokens": 12}
    first = await ask(engine, question("Tell me a story.", sampling=sampling))
    second = await ask(engine, question("Tell me a story.", sampling=sampling))

    assert first.texts == second.texts
    assert first.texts[0] != first.texts[1]


async def test_an_answer_keeps_to_a_json_schema(engine: VllmEngine) -> None:
    schema = {
        "type": "object",
        "properties": {"name": {"type": "string", "maxLength": 10}, "age": {"type": "integer", "maximum": 99}},
        "required": ["name", "age"],
        "additionalProperties": False,
    }
    answer = await ask(
        engine,
        question(
            "A person as JSON.",
            sampling={"max_tokens": 100},
            response_format={"type": "json_schema", "json_schema": {"name": "person", "schema": schema}},
        ),
    )

    assert sorted(json.loads(answer.texts[0])) == ["age", "name"]
    assert answer.reasons == {0: "stop"}


@pytest.mark.parametrize(
    "extra", [{"guided_choice": ["blue", "green"]}, {"structured_outputs": {"regex": "blue|green"}}], ids=str
)
async def test_an_answer_keeps_to_a_guided_form(engine: VllmEngine, extra: dict[str, Any]) -> None:
    answer = await ask(engine, question(extra=extra))

    assert answer.texts[0] in ("blue", "green")


async def test_a_required_tool_is_called(engine: VllmEngine) -> None:
    answer = await ask(
        engine,
        question("How is the weather in Rome?", tools=[WEATHER], tool_choice="required", parallel_tool_calls=False,
                 sampling={"max_tokens": 60}),
    )  # fmt: skip

    calls = [call for output in answer.outputs for call in output.tool_calls]
    assert calls[0].name == "weather"
    assert json.loads("".join(call.arguments for call in calls))["city"] in ("Paris", "Rome")
    assert answer.reasons == {0: "tool_calls"}


@pytest.mark.parametrize(
    "fields",
    [
        {"response_format": {"type": "json_object"}, "sampling": {"max_tokens": 20}},
        {"extra": {"guided_regex": "(blue|green), (red|white) and black"}},
        {"tools": [WEATHER], "tool_choice": "required", "parallel_tool_calls": False, "sampling": {"max_tokens": 60}},
        {"sampling": {"presence_penalty": 0.4, "frequency_penalty": 0.4, "n": 2, "max_tokens": 12}},
        {"extra": {"bad_words": [" of France is", "Paris"]}},
    ],
    ids=str,
)
async def test_what_vllm_counts_of_its_own_output_goes_on_too(engine: VllmEngine, fields: dict[str, Any]) -> None:
    text = "Name blue, green, blue, red, blue and the capital of France. Repeat: blue, blue, blue."
    whole = await goes_on_anywhere(engine, question(text, **fields), cuts=(1, 4, 8))

    assert len(whole) > 5


@pytest.mark.parametrize("fields", [{"presence_penalty": 2.0}, {"frequency_penalty": 2.0}], ids=str)
async def test_penalties_that_are_felt_go_on(engine: VllmEngine, fields: dict[str, Any]) -> None:
    def task(**fields: Any) -> Completion:
        sampling = Sampling(max_tokens=14, **GREEDY, **fields)
        return Completion(prompt=["ha ha ha ha ha ha ha ha ha ha ha"], sampling=sampling)

    outputs = await goes_on_anywhere(engine, task(**fields), cuts=(1, 4, 9))

    assert "".join(output.text for output in outputs) != (await ask(engine, task())).texts[0]


async def test_penalties_beside_each_other_are_refused_in_words(engine: VllmEngine) -> None:
    with pytest.raises(EngineFailed, match="cannot go on with presence_penalty"):
        await ask(
            engine, question(sampling={"presence_penalty": 0.5, "repetition_penalty": 1.2}),
            output_token_ids=[[260]], emitted_chars=[1],
        )  # fmt: skip


async def test_a_stretch_ends_where_its_biases_would_become_wrong() -> None:
    plan = Plan(presence_penalty=1.0, frequency_penalty=0.5)

    assert next_stretch(plan, [], [[1, 2]]) == Stretch()
    counted = next_stretch(plan, [7, 8, 7], [])
    assert counted == Stretch(biases={7: -2.0, 8: -1.5}, until=frozenset({7, 8}))
    assert next_stretch(Plan(), [7, 8], [[8, 9], [1, 2, 3]]) == Stretch(biases={9: -100.0}, one_token=True)
    assert next_stretch(Plan(), [7, 1], [[8, 9], [1, 2, 3]]) == Stretch(one_token=True)
    assert next_stretch(Plan(), [7, 1, 2], [[9], [1, 2, 3]]) == Stretch(biases={3: -100.0}, one_token=True)


async def test_bad_words_and_allowed_tokens_are_kept_to(engine: VllmEngine) -> None:
    without = await ask(engine, question(extra={"bad_words": ["Paris"]}))
    allowed = await ask(engine, question(sampling={"max_tokens": 3}, extra={"allowed_token_ids": [260, 253]}))

    assert "Paris" not in without.texts[0]
    assert set(allowed.token_ids[0]) <= {260, 253}


async def test_the_prompt_is_echoed_with_its_scores(engine: VllmEngine) -> None:
    task = Completion(
        prompt=["One, two, three"], echo=True, sampling=Sampling(max_tokens=2, logprobs=1, **GREEDY),
        extra={"prompt_logprobs": 2},
    )  # fmt: skip
    answer = await ask(engine, task)

    scores = [score for output in answer.outputs for score in output.logprobs]
    assert answer.texts[0].startswith("One, two, three")
    assert "".join(score.token for score in scores) == answer.texts[0]
    told = answer.outputs[0].prompt_logprobs
    assert told[0] is None and all(score is not None and len(score.top) == 2 for score in told[1:])
    assert len(told) == answer.prompt_tokens
    alone = await ask(engine, Completion(prompt=["One, two"], echo=True, sampling=Sampling(max_tokens=0, logprobs=0)))
    assert alone.texts[0] == "One, two"
    assert alone.token_ids[0] == []


async def test_several_prompts_have_their_own_choices(engine: VllmEngine) -> None:
    task = Completion(prompt=["One, two, three,", "A, B, C,"], sampling=Sampling(max_tokens=4, n=2, **GREEDY))
    answer = await ask(engine, task)

    assert sorted(answer.texts) == [0, 1, 2, 3]
    assert answer.texts[0] == answer.texts[1] != answer.texts[2] == answer.texts[3]


async def test_an_answer_that_is_left_is_aborted_in_vllm(engine: VllmEngine) -> None:
    outputs = outputs_of(engine, question("Tell me a very long story.", sampling={"max_tokens": 400}))
    async for output in outputs:
        if isinstance(output, Output):
            break
    await outputs.aclose()

    assert engine._running.engine.output_processor.get_num_unfinished_requests() == 0


@pytest.mark.parametrize(
    ("extra", "sampling", "param"),
    [
        ({"guided_json": {"type": "nonsense"}}, {}, "structured_outputs"),
        ({"guided_regex": "a", "guided_choice": ["a"]}, {}, "guided_choice"),
        ({"allowed_token_ids": [10**9]}, {}, "allowed_token_ids"),
        ({"prompt_logprobs": 999}, {}, "prompt_logprobs"),
        ({"bad_words": 5}, {}, "bad_words"),
        ({}, {"logprobs": 999}, "logprobs"),
        ({}, {"top_p": 3.0}, "top_p"),
    ],
    ids=str,
)
async def test_a_wrong_field_is_named(
    engine: VllmEngine, extra: dict[str, Any], sampling: dict[str, Any], param: str
) -> None:
    with pytest.raises(InvalidRequest) as refused:
        await ask(engine, question(extra=extra, sampling=sampling))

    assert refused.value.param == param


async def test_an_adapter_needs_a_deployment_that_takes_them(engine: VllmEngine) -> None:
    assert not engine.capabilities().adapters
    with pytest.raises(UnsupportedField, match="enable_lora"):
        await ask(engine, question(), adapter=Adapter(name="a", path="/nowhere"))


async def test_vllm_serve_is_a_worker_too_with_what_it_can_do(engine: VllmEngine) -> None:
    """vLLM's own server, on the engine of these tests, behind the engine ``openai``."""
    import uvicorn
    from vllm.entrypoints.launchers.api_server.app_state import init_app_state
    from vllm.entrypoints.launchers.api_server.entry import build_app
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    core = engine._running.engine
    tasks = await core.get_supported_tasks()
    said = {}
    for more in ([], ["--enable-auto-tool-choice", "--tool-call-parser", "hermes"]):
        command = ["--model", str(smollm2()), "--served-model-name", "smol", *more]
        args = make_arg_parser(FlexibleArgumentParser()).parse_args(command)
        app = build_app(args, tasks, core.model_config)
        await init_app_state(core, app.state, args, tasks)
        with socket.create_server(("127.0.0.1", 0)) as listening:
            server = uvicorn.Server(uvicorn.Config(app, log_level="error"))
            serving = asyncio.create_task(server.serve(sockets=[listening]))
            params = {"base_url": f"http://127.0.0.1:{listening.getsockname()[1]}/v1"}
            outside = OpenAIEngine(EngineConfig(model="m", params=params, pretrained_model_type="saas/vllm"))
            await outside.start()
            await outside.self_test()
            said[bool(more)] = outside.capabilities()
            if more:
                answer = await ask(outside, question())
                guided = await ask(outside, question(extra={"structured_outputs": {"choice": ["blue", "green"]}}))
                with pytest.raises(ContextLengthExceeded, match="1024"):
                    await ask(outside, question("many words " * 1024))
            await outside.close()
            server.should_exit = True
            await serving

    assert said[True].tasks == ["chat", "completion"]
    assert said[True].context_length == 1024
    assert said[True].tools and not said[False].tools
    assert answer.texts == (await ask(engine, question())).texts
    assert answer.usage.prompt_tokens == (await ask(engine, question())).usage.prompt_tokens
    assert guided.texts[0] in ("blue", "green")


async def test_a_step_of_vllm_is_one_message_for_all_its_requests(
    engine: VllmEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def nothing() -> None:
        pass

    # The worker would start and end the engine of all tests.
    monkeypatch.setattr(engine, "start", nothing)
    monkeypatch.setattr(engine, "close", nothing)
    messages: list[int] = []
    deployment = Deployment(name="m", model="m", engine="vllm", revision="1")
    async with EmbeddedServer(ServerSettings(store=tmp_path / "nats")) as server:
        settings = BusSettings(url=server.url)
        async with await Bus.connect(settings, name="test") as bus, await Bus.connect(settings, name="worker") as own:
            await declare_bus(bus)
            cluster = Cluster(bus=bus, server=server, folder=tmp_path)
            await cluster.declare(deployment)
            job = WorkerJob(worker_id=new_worker_id(), deployment=deployment, bus=settings, replica=0, node="test")
            worker = Worker(job, own, engine)
            serving = asyncio.create_task(worker.run())
            await cluster.wait_ready("m", 1)
            publisher = await cluster.publisher()
            await bus.subscribe("mb.rsp.>", lambda message: messages.append(len(message.data)))
            before = engine.steps

            calls = [
                await publisher.submit(
                    "m", question(f"Tell me a story of the number {number}.", sampling={"max_tokens": 40})
                )
                for number in range(4)
            ]
            frames = [[frame async for batch in call.batches() for frame in batch] for call in calls]

            steps = engine.steps - before
            worker.draining.begun.set()
            await serving
            await cluster.close()
    deltas = sum(isinstance(frame, Delta) for answer in frames for frame in answer)
    # Besides the steps each request has a message or two of its own: accepted, started, the end.
    assert 150 <= deltas <= 160
    assert 40 <= steps < 60
    assert len(messages) <= steps + 3 * len(calls)


async def test_its_metrics_are_those_of_vllm(engine: VllmEngine) -> None:
    await ask(engine, question())

    for name in (
        "generation_tokens_total",
        "time_to_first_token_seconds_bucket",
        "kv_cache_usage_perc",
        "num_requests_running",
    ):
        assert f"vllm:{name}" in engine.metrics()
    assert "python_gc" not in engine.metrics()


@pytest.mark.parametrize(
    ("params", "words"),
    [
        ({"max_num_seq": "3"}, "max_num_seqs"),
        ({"max_model_len": "many"}, "max_model_len"),
        ({"tool_parser": "hermess"}, "hermes"),
        ({"reasoning_parser": "deepseek_r"}, "deepseek_r1"),
        ({"tool_call_parser": "pythonic", "tool_parser": "hermes"}, "the same parameter"),
    ],
    ids=str,
)
async def test_a_wrong_parameter_is_named(params: dict[str, str], words: str) -> None:
    with pytest.raises(ConfigurationError, match=words):
        await made(smollm2(), **params).start()


@pytest.mark.parametrize(
    ("gpus", "params", "expected"),
    [
        (0, {}, None),
        (2, {}, 2),
        (4, {"pipeline_parallel_size": "2"}, 2),
        (4, {"tensor_parallel_size": "1"}, 1),
        (3, {"pipeline_parallel_size": "2"}, "a multiple of 2"),
        (2, {"tensor_parallel_size": "4"}, "--gpus_per_worker 4"),
        (2, {"tensor_parallel_size": "2", "data_parallel_size": "2"}, "over 4 GPUs"),
    ],
    ids=str,
)
async def test_a_model_is_spread_over_the_gpus_that_its_replica_claimed(
    gpus: int, params: dict[str, str], expected: int | str | None
) -> None:
    from vllm import AsyncEngineArgs

    config = EngineConfig(model="m", model_path="/m", params=params, gpus=tuple(range(gpus)))
    if isinstance(expected, str):
        with pytest.raises(ConfigurationError, match=expected):
            engine_arguments(AsyncEngineArgs, config, params)
    else:
        assert engine_arguments(AsyncEngineArgs, config, params).get("tensor_parallel_size") == expected


async def test_what_nobody_sets_is_as_vllm_serve_has_it() -> None:
    """It depends on what vLLM is told that the engine is for; with two processes the numbers of a CPU differ too."""
    from vllm import AsyncEngineArgs
    from vllm.usage.usage_lib import UsageContext

    said = {"dtype": "float32", "tensor_parallel_size": "3"}
    arguments = engine_arguments(AsyncEngineArgs, EngineConfig(model="m", model_path=str(smollm2())), said)
    ours = settled(AsyncEngineArgs(**arguments)).scheduler_config
    theirs, unsaid = (
        AsyncEngineArgs(**arguments).create_engine_config(context).scheduler_config
        for context in (UsageContext.OPENAI_API_SERVER, UsageContext.ENGINE_CONTEXT)
    )

    assert (ours.max_num_seqs, ours.max_num_batched_tokens) == (theirs.max_num_seqs, theirs.max_num_batched_tokens)
    assert ours.max_num_seqs > unsaid.max_num_seqs


async def test_a_context_that_the_model_was_not_made_for_is_told_in_vllms_words() -> None:
    with pytest.raises(DeploymentFailed, match="max_model_len"):
        await made(smollm2(), max_model_len="99999999").start()


async def test_an_unknown_architecture_is_told_in_vllms_words(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    for file in smollm2().iterdir():
        if file.name != "config.json":
            (folder / file.name).symlink_to(file)
    config = json.loads((smollm2() / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"architectures": ["NobodysForCausalLM"]}))

    with pytest.raises(DeploymentFailed, match="NobodysForCausalLM"):
        await made(folder).start()


async def test_why_the_engine_core_could_not_start_is_in_the_message() -> None:
    with pytest.raises(DeploymentFailed, match="(?i)memory|kv cache|cache blocks"):
        await made(smollm2(), kv_cache_memory_bytes="100000").start()


async def test_the_last_error_that_says_a_reason_is_the_cause() -> None:
    assert cause([
        "(EngineCore pid=1) ERROR 11-26 06:00:00 [core.py:1] Traceback (most recent call last):",
        "(EngineCore pid=1) ERROR 11-26 06:00:00 [core.py:1] ValueError: no memory left",
        "RuntimeError: Engine core initialization failed. See root cause above.",
    ]) == "ValueError: no memory left"  # fmt: skip


async def test_a_dead_engine_core_fails_its_requests_for_other_workers_and_ends_this_one(engine: VllmEngine) -> None:
    """The last one: nothing of the shared engine is left after it."""
    assert engine.broken == ""
    before = engine.steps
    asking = asyncio.create_task(ask(engine, chat("Tell me a very long story.", max_tokens=400)))
    while engine.steps == before:
        await asyncio.sleep(0.05)
    children = psutil.Process().children(recursive=True)
    core = next(child for child in children if child.name().startswith("VLLM::EngineCo"))
    core.kill()

    with pytest.raises(WorkerLost, match="engine core has died"):
        await asking
    assert "died" in engine.broken
