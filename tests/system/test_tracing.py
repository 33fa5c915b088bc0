"""One trace through real processes: the SDK, a gateway, the queue and a worker, with the real opentelemetry-sdk."""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest
from modelbus import tracing
from opentelemetry.semconv._incubating.attributes import gen_ai_attributes as conventions
from opentelemetry.semconv.attributes import error_attributes

from tests.helpers.cluster import Cluster, WorkerProcess, echo_deployment
from tests.helpers.gateway_replicas import GatewayReplica

#: Asks over the bus and, under a span of its own, over HTTP; prints its spans.
PROGRAM = """
import asyncio, json, sys
import modelbus, openai
from opentelemetry import trace
from opentelemetry.propagate import inject
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

async def main(bus, url):
    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    trace.set_tracer_provider(provider)
    tracer = trace.get_tracer("test")
    async with modelbus.connect(bus) as client:
        with tracer.start_as_current_span("whole"):
            await client.chat("echo", "one two three", temperature=0.5, max_tokens=2)
        async with client.stream("echo", "one two") as stream:
            async for delta in stream:
                pass
        try:
            await client.chat("broken", "hello")
        except modelbus.ModelBusError:
            pass
        await (await client.submit("echo", "later"))
        with tracer.start_as_current_span("far away"):
            await client.chat("far", "four five")
    with tracer.start_as_current_span("over http"):
        headers = {}
        inject(headers)
        async with openai.AsyncOpenAI(base_url=url + "/v1", api_key="x", max_retries=0) as http:
            messages = [{"role": "user", "content": "hello"}]
            await http.chat.completions.create(model="echo", messages=messages, extra_headers=headers)
    print(json.dumps([json.loads(span.to_json()) for span in exporter.get_finished_spans()]))

asyncio.run(main(*sys.argv[1:]))
"""


def printed(log: str) -> list[dict[str, Any]]:
    """The spans among the lines of a process that exports them to its console."""
    found, at = [], 0
    while (at := log.find('{\n    "name"', at)) >= 0:
        span, length = json.JSONDecoder().raw_decode(log[at:])
        found.append(span)
        at += length
    return found


def named(spans: list[dict[str, Any]], name: str, trace: str = "") -> dict[str, Any]:
    (span,) = [span for span in spans if span["name"] == name and trace in ("", span["context"]["trace_id"])]
    return span


async def ended(process: WorkerProcess) -> None:
    process.process.terminate()
    await process.wait(60)


def test_the_words_are_those_of_the_conventions() -> None:
    assert tracing.OPERATION == conventions.GEN_AI_OPERATION_NAME
    assert tracing.PROVIDER == conventions.GEN_AI_PROVIDER_NAME
    assert tracing.REQUEST_MODEL == conventions.GEN_AI_REQUEST_MODEL
    assert tracing.RESPONSE_MODEL == conventions.GEN_AI_RESPONSE_MODEL
    assert tracing.RESPONSE_ID == conventions.GEN_AI_RESPONSE_ID
    assert tracing.INPUT_TOKENS == conventions.GEN_AI_USAGE_INPUT_TOKENS
    assert tracing.OUTPUT_TOKENS == conventions.GEN_AI_USAGE_OUTPUT_TOKENS
    assert tracing.FINISH_REASONS == conventions.GEN_AI_RESPONSE_FINISH_REASONS
    assert tracing.ERROR_TYPE == error_attributes.ERROR_TYPE
    for field, attribute in tracing.SAMPLING.items():
        assert attribute == getattr(conventions, f"GEN_AI_REQUEST_{field.upper()}")
    operations = {value.value for value in conventions.GenAiOperationNameValues}
    assert set(tracing.OPERATIONS.values()) | {"chat"} <= operations


@pytest.mark.timeout(240)
async def test_one_trace_from_the_program_to_the_engine(
    cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_TRACES_EXPORTER", "console")
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "100")
    deployments = [echo_deployment("echo"), echo_deployment("broken", fail="always", fail_text="no such head")]
    for deployment in deployments:
        await cluster.declare(deployment)
    workers = [cluster.start_worker(deployment) for deployment in deployments]
    log_file = tmp_path / "gateway.log"
    # A model at a provider: the provider is our own gateway, so that its spans can be read.
    gateway = GatewayReplica(cluster.server.url, log_file, "--log-level", "warning")
    gateway.start()
    try:
        await gateway.ready()
        far = msgspec.structs.replace(
            echo_deployment("far"), engine="openai", pretrained_model_type="saas/openai_compatible",
            engine_params={"base_url": f"{gateway.url}/v1", "model": "echo"},
        )  # fmt: skip
        await cluster.declare(far)
        workers.append(cluster.start_worker(far))
        await asyncio.gather(*(cluster.wait_ready(deployment.model, 1) for deployment in [*deployments, far]))
        command = [sys.executable, "-c", PROGRAM, cluster.server.url, gateway.url]
        ran = await asyncio.to_thread(subprocess.run, command, capture_output=True, text=True, timeout=100)
        assert ran.returncode == 0, ran.stderr
        own = json.loads(ran.stdout)
        gateway.send_signal(signal.SIGTERM)  # what is killed has no time to say its last spans
        await asyncio.gather(gateway.ended(), *(ended(worker) for worker in workers))
    finally:
        await gateway.close()
    served = printed(log_file.read_text())
    ran_there = [span for worker in workers for span in printed(worker.log())]

    # Over the bus: the program's span, the SDK's below it, the queue and the engine below that.
    whole = named(own, "whole")
    trace = whole["context"]["trace_id"]
    chat = named(own, "chat echo", trace)
    assert chat["parent_id"] == whole["context"]["span_id"] and chat["kind"] == "SpanKind.CLIENT"
    assert chat["attributes"]["gen_ai.request.temperature"] == 0.5
    assert chat["attributes"]["gen_ai.usage.output_tokens"] == 2
    assert chat["attributes"]["gen_ai.response.finish_reasons"] == ["length"]
    queue, run = named(ran_there, "queue echo", trace), named(ran_there, "chat echo", trace)
    for span in (queue, run):
        assert span["parent_id"] == chat["context"]["span_id"]
        assert span["resource"]["attributes"]["service.name"] == "modelbus-worker"
    assert run["attributes"]["gen_ai.usage.output_tokens"] == 2
    assert run["attributes"]["modelbus.worker"] == workers[0].id
    assert chat["attributes"]["gen_ai.response.id"] == run["attributes"]["gen_ai.response.id"]
    assert queue["end_time"] <= run["end_time"]
    assert "one two three" not in json.dumps([own, ran_there]), "what was said is nobody's business"

    # Over HTTP: the gateway's span lies between.
    http = named(own, "over http")
    trace = http["context"]["trace_id"]
    post = named(served, "POST /v1/chat/completions", trace)
    assert (post["parent_id"], post["kind"]) == (http["context"]["span_id"], "SpanKind.SERVER")
    assert post["attributes"]["http.response.status_code"] == 200
    assert post["resource"]["attributes"]["service.name"] == "modelbus-gateway"
    assert named(ran_there, "chat echo", trace)["parent_id"] == post["context"]["span_id"]

    # Through a provider: each try has a span, and the provider's spans hang below it.
    trace = named(own, "far away")["context"]["trace_id"]
    run, post = named(ran_there, "chat far", trace), named(served, "POST /v1/chat/completions", trace)
    assert run["attributes"]["modelbus.worker"] == workers[2].id
    (asked,) = [span for span in ran_there if span["parent_id"] == run["context"]["span_id"]]
    assert (asked["name"], asked["kind"]) == ("chat echo", "SpanKind.CLIENT")
    assert asked["attributes"]["gen_ai.provider.name"] == "openai_compatible"
    assert f"http://{asked['attributes']['server.address']}:{asked['attributes']['server.port']}" == gateway.url
    assert (
        asked["attributes"]["gen_ai.usage.output_tokens"] == 2
        and "http.request.resend_count" not in asked["attributes"]
    )
    assert post["parent_id"] == asked["context"]["span_id"]
    (answered,) = [
        span for span in ran_there if span["parent_id"] == post["context"]["span_id"] and span["name"] == "chat echo"
    ]
    assert answered["attributes"]["modelbus.worker"] == workers[0].id

    # What fails says so, on both sides; a job is in the trace of whoever submitted it; a stream ends its span.
    failed = named(own, "chat broken")
    assert (failed["status"]["status_code"], failed["attributes"]["error.type"]) == ("ERROR", "engine_failed")
    assert named(ran_there, "chat broken", failed["context"]["trace_id"])["attributes"]["error.type"] == "engine_failed"
    job = named(own, "submit echo")
    assert named(ran_there, "chat echo", job["context"]["trace_id"])["parent_id"] == job["context"]["span_id"]
    streamed = [span for span in own if span["name"] == "chat echo" and span["parent_id"] is None]
    assert [span["attributes"]["gen_ai.usage.output_tokens"] for span in streamed] == [2]
