"""What Python callers may give that no worker could read: refused where they are, by name, and never a dead letter."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Any

import modelbus
import pytest
from modelbus.errors import InvalidRequest
from modelbus_broker import names
from modelbus_broker.asking import CallOptions

from tests.helpers.cluster import Cluster

LONE = "\ud800"  #: half a surrogate pair: no text that UTF-8 could carry

Ask = Callable[[modelbus.Client], Coroutine[Any, Any, Any]]


def chat(**fields: Any) -> Ask:
    return lambda client: client.chat("echo", "hi", **fields)


def options(**given: Any) -> Ask:
    return lambda client: client.chat("echo", "hi", options=CallOptions(**given))


WRONG: list[tuple[Ask, str]] = [
    (lambda client: client.chat(5, "hi"), "model"),  # type: ignore[arg-type]
    (lambda client: client.chat("echo", 5), "messages"),  # type: ignore[arg-type]
    (lambda client: client.chat("echo", {"role": "user", "content": "hi"}), "messages"),  # type: ignore[arg-type]
    (lambda client: client.chat("echo", ["hi"]), "messages"),  # type: ignore[list-item]
    (lambda client: client.chat("echo", [{"role": "user", "content": 5}]), "messages[0].content"),
    (lambda client: client.chat("echo", LONE), ""),
    (chat(n="2"), "n"),
    (chat(mine=object()), ""),
    (chat(mine=2**70), ""),
    (options(tenant=5), "tenant"),
    (options(tenant=LONE), ""),
    (options(budget_ms="soon"), "budget_ms"),
    (options(idempotency_key=5), "idempotency_key"),
    (options(labels={"a": 1}), "labels[...]"),
    (options(traceparent=5), "traceparent"),
    (lambda client: client.embed("echo", 5), "input"),  # type: ignore[arg-type]
    (lambda client: client.embed("echo", ["a", 5]), "input[1]"),  # type: ignore[list-item]
    (lambda client: client.embed("echo", [LONE]), ""),
    (lambda client: client.classify("echo", None), "input"),  # type: ignore[arg-type]
    (lambda client: client.classify("echo", [5]), "input[0]"),  # type: ignore[list-item]
    (lambda client: client.rerank("echo", 5, ["a"]), "queries[0]"),  # type: ignore[arg-type]
    (lambda client: client.rerank("echo", "q", "abc"), "documents"),
    (lambda client: client.score("echo", [("q", 5)]), "documents[0]"),  # type: ignore[list-item]
    (lambda client: client.score("echo", ["q"]), "pairs"),  # type: ignore[list-item]
    (lambda client: client.submit("echo", [{"role": "user", "content": 5}]), "messages[0].content"),
    (lambda client: client.submit("echo", "hi", options=CallOptions(labels={"a": 1})), "labels[...]"),  # type: ignore[dict-item]
]


async def test_it_is_refused_by_its_name_and_leaves_no_dead_letter(cluster: Cluster) -> None:
    await cluster.deploy_echo(dimensions="4")
    async with modelbus.connect(cluster.server.url) as client:
        for number, (ask, param) in enumerate(WRONG):
            with pytest.raises(InvalidRequest) as refused:
                await ask(client)
            assert refused.value.param == param, (number, refused.value)
        assert (await client.chat("echo", "still here")).text == "still here"
    info = await cluster.bus.js_request(f"STREAM.INFO.{names.STREAM_DEAD}")
    assert info["state"]["messages"] == 0
