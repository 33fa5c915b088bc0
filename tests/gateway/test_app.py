"""The gateway over HTTP: what is around the answers."""

from __future__ import annotations

import asyncio
import gzip
import json
import ssl
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from modelbus_broker.errors import BusUnavailable, ConfigurationError
from modelbus_broker.messages import Deployment
from modelbus_broker.settings import BusSettings
from modelbus_broker.topology import queued
from modelbus_gateway.metrics import Metrics
from modelbus_gateway.server import listening
from modelbus_gateway.settings import GatewaySettings
from prometheus_client.parser import text_string_to_metric_families
from yarl import URL

from tests.gateway.conftest import StartGateway
from tests.helpers.cluster import Cluster
from tests.helpers.command_line import free_port

CHAT = "/v1/chat/completions"
HELLO = {"model": "echo", "messages": [{"role": "user", "content": "Hello there"}]}
TLS = Path(__file__).parent / "tls"


async def error_of(response: aiohttp.ClientResponse) -> dict[str, Any]:
    assert response.content_type == "application/json"
    body = await response.json()
    assert set(body["error"]) >= {"message", "type", "param", "code"}
    error: dict[str, Any] = body["error"]
    return error


async def test_a_body_that_is_no_json_is_a_400(url: str, http: aiohttp.ClientSession) -> None:
    async with http.post(url + CHAT, data=b'{"model": ') as response:
        assert response.status == 400
        assert (await error_of(response))["type"] == "invalid_request_error"


async def test_a_wrong_type_is_a_400_that_names_the_field(url: str, http: aiohttp.ClientSession) -> None:
    async with http.post(url + CHAT, json={**HELLO, "temperature": "hot"}) as response:
        assert response.status == 400
        error = await error_of(response)
    assert error["param"] == "temperature"
    assert error["code"] == "invalid_request"


@pytest.mark.parametrize("target", [CHAT, f"{CHAT}?from=a-test", CHAT.replace("/chat", "/%63hat")])
async def test_a_route_is_found_however_its_path_is_written(
    echo_url: str, http: aiohttp.ClientSession, target: str
) -> None:
    """Only the plain path is found by the short way."""
    async with http.post(URL(echo_url + target, encoded=True), json=HELLO) as response:
        assert response.status == 200
        assert response.headers["x-request-id"]
        assert (await response.json())["choices"][0]["message"]["content"] == "Hello there"
    async with http.post(URL(echo_url + target, encoded=True), json=HELLO, expect100=True) as response:
        assert response.status == 200
    async with http.get(URL(echo_url + target, encoded=True)) as response:
        assert (response.status, response.headers["Allow"]) == (405, "POST")
    metrics = await (await http.get(echo_url + "/metrics")).text()
    counted = f'modelbus_gateway_requests_total{{model="echo",route="{CHAT}",status="200"}} 2.0'
    assert counted in metrics


async def test_old_http_and_connections_that_close_get_whole_answers(echo_url: str) -> None:
    """These are answered by the long way."""
    body = json.dumps(HELLO).encode()
    host, port = URL(echo_url).host, URL(echo_url).port
    for version, header in (("1.0", ""), ("1.1", "Connection: close\r\n")):
        reader, writer = await asyncio.open_connection(host, port)
        head = f"POST {CHAT} HTTP/{version}\r\nHost: x\r\n{header}Content-Length: {len(body)}\r\n\r\n"
        writer.write(head.encode() + body)
        answer = await reader.read()
        writer.close()
        assert answer.startswith(f"HTTP/{version} 200 OK".encode())
        assert json.loads(answer.partition(b"\r\n\r\n")[2])["choices"][0]["message"]["content"] == "Hello there"


async def test_an_unknown_model_is_a_404(url: str, http: aiohttp.ClientSession) -> None:
    async with http.post(url + CHAT, json=HELLO) as response:
        assert response.status == 404
        assert (await error_of(response))["code"] == "model_not_found"


async def test_a_model_without_live_workers_is_a_503(
    cluster: Cluster, start_gateway: StartGateway, http: aiohttp.ClientSession
) -> None:
    await cluster.declare(Deployment(name="echo", model="echo", engine="echo", revision="1"))
    url = await start_gateway()
    async with http.post(url + CHAT, json=HELLO) as response:
        assert response.status == 503
        assert int(response.headers["Retry-After"]) >= 1
        assert (await error_of(response))["code"] == "model_unavailable"


async def test_a_caller_who_waits_is_queued_until_a_worker_lives(
    cluster: Cluster, start_gateway: StartGateway, http: aiohttp.ClientSession
) -> None:
    deployment = Deployment(name="echo", model="echo", engine="echo", revision="1")
    await cluster.declare(deployment)
    url = await start_gateway()
    asking = asyncio.create_task(http.post(url + CHAT, json=HELLO, headers={"X-Modelbus-Wait": "true"}).__aenter__())
    await asyncio.sleep(0.2)
    assert not asking.done()
    cluster.start_worker(deployment)
    async with await asking as response:
        assert response.status == 200


async def test_a_full_queue_is_a_429_with_retry_after(
    cluster: Cluster, start_gateway: StartGateway, http: aiohttp.ClientSession
) -> None:
    deployment = Deployment(name="echo", model="echo", engine="echo", revision="1", queue_limit=1)
    await cluster.declare(deployment)
    url = await start_gateway()
    waiting = asyncio.create_task(http.post(url + CHAT, json=HELLO, headers={"X-Modelbus-Wait": "1"}).__aenter__())
    async with asyncio.timeout(60):
        while not await queued(cluster.bus, "echo"):
            await asyncio.sleep(0.02)
    async with http.post(url + CHAT, json=HELLO, headers={"X-Modelbus-Wait": "1"}) as response:
        assert response.status == 429
        assert int(response.headers["Retry-After"]) >= 1
        error = await error_of(response)
    assert (error["code"], error["type"]) == ("queue_full", "rate_limit_error")
    waiting.cancel()


@pytest.mark.parametrize("stream", [False, True])
async def test_a_deadline_is_a_504(
    cluster: Cluster, start_gateway: StartGateway, http: aiohttp.ClientSession, stream: bool
) -> None:
    await cluster.deploy_echo(delay_ms="3000")
    url = await start_gateway()
    async with http.post(
        url + CHAT, json={**HELLO, "stream": stream}, headers={"X-Request-Timeout": "0.3"}
    ) as response:
        assert response.status == 504
        assert (await error_of(response))["code"] == "deadline_exceeded"
    async with http.post(url + CHAT, json={**HELLO, "timeout": 0.3}) as response:
        assert response.status == 504


async def test_a_timeout_header_that_is_no_time_is_a_400(echo_url: str, http: aiohttp.ClientSession) -> None:
    async with http.post(echo_url + CHAT, json=HELLO, headers={"X-Request-Timeout": "soon"}) as response:
        assert response.status == 400
        assert (await error_of(response))["param"] == "X-Request-Timeout"


async def test_a_body_over_the_limit_is_a_413(start_gateway: StartGateway, http: aiohttp.ClientSession) -> None:
    url = await start_gateway(max_body_bytes=10_000)
    body = {"model": "echo", "messages": [{"role": "user", "content": "x" * 20_000}]}
    async with http.post(url + CHAT, json=body) as response:
        assert response.status == 413
        assert (await error_of(response))["code"] == "request_too_large"


async def test_a_packed_body_counts_unpacked(start_gateway: StartGateway, http: aiohttp.ClientSession) -> None:
    url = await start_gateway(max_body_bytes=10_000)
    packed = gzip.compress(b'{"model":"echo","messages":[{"role":"user","content":"' + b"x" * 5_000_000 + b'"}]}')
    async with http.post(url + CHAT, data=packed, headers={"Content-Encoding": "gzip"}) as response:
        assert response.status == 413
        assert (await error_of(response))["code"] == "request_too_large"


async def test_a_wrong_method_is_a_405_that_says_which_are_allowed(url: str, http: aiohttp.ClientSession) -> None:
    async with http.get(url + CHAT) as response:
        assert response.status == 405
        assert response.headers["Allow"] == "POST"
        assert (await error_of(response))["code"] == "method_not_allowed"


@pytest.mark.parametrize("path", ["/", "/v1", "/v1/chat", "/v1/responses", "/v1/audio/speech"])
async def test_a_wrong_path_is_a_404(url: str, http: aiohttp.ClientSession, path: str) -> None:
    async with http.post(url + path, json={}) as response:
        assert response.status == 404
        assert (await error_of(response))["code"] == "unknown_url"


@pytest.mark.parametrize(
    "headers", [{}, {"Authorization": "Bearer wrong"}, {"Authorization": "sesame"}, {"Authorization": "Basic sesame"}, {"Authorization": "Bearer schlüssel"}]
)  # fmt: skip
async def test_a_missing_or_wrong_key_is_a_401(
    start_gateway: StartGateway, http: aiohttp.ClientSession, headers: dict[str, str]
) -> None:
    url = await start_gateway(api_key="sesame")
    for path in ("/v1/models", "/v1/unknown"):
        async with http.get(url + path, headers=headers) as response:
            assert response.status == 401
            error = await error_of(response)
            assert error["code"] == "invalid_api_key"
            assert "sesame" not in error["message"]


async def test_the_right_key_opens_and_only_v1_asks_for_it(
    start_gateway: StartGateway, http: aiohttp.ClientSession
) -> None:
    url = await start_gateway(api_key="sesame")
    async with http.get(url + "/v1/models", headers={"Authorization": "Bearer sesame"}) as response:
        assert response.status == 200
    for path in ("/health", "/health/live", "/health/ready", "/metrics", "/version"):
        async with http.get(url + path) as response:
            assert response.status == 200, path


async def test_ready_says_what_is_missing_when_the_bus_is_gone(
    cluster: Cluster, url: str, http: aiohttp.ClientSession
) -> None:
    async with http.get(url + "/health/ready") as response:
        assert (response.status, (await response.json())["bus"]) == (200, True)
    await cluster.server.stop()
    for _ in range(100):
        async with http.get(url + "/health/ready") as response:
            if response.status == 503:
                assert (await response.json())["bus"] is False
                break
        await asyncio.sleep(0.1)
    else:
        pytest.fail("never said that the bus is gone")
    async with http.get(url + "/health/live") as response:
        assert response.status == 200


async def test_any_origin_may_read_unless_said_otherwise(url: str, http: aiohttp.ClientSession) -> None:
    async with http.get(url + "/v1/models", headers={"Origin": "http://a.example"}) as response:
        assert response.headers["Access-Control-Allow-Origin"] == "*"
    async with http.get(url + "/v1/models") as response:
        assert "Access-Control-Allow-Origin" not in response.headers


async def test_a_preflight_is_answered_without_a_key(start_gateway: StartGateway, http: aiohttp.ClientSession) -> None:
    url = await start_gateway(api_key="sesame")
    asked = {
        "Origin": "http://a.example", "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "authorization, content-type",
    }  # fmt: skip
    async with http.options(url + CHAT, headers=asked) as response:
        assert response.status == 204
        assert response.headers["Access-Control-Allow-Origin"] == "*"
        assert "POST" in response.headers["Access-Control-Allow-Methods"]
        assert response.headers["Access-Control-Allow-Headers"] == "authorization, content-type"


async def test_only_named_origins_may_read_and_errors_say_so_too(
    start_gateway: StartGateway, http: aiohttp.ClientSession
) -> None:
    url = await start_gateway(allowed_origins=("http://a.example",), allow_credentials=True)
    async with http.post(url + CHAT, data=b"{", headers={"Origin": "http://a.example"}) as response:
        assert response.status == 400
        assert response.headers["Access-Control-Allow-Origin"] == "http://a.example"
        assert response.headers["Access-Control-Allow-Credentials"] == "true"
        assert response.headers["Vary"] == "Origin"
    async with http.get(url + "/v1/models", headers={"Origin": "http://b.example"}) as response:
        assert "Access-Control-Allow-Origin" not in response.headers


async def test_streams_carry_the_cors_headers(echo_url: str, http: aiohttp.ClientSession) -> None:
    async with http.post(
        echo_url + CHAT, json={**HELLO, "stream": True}, headers={"Origin": "http://a.example"}
    ) as response:
        assert response.headers["Access-Control-Allow-Origin"] == "*"
        assert response.headers["x-request-id"]


async def test_it_speaks_tls(start_gateway: StartGateway, http: aiohttp.ClientSession) -> None:
    certificate = TLS / "test-only-certificate.pem"
    url = await start_gateway(ssl_certfile=str(certificate), ssl_keyfile=str(TLS / "test-only-key.pem"))
    assert url.startswith("https://")
    trusting = ssl.create_default_context(cafile=str(certificate))
    async with http.get(url + "/v1/models", ssl=trusting) as response:
        assert response.status == 200


async def test_models_are_listed_by_name_even_with_slashes(
    cluster: Cluster, start_gateway: StartGateway, http: aiohttp.ClientSession
) -> None:
    for name in ("team/chat", "emb"):
        await cluster.declare(Deployment(name=name, model=name, engine="echo", revision="1", created_ms=5_000))
    url = await start_gateway(served_model_names={"gpt-4": "emb", "gone": "nothing"})
    async with http.get(url + "/v1/models") as response:
        listed = await response.json()
    assert [card["id"] for card in listed["data"]] == ["emb", "team/chat", "gpt-4"]
    for path in ("team/chat", "team%2Fchat"):
        async with http.get(f"{url}/v1/models/{path}") as response:
            assert await response.json() == {"id": "team/chat", "object": "model", "created": 5, "owned_by": "modelbus"}
    async with http.get(url + "/v1/models/nothing") as response:
        assert response.status == 404
        assert (await error_of(response))["code"] == "model_not_found"


async def test_metrics_count_requests_tokens_and_queues(echo_url: str, http: aiohttp.ClientSession) -> None:
    for body in (HELLO, {**HELLO, "stream": True}, {**HELLO, "n": 0}, {**HELLO, "model": "made-up-name"}):
        async with http.post(echo_url + CHAT, json=body) as response:
            await response.read()
    async with http.get(echo_url + "/metrics") as response:
        text = await response.text()
    samples = {
        (sample.name, *sorted(sample.labels.values())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }
    assert samples["modelbus_gateway_requests_total", CHAT, "200", "echo"] == 2
    assert samples["modelbus_gateway_requests_total", "", CHAT, "400"] == 1
    assert samples["modelbus_gateway_requests_total", "", CHAT, "404"] == 1
    assert samples["modelbus_gateway_tokens_total", "completion", "echo"] == 4
    assert samples["modelbus_gateway_first_token_seconds_count", "echo"] == 1
    assert samples["modelbus_gateway_request_seconds_count", CHAT, "echo"] == 2
    assert samples["modelbus_gateway_in_flight",] == 1
    assert ("modelbus_queue_depth", "echo") in samples
    assert "made-up-name" not in text
    assert samples["modelbus_queue_stuck", "echo"] == 0


async def test_a_queue_that_stands_still_is_in_the_metrics() -> None:
    metrics = Metrics(lambda: 0)
    metrics.stuck(["moves", "stands"], {"stands": 12.0})
    text = metrics.exposition().decode()
    assert 'modelbus_queue_stuck{model="stands"} 1.0' in text
    assert 'modelbus_queue_stuck{model="moves"} 0.0' in text


async def test_a_gateway_without_a_bus_says_so() -> None:
    settings = GatewaySettings(
        bus=BusSettings(url=f"nats://127.0.0.1:{free_port()}", connect_timeout_s=0.3), port=free_port()
    )
    with pytest.raises(BusUnavailable):
        async with listening(settings):
            pass


async def test_a_port_that_is_taken_is_named(url: str, start_gateway: StartGateway) -> None:
    port = int(url.rpartition(":")[2])
    with pytest.raises(ConfigurationError, match=str(port)):
        await start_gateway(port=port)
