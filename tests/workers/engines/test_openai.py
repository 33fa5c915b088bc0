"""The openai engine against a provider that misbehaves on command."""

from __future__ import annotations

import asyncio
import logging
from base64 import b64encode
from collections.abc import AsyncIterator
from contextlib import aclosing
from struct import pack
from typing import Any

import pytest
from aiohttp import web
from modelbus import tracing
from modelbus_broker.errors import (
    ConfigurationError,
    ContextLengthExceeded,
    DeploymentFailed,
    InvalidRequest,
    ModelBusError,
    RequestTooLarge,
    StreamCut,
    UnsupportedField,
    UpstreamFailed,
)
from modelbus_broker.messages import Chat, ChatMessage, Completion, Embedding, Sampling, Usage
from modelbus_workers.engines.base import EngineConfig, Output, Run, engine_class
from modelbus_workers.engines.openai import OpenAIEngine
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from tests.workers.engines.contract import ask, chat, outputs_of
from tests.workers.engines.misbehaving import USAGE, Provider, chunk, running_provider, say, stream

KEY = "sk-very-secret-key-123"
DONE = b"data: [DONE]\n\n"


@pytest.fixture
async def provider() -> AsyncIterator[Provider]:
    async with running_provider() as provider:
        yield provider


@pytest.fixture
async def engines() -> AsyncIterator[list[OpenAIEngine]]:
    engines: list[OpenAIEngine] = []
    yield engines
    for engine in engines:
        await engine.close()


@pytest.fixture
async def engine(provider: Provider, engines: list[OpenAIEngine]) -> OpenAIEngine:
    return await started(provider, engines)


async def started(provider: Provider, engines: list[OpenAIEngine], kind: str = "", **params: str) -> OpenAIEngine:
    made = make(kind, **({"base_url": provider.url, "api_key": KEY, "model": "m"} | params))
    await made.start()
    engines.append(made)
    return made


def make(kind: str = "", **params: str) -> OpenAIEngine:
    config = EngineConfig(
        model="chat",
        params={name.replace("__", "."): value for name, value in params.items()},
        secret_params=frozenset({"api_key"}),
        pretrained_model_type=kind or "saas/openai",
    )
    return OpenAIEngine(config)


async def failure(engine: OpenAIEngine, task: Chat | Completion | Embedding) -> tuple[str, ModelBusError]:
    """What was said before the error, and the error."""
    said = ""
    with pytest.raises(ModelBusError) as caught:
        async for output in outputs_of(engine, task):
            said += output.text if isinstance(output, Output) else ""
    return said, caught.value


def test_it_is_found_by_its_name() -> None:
    assert engine_class("openai") is OpenAIEngine


async def test_a_stream_comes_through_with_usage_and_the_providers_model(
    engine: OpenAIEngine, provider: Provider
) -> None:
    provider.script = lambda request, number: say(request, "Hel", "lo")
    answer = await ask(engine, chat("hi"))
    assert answer.texts == {0: "Hello"}
    assert answer.reasons == {0: "stop"}
    assert answer.usage == Usage(prompt_tokens=7, completion_tokens=2)
    assert answer.finished and answer.finished.upstream_model == "m-1"
    assert engine.capabilities().context_length == 4096


async def test_every_field_of_the_request_reaches_the_provider(engine: OpenAIEngine, provider: Provider) -> None:
    sampling = Sampling(
        n=1, max_tokens=5, temperature=0.5, top_p=0.9, top_k=4, min_p=0.1, stop=["x"], seed=3, presence_penalty=0.1,
        frequency_penalty=0.2, repetition_penalty=1.1, logit_bias={"7": -100.0}, logprobs=2, min_tokens=1,
    )  # fmt: skip
    tools: list[dict[str, Any]] = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
    task = Chat(
        messages=[ChatMessage(role="system", content="s"), ChatMessage(role="user", content="u", name="Bo")],
        sampling=sampling, tools=tools, tool_choice="auto", parallel_tool_calls=False,
        response_format={"type": "json_object"}, reasoning_effort="low", extra={"verbosity": "low"},
    )  # fmt: skip
    await ask(engine, task)
    assert provider.bodies[-1] == {
        "model": "m", "stream": True, "stream_options": {"include_usage": True}, "max_tokens": 5, "temperature": 0.5,
        "messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "u", "name": "Bo"}],
        "top_p": 0.9, "top_k": 4, "min_p": 0.1, "stop": ["x"], "seed": 3, "presence_penalty": 0.1,
        "frequency_penalty": 0.2, "repetition_penalty": 1.1, "logit_bias": {"7": -100.0}, "logprobs": True,
        "top_logprobs": 2, "min_tokens": 1, "tools": tools, "tool_choice": "auto", "parallel_tool_calls": False,
        "response_format": {"type": "json_object"}, "reasoning_effort": "low", "verbosity": "low",
    }  # fmt: skip
    assert provider.headers[-1]["Authorization"] == f"Bearer {KEY}"


async def test_headers_and_body_fields_of_the_deployment_are_sent(
    provider: Provider, engines: list[OpenAIEngine]
) -> None:
    engine = await started(
        provider, engines, header__X_Team="a", body__thinking='{"type": "off"}', body__tier="flex", organization="o-1"
    )
    await ask(engine, Chat(messages=[ChatMessage(role="user", content="u")], extra={"tier": "fast"}))
    assert provider.bodies[-1]["thinking"] == {"type": "off"}
    assert provider.bodies[-1]["tier"] == "fast", "the request's own field wins"
    assert provider.headers[-1]["X_Team"] == "a"
    assert provider.headers[-1]["OpenAI-Organization"] == "o-1"


async def test_the_provider_gets_the_trace_context_of_the_run_and_nothing_that_is_none(
    engine: OpenAIEngine, provider: Provider
) -> None:
    def sent() -> dict[str, str]:
        return {name.lower(): value for name, value in provider.headers[-1].items() if name.lower().startswith("trace")}

    parent, state = f"00-{'ab' * 16}-{'cd' * 8}-01", "vendor=1,other=x"
    await ask(engine, chat("hi"), traceparent=parent, tracestate=state)
    assert sent() == {"traceparent": parent, "tracestate": state}
    await ask(engine, Completion(prompt=["hi"]), traceparent=parent, tracestate="line\r\nbreak: x")
    assert sent() == {"traceparent": parent}
    for malformed in ("", "mine", parent.upper(), f"00-{'0' * 32}-{'cd' * 8}-01", f"{parent}\r\nX-Evil: 1"):
        await ask(engine, chat("hi"), traceparent=malformed, tracestate=state)
        assert sent() == {}

    async def vector(request: web.Request, number: int) -> web.StreamResponse:
        return web.json_response({"data": [{"index": 0, "embedding": [1.0]}]})

    provider.script = vector
    await ask(engine, Embedding(input=["1"]), traceparent=parent)
    assert sent() == {"traceparent": parent}


async def test_a_deployment_can_keep_the_trace_to_itself(provider: Provider, engines: list[OpenAIEngine]) -> None:
    engine = make("saas/openai_compatible", base_url=provider.url, model="m", trace_headers="false")
    await engine.start()
    engines.append(engine)

    await ask(engine, chat("hi"), traceparent=f"00-{'ab' * 16}-{'cd' * 8}-01")

    assert not [name for name in provider.headers[-1] if name.lower().startswith("trace")]


async def test_each_try_has_a_span_that_says_how_it_ended(
    engine: OpenAIEngine, provider: Provider, monkeypatch: pytest.MonkeyPatch
) -> None:
    exporter, tracers = InMemorySpanExporter(), TracerProvider()
    tracers.add_span_processor(SimpleSpanProcessor(exporter))
    monkeypatch.setattr(tracing, "tracer", lambda: tracers.get_tracer("test"))

    async def answer(request: web.Request, number: int) -> web.StreamResponse:
        if number % 2:
            return web.json_response({"error": {"message": "later"}}, status=503)
        if request.path.endswith("/embeddings"):
            return web.json_response(
                {"data": [{"index": 0, "embedding": [1.0]}], "usage": {"prompt_tokens": 4}, "model": "e-1"}
            )
        return await say(request, "Hel", "lo")

    def spans() -> list[dict[str, Any]]:
        found = [dict(span.attributes or {}) for span in exporter.get_finished_spans()]
        exporter.clear()
        return found

    parent = f"00-{'ab' * 16}-{'cd' * 8}-01"
    for task, usage in ((chat("hi"), (7, 2)), (Embedding(input=["1"]), (4, 0))):
        provider.script = answer
        await ask(engine, task, traceparent=parent)
        told = provider.headers[-1]["traceparent"].split("-")
        assert told[1] == "ab" * 16 and told[2] != "cd" * 8
        first, second = spans()
        assert first["error.type"] == "upstream_failed" and "http.request.resend_count" not in first
        assert "error.type" not in second and second["http.request.resend_count"] == 1
        assert (second[tracing.INPUT_TOKENS], second[tracing.OUTPUT_TOKENS]) == usage
        assert (second["server.address"], second[tracing.PROVIDER]) == ("127.0.0.1", "openai_compatible")

    provider.script = lambda request, number: say(request, "Hel", "lo")
    async with aclosing(engine.chat(chat("hi"), Run(id="r"))) as outputs:
        await anext(outputs)
    (left,) = spans()
    assert left["error.type"] == "request_cancelled"


async def test_azure_has_its_own_address_and_header(provider: Provider, engines: list[OpenAIEngine]) -> None:
    base = provider.url.removesuffix("/v1")
    engine = make(
        "saas/azure_openai", api_key=KEY, azure_endpoint=base, azure_deployment="dep", api_version="2025-01-01"
    )
    await engine.start()
    engines.append(engine)
    await ask(engine, chat("hi", max_tokens=3))
    assert provider.paths == ["/openai/deployments/dep/chat/completions?api-version=2025-01-01"]
    assert provider.headers[-1]["api-key"] == KEY
    assert provider.bodies[-1]["max_completion_tokens"] == 3


async def test_tool_calls_reasoning_refusal_and_logprobs_come_through(engine: OpenAIEngine, provider: Provider) -> None:
    def call(**fields: Any) -> dict[str, Any]:
        return chunk(delta={"tool_calls": [fields]})

    logprobs = {
        "content": [{"token": "A", "logprob": -0.1, "bytes": [65], "top_logprobs": [{"token": "B", "logprob": -3}]}]
    }
    provider.script = lambda request, number: stream(
        request,
        chunk(delta={"role": "assistant", "reasoning_content": "hm"}),
        chunk(delta={"reasoning": "m"}),
        chunk("A", logprobs=logprobs),
        call(index=0, id="c0", function={"name": "f", "arguments": ""}),
        call(index=0, function={"arguments": '{"x":'}),
        call(index=0, function={"arguments": "1}"}),
        call(id="c1", function={"name": "g", "arguments": {"y": 2}}),
        chunk(delta={"refusal": "no"}),
        chunk(finish="tool_calls"),
        USAGE,
        DONE,
    )
    answer = await ask(engine, chat("hi"))
    assert "".join(output.reasoning for output in answer.outputs) == "hmm"
    assert "".join(output.refusal for output in answer.outputs) == "no"
    calls = [call for output in answer.outputs for call in output.tool_calls]
    assert "".join(call.arguments for call in calls if call.name != "g") == '{"x":1}'
    assert calls[-1].arguments == '{"y": 2}'
    logprob = next(output.logprobs[0] for output in answer.outputs if output.logprobs)
    assert (logprob.token, logprob.logprob, logprob.top[0].token) == ("A", -0.1, "B")
    assert answer.reasons == {0: "tool_calls"}


async def test_cached_and_reasoning_tokens_are_told(engine: OpenAIEngine, provider: Provider) -> None:
    usage = {
        "prompt_tokens": 9, "completion_tokens": 5, "prompt_tokens_details": {"cached_tokens": 4},
        "completion_tokens_details": {"reasoning_tokens": 3, "audio_tokens": None},
    }  # fmt: skip
    provider.script = lambda request, number: stream(request, chunk("a", "length", usage=usage))
    answer = await ask(engine, chat("hi"))
    assert answer.usage == Usage(prompt_tokens=9, completion_tokens=5, cached_tokens=4, reasoning_tokens=3)


async def test_choices_are_told_apart_and_all_must_end(engine: OpenAIEngine, provider: Provider) -> None:
    provider.script = lambda request, number: stream(
        request, chunk("b", index=1), chunk("a"), chunk(finish="stop"), chunk(finish="length", index=1), USAGE, DONE
    )
    answer = await ask(engine, chat("hi", n=2))
    assert (answer.texts, answer.reasons) == ({0: "a", 1: "b"}, {0: "stop", 1: "length"})
    _, error = await failure(engine, chat("hi", n=3))
    assert isinstance(error, StreamCut)
    assert "2 of 3 choices" in error.message


@pytest.mark.parametrize("usage", [(), ({"choices": [], "usage": {"prompt_tokens": 0, "completion_tokens": 0}},)])
async def test_tokens_are_counted_when_the_provider_gives_no_usage(
    engine: OpenAIEngine, provider: Provider, usage: tuple[Any, ...]
) -> None:
    provider.script = lambda request, number: stream(request, chunk("Hello world"), chunk(finish="stop"), *usage, DONE)
    answer = await ask(engine, chat("hi there"))
    assert answer.usage.estimated
    assert answer.usage.completion_tokens == 2
    assert answer.usage.prompt_tokens > 2


async def test_an_end_without_done_is_an_end_and_a_second_done_changes_nothing(
    engine: OpenAIEngine, provider: Provider
) -> None:
    provider.script = lambda request, number: stream(request, chunk("a", "stop"), *([DONE, DONE] if number > 1 else []))
    assert (await ask(engine, chat("hi"))).texts == {0: "a"}
    assert (await ask(engine, chat("hi"))).texts == {0: "a"}


async def test_what_breaks_after_a_complete_answer_does_no_harm(engine: OpenAIEngine, provider: Provider) -> None:
    provider.script = lambda request, number: stream(request, chunk("a", "stop"), cut=True)
    assert (await ask(engine, chat("hi"))).texts == {0: "a"}
    provider.script = lambda request, number: stream(request, chunk("a", "stop"), {"error": "late"})
    assert (await ask(engine, chat("hi"))).texts == {0: "a"}


@pytest.mark.parametrize("end", [(), (DONE,)], ids=["eof", "done"])
@pytest.mark.parametrize("cut", [False, True])
async def test_a_stream_that_ends_early_is_never_an_answer(
    engine: OpenAIEngine, provider: Provider, end: tuple[bytes, ...], cut: bool
) -> None:
    provider.script = lambda request, number: stream(request, chunk("half"), 0.05, *end, cut=cut)
    said, error = await failure(engine, chat("hi"))
    assert said == "half"
    assert isinstance(error, StreamCut)
    assert len(provider.bodies) == 1, "no second try after the first token"


async def test_a_cut_before_the_first_token_is_tried_again(engine: OpenAIEngine, provider: Provider) -> None:
    provider.script = lambda request, number: (
        stream(request, chunk(), cut=True) if number == 1 else say(request, "fine")
    )
    assert (await ask(engine, chat("hi"))).texts == {0: "fine"}
    assert len(provider.bodies) == 2


@pytest.mark.parametrize("status", [429, 500, 503])
async def test_a_busy_provider_is_asked_again(engine: OpenAIEngine, provider: Provider, status: int) -> None:
    async def script(request: web.Request, number: int) -> web.StreamResponse:
        if number == 1:
            return web.json_response({"error": {"message": "busy"}}, status=status, headers={"Retry-After": "0.01"})
        return await say(request, "fine")

    provider.script = script
    assert (await ask(engine, chat("hi"))).texts == {0: "fine"}


async def test_retries_end_and_the_providers_words_and_wait_are_kept(
    provider: Provider, engines: list[OpenAIEngine]
) -> None:
    async def script(request: web.Request, number: int) -> web.StreamResponse:
        body = {"error": {"message": "slow down, please"}}
        return web.json_response(body, status=429, headers={"Retry-After": "1"})

    provider.script = script
    engine = await started(provider, engines, max_retries="1")
    _, error = await failure(engine, chat("hi"))
    assert isinstance(error, UpstreamFailed)
    assert (error.status, error.retry_after_s, error.upstream) == (429, 1.0, "slow down, please")
    assert len(provider.bodies) == 2


async def test_no_try_is_made_that_the_deadline_or_patience_forbids(engine: OpenAIEngine, provider: Provider) -> None:
    async def script(request: web.Request, number: int) -> web.StreamResponse:
        return web.json_response({"error": "later"}, status=503, headers={"Retry-After": "30"})

    provider.script = script
    with pytest.raises(UpstreamFailed, match="later"):
        await ask(engine, chat("hi"), deadline=asyncio.get_running_loop().time() + 5)
    assert len(provider.bodies) == 1


@pytest.mark.parametrize(
    ("status", "body", "kind", "our_status", "words"),
    [
        (400, {"error": {"message": "bad top_p", "param": "top_p"}}, InvalidRequest, 400, "bad top_p"),
        (422, {"detail": [{"loc": ["body", "x"], "msg": "no x"}]}, InvalidRequest, 400, "no x"),
        (400, {"error": {"message": "This model's maximum context length is 5 tokens"}}, ContextLengthExceeded, 400, "5"),
        (401, {"error": {"message": f"Incorrect API key: {KEY}"}}, UpstreamFailed, 502, "Incorrect API key: ***"),
        (403, {"message": "not for you"}, UpstreamFailed, 502, "not for you"),
        (404, {"error": {"message": "no model m"}}, UpstreamFailed, 502, "no model m"),
        (413, "too big", RequestTooLarge, 413, "too big"),
        (429, {"error": {"message": "pay", "code": "insufficient_quota"}}, UpstreamFailed, 429, "pay"),
        (302, "", UpstreamFailed, 502, "answered 302"),
    ],
)  # fmt: skip
async def test_statuses_become_our_errors_with_the_providers_words(
    engine: OpenAIEngine,
    provider: Provider,
    status: int,
    body: Any,
    kind: type[ModelBusError],
    our_status: int,
    words: str,
) -> None:
    async def script(request: web.Request, number: int) -> web.StreamResponse:
        return (
            web.Response(text=body, status=status) if isinstance(body, str) else web.json_response(body, status=status)
        )

    provider.script = script
    _, error = await failure(engine, chat("hi"))
    assert type(error) is kind
    assert error.status == our_status
    assert words in error.message
    assert KEY not in error.message + error.upstream
    assert len(provider.bodies) == 1
    if status == 400 and isinstance(body, dict):
        assert error.param == body["error"].get("param", "")


@pytest.mark.parametrize(
    "event",
    [
        {"error": {"message": f"overloaded {KEY}"}},
        {"error": "overloaded"},
        {"base_resp": {"status_code": 1004, "status_msg": "overloaded"}, "choices": []},
        {"code": 1, "message": "overloaded"},
        b'event: error\ndata: {"message": "overloaded"}\n\n',
        b'data: {"error": "overloaded "quotes""}\n\n',
        b"data: overloaded {[\n\n",
        {"choices": [{"delta": {"content": ""}, "finish_reason": "overloaded"}]},
        {"choices": [{"index": 0, "delta": 5, "finish_reason": "overloaded"}]},
    ],
    ids=str,
)
async def test_an_error_in_the_middle_of_a_stream_is_an_error(
    engine: OpenAIEngine, provider: Provider, event: Any
) -> None:
    provider.script = lambda request, number: stream(request, chunk("half"), event, chunk(finish="stop"), DONE)
    said, error = await failure(engine, chat("hi"))
    assert said == "half"
    assert isinstance(error, UpstreamFailed)
    assert "overloaded" in error.message
    assert KEY not in error.message + error.upstream


async def test_a_plain_json_answer_to_a_stream_request_is_taken(engine: OpenAIEngine, provider: Provider) -> None:
    async def script(request: web.Request, number: int) -> web.StreamResponse:
        choice = {"index": 0, "message": {"role": "assistant", "content": "whole"}, "finish_reason": "stop"}
        return web.json_response({"choices": [choice], "usage": USAGE["usage"]})

    provider.script = script
    answer = await ask(engine, chat("hi"))
    assert answer.texts == {0: "whole"}
    assert answer.usage.completion_tokens == 2


async def test_a_wrong_content_type_does_not_matter_but_garbage_does(engine: OpenAIEngine, provider: Provider) -> None:
    provider.script = lambda request, number: stream(request, b": hi\n\n", chunk("a", "stop"), kind="text/plain")
    assert (await ask(engine, chat("hi"))).texts == {0: "a"}
    provider.script = lambda request, number: stream(request, b"<html>Welcome to the router", kind="text/event-stream")
    _, error = await failure(engine, chat("hi"))
    assert isinstance(error, UpstreamFailed)
    assert "Welcome to the router" in error.message


async def test_events_may_be_split_anywhere(engine: OpenAIEngine, provider: Provider) -> None:
    raw = "".join(
        f"id: 1\r\ndata: {text}\r\n\r\n"
        for text in (
            '{"choices":[{"delta":{"content":"grün 😀"}}]}',
            '{"choices":[{"finish_reason":"stop"}]}',
            "[DONE]",
        )
    ).encode()
    pieces: list[Any] = []
    for at in range(len(raw)):
        pieces += [raw[at : at + 1], 0]
    provider.script = lambda request, number: stream(request, *pieces)
    assert (await ask(engine, chat("hi"))).texts == {0: "grün 😀"}


@pytest.mark.parametrize("events", [(5.0,), (b": ping\n\n", 5.0), (chunk(), 5.0)], ids=["head", "comment", "role"])
async def test_a_silent_provider_is_given_up_before_the_first_token(
    provider: Provider, engines: list[OpenAIEngine], events: tuple[Any, ...]
) -> None:
    engine = await started(provider, engines, first_byte_timeout_s="0.2", stall_timeout_s="0.2")
    provider.script = lambda request, number: stream(request, *events)
    _, error = await failure(engine, chat("hi"))
    assert isinstance(error, UpstreamFailed)
    assert (error.status, len(provider.bodies)) == (504, 1)


async def test_a_stream_that_stalls_is_given_up(provider: Provider, engines: list[OpenAIEngine]) -> None:
    engine = await started(provider, engines, stall_timeout_s="0.2")
    provider.script = lambda request, number: stream(request, chunk("half"), 5.0)
    said, error = await failure(engine, chat("hi"))
    assert (said, error.status) == ("half", 504)


async def test_the_limit_of_a_whole_call_counts_while_tokens_come(
    provider: Provider, engines: list[OpenAIEngine]
) -> None:
    engine = await started(provider, engines, timeout="0.3")
    provider.script = lambda request, number: stream(request, *[chunk("a"), 0.1] * 30)
    said, error = await failure(engine, chat("hi"))
    assert said
    assert error.status == 504


async def test_leaving_closes_the_connection_to_the_provider(engine: OpenAIEngine, provider: Provider) -> None:
    provider.script = lambda request, number: stream(request, chunk("a"), 60.0)
    outputs = outputs_of(engine, chat("hi"))
    await anext(outputs)
    await outputs.aclose()
    async with asyncio.timeout(10):
        while not provider.left:
            await asyncio.sleep(0.01)


async def test_cancelling_while_it_waits_closes_the_connection(engine: OpenAIEngine, provider: Provider) -> None:
    provider.script = lambda request, number: stream(request, 60.0)
    asking = asyncio.create_task(ask(engine, chat("hi")))
    async with asyncio.timeout(10):
        while not provider.bodies:
            await asyncio.sleep(0.01)
        asking.cancel()
        while not provider.left:
            await asyncio.sleep(0.01)


async def test_connections_are_used_again(engine: OpenAIEngine, provider: Provider) -> None:
    for _ in range(5):
        await ask(engine, chat("hi"))
    assert len(provider.connections) == 1


@pytest.mark.parametrize(
    ("refused", "sent", "then"),
    [
        ("Unexpected fields in the request: {'stream_options'}", "stream_options", None),
        ("'max_tokens' is not supported, use 'max_completion_tokens' instead", "max_tokens", "max_completion_tokens"),
    ],
)
async def test_a_refused_field_of_ours_is_left_out_from_then_on(
    engine: OpenAIEngine, provider: Provider, refused: str, sent: str, then: str | None
) -> None:
    async def script(request: web.Request, number: int) -> web.StreamResponse:
        if sent in provider.bodies[-1]:
            return web.json_response({"detail": refused}, status=422)
        return await say(request, "fine")

    provider.script = script
    for _ in range(2):
        assert (await ask(engine, chat("hi", max_tokens=4))).texts == {0: "fine"}
    assert [sent in body for body in provider.bodies] == [True, False, False]
    assert then is None or provider.bodies[-1][then] == 4


async def test_embeddings_come_in_batches_in_order_and_from_both_encodings(
    provider: Provider, engines: list[OpenAIEngine]
) -> None:
    async def script(request: web.Request, number: int) -> web.StreamResponse:
        inputs = provider.bodies[-1]["input"]
        rows: list[dict[str, Any]] = [{"index": i, "embedding": [float(text), 1.0]} for i, text in enumerate(inputs)]
        if number % 2:
            for row in rows:
                row["embedding"] = b64encode(pack("<2f", *row["embedding"])).decode()
        return web.json_response({"data": rows[::-1], "usage": {"prompt_tokens": len(rows), "total_tokens": 9}})

    provider.script = script
    engine = await started(provider, engines, model="text-embedding-x", embedding_batch="2")
    assert engine.capabilities().tasks == ["embedding"]
    answer = await ask(engine, Embedding(input=["1", "2", "3"], dimensions=2))
    assert answer.vectors == [pack("<2f", number, 1.0) for number in (1, 2, 3)]
    assert answer.usage == Usage(prompt_tokens=3)
    assert provider.bodies[-1]["dimensions"] == 2


@pytest.mark.parametrize(
    "body",
    [
        {"data": []},
        {"data": [{"embedding": [1.0]}, {"embedding": [1.0]}]},
        {"data": [{"embedding": "x!"}]},
        {"error": {"message": "no embeddings here"}},
    ],
    ids=str,
)
async def test_embeddings_that_do_not_fit_the_inputs_are_an_error(
    provider: Provider, engines: list[OpenAIEngine], body: Any
) -> None:
    async def script(request: web.Request, number: int) -> web.StreamResponse:
        return web.json_response(body)

    provider.script = script
    engine = await started(provider, engines, task="embedding")
    _, error = await failure(engine, Embedding(input=["a"]))
    assert isinstance(error, UpstreamFailed)


async def test_completions_carry_their_prompt_as_it_is(engine: OpenAIEngine, provider: Provider) -> None:
    def text(index: int, text: str) -> dict[str, Any]:
        logprobs = {"tokens": [text], "token_logprobs": [-0.5], "top_logprobs": [{text: -0.5}]}
        return {"choices": [{"index": index, "text": text, "finish_reason": "stop", "logprobs": logprobs}]}

    provider.script = lambda request, number: stream(request, text(0, "a"), text(1, "b"), USAGE, DONE)
    answer = await ask(engine, Completion(prompt=["x", [1, 2]], sampling=Sampling(logprobs=1), suffix="!"))
    assert answer.texts == {0: "a", 1: "b"}
    assert answer.outputs[0].logprobs[0].top[0].logprob == -0.5
    assert provider.bodies[-1]["prompt"] == ["x", [1, 2]]
    assert provider.bodies[-1]["suffix"] == "!"


async def test_start_fails_with_the_providers_words_about_a_wrong_key(
    provider: Provider, engines: list[OpenAIEngine]
) -> None:
    provider.models = web.json_response({"error": {"message": f"Incorrect API key provided: {KEY}."}}, status=401)
    with pytest.raises(UpstreamFailed, match=r"Incorrect API key provided: \*\*\*") as caught:
        await started(provider, engines)
    assert KEY not in repr(caught.value)


async def test_start_fails_when_nobody_listens(engines: list[OpenAIEngine], provider: Provider) -> None:
    with pytest.raises(UpstreamFailed, match=r"127.0.0.1:1/v1 cannot be reached"):
        await started(provider, engines, base_url="http://127.0.0.1:1/v1", max_retries="0")


async def test_the_self_test_names_the_models_that_there_are(engine: OpenAIEngine, provider: Provider) -> None:
    async def script(request: web.Request, number: int) -> web.StreamResponse:
        return web.json_response({"error": {"message": "The model does not exist"}}, status=404)

    await engine.self_test()
    provider.script = script
    engine._model = "other"
    with pytest.raises(DeploymentFailed, match=r"The model does not exist \(models there: m\)"):
        await engine.self_test()


async def test_the_only_model_is_taken_when_none_is_named(provider: Provider, engines: list[OpenAIEngine]) -> None:
    engine = await started(provider, engines, model="")
    await ask(engine, chat("hi"))
    assert provider.bodies[-1]["model"] == "m"
    provider.models = web.json_response({"data": [{"id": "a"}, {"id": "b"}]})
    with pytest.raises(ConfigurationError, match=r"model is missing \(models there: a, b\)"):
        await started(provider, engines, model="")


async def test_a_preset_without_n_refuses_it(provider: Provider, engines: list[OpenAIEngine]) -> None:
    engine = await started(provider, engines, "saas/deepseek")
    assert not engine.capabilities().n
    with pytest.raises(UnsupportedField):
        await ask(engine, chat("hi", n=2))


async def test_steps_go_on_while_the_provider_is_silent(engine: OpenAIEngine) -> None:
    before = engine.steps
    async with asyncio.timeout(10):
        while engine.steps == before:
            await asyncio.sleep(0.1)


async def test_no_secret_in_any_repr_or_log(
    provider: Provider, engines: list[OpenAIEngine], caplog: pytest.LogCaptureFixture
) -> None:
    async def script(request: web.Request, number: int) -> web.StreamResponse:
        if number == 1:
            return web.json_response({"error": request.headers["Authorization"]}, status=500)
        return await say(request, "fine")

    provider.script = script
    caplog.set_level(logging.DEBUG)
    engine = await started(provider, engines)
    await ask(engine, chat("hi"))
    shown = [repr(value) for value in vars(engine).values()] + [repr(v) for v in vars(engine._upstream).values()]
    assert KEY not in caplog.text + "".join(shown)
    assert "try 1 failed" in caplog.text


@pytest.mark.parametrize(
    ("kind", "params", "words"),
    [
        ("saas/openai", {"api_key": KEY, "tempreature": "1"}, "no parameter tempreature; known are: api_base, api_key"),
        ("saas/openai", {"model": "m"}, "needs the parameter saas.api_key"),
        ("saas/openai_compatible", {"model": "m"}, "needs the parameter saas.base_url"),
        ("saas/openai", {"base_url": "ftp://x"}, "no http:// or https:// URL"),
        ("saas/openai", {"base_url": "http://u:p@x/v1"}, "header.Authorization"),
        ("saas/openai", {"api_key": KEY, "timeout": "soon"}, "parameter timeout"),
        ("saas/openai", {"api_key": KEY, "max_retries": "-1"}, "max_retries must not be negative"),
        ("saas/openai", {"api_key": KEY + "\n", "model": "m"}, "line break"),
        ("saas/azure_openai", {"api_key": KEY, "azure_endpoint": "https://x"}, "saas.azure_deployment"),
        ("saas/claude", {"api_key": KEY}, "does not speak the OpenAI protocol"),
        ("saas/nobody", {"api_key": KEY}, "no preset saas/nobody; known are: .*zhipu"),
    ],
)
def test_bad_parameters_are_named(kind: str, params: dict[str, str], words: str) -> None:
    with pytest.raises(ConfigurationError, match=words) as caught:
        make(kind, **params)
    assert KEY not in str(caught.value)


async def test_with_others_at_hand_the_next_try_is_left_to_them(engine: OpenAIEngine, provider: Provider) -> None:
    provider.script = lambda request, number: answered(503)
    run = Run(id="r", fail_fast=True)
    with pytest.raises(UpstreamFailed, match="busy"):
        async for _ in engine.chat(chat("hi"), run):
            pass
    assert len(provider.bodies) == 1


async def test_a_connection_that_had_grown_stale_is_replaced_all_the_same(
    engine: OpenAIEngine, provider: Provider
) -> None:
    async def script(request: web.Request, number: int) -> web.StreamResponse:
        if number == 1:
            assert request.transport is not None
            request.transport.abort()
        return await say(request, "fine")

    provider.script = script
    texts = [o.text async for o in engine.chat(chat("hi"), Run(id="r", fail_fast=True)) if isinstance(o, Output)]
    assert "".join(texts) == "fine"
    assert len(provider.bodies) == 2


async def test_an_answer_that_ends_in_the_middle_of_an_event_is_cut(engine: OpenAIEngine, provider: Provider) -> None:
    half = b'data: {"choices": [{"index": 0, "delta": {"content": "gr\xc3'
    provider.script = lambda request, number: stream(request, chunk("half"), half)
    said, error = await failure(engine, chat("hi"))
    assert said == "half"
    assert isinstance(error, StreamCut)


async def test_a_provider_that_does_not_end_is_ended(engine: OpenAIEngine, provider: Provider) -> None:
    async def script(request: web.Request, number: int) -> web.StreamResponse:
        return await stream(request, *([chunk("x")] * 3000))

    provider.script = script
    said, error = await failure(engine, chat("hi", max_tokens=10))
    assert len(said) == 4 * 10 + 1024
    assert isinstance(error, UpstreamFailed)
    assert "does not end" in error.message


async def test_a_large_chunk_comes_in_pieces_and_one_beyond_measure_is_refused(
    engine: OpenAIEngine, provider: Provider
) -> None:
    book = "a book " * 200_000
    calls = [{"index": 0, "id": "c", "function": {"name": "f", "arguments": book}}]
    large = chunk(book, finish="stop", delta={"content": book, "tool_calls": calls})
    provider.script = lambda request, number: stream(request, large, USAGE)
    answer = await ask(engine, chat("hi"))
    assert answer.texts == {0: book}
    assert answer.reasons == {0: "stop"}
    assert max(len(output.text) for output in answer.outputs) < 200_000
    assert "".join(call.arguments for output in answer.outputs for call in output.tool_calls) == book
    provider.script = lambda request, number: stream(request, b"data: ", *([b"x" * (1 << 20)] * 20))
    _, error = await failure(engine, chat("hi"))
    assert isinstance(error, UpstreamFailed)
    assert "16 MiB" in error.message


async def answered(status: int) -> web.Response:
    return web.json_response({"error": {"message": "busy"}}, status=status)
