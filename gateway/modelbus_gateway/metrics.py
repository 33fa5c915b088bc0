"""What Prometheus reads.

With ``--processes`` the parent gives all processes one folder (``PROMETHEUS_MULTIPROC_DIR``) and whichever answers
/metrics answers for all of them.
"""

from __future__ import annotations

import os
from collections.abc import Container, Iterable

from modelbus_broker.messages import Usage
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.multiprocess import MultiProcessCollector

LATENCY_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
ABORT_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
MULTIPROCESS_FOLDER = "PROMETHEUS_MULTIPROC_DIR"


class Metrics:
    """The numbers of one gateway. Label children are kept: looking one up costs more than counting."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._requests = Counter(
            "modelbus_gateway_requests", "Requests by route, model and status.", ["route", "model", "status"],
            registry=self.registry,
        )  # fmt: skip
        self._seconds = Histogram(
            "modelbus_gateway_request_seconds", "From the request's head to the end of the answer.", ["route", "model"],
            buckets=LATENCY_BUCKETS, registry=self.registry,
        )  # fmt: skip
        self._first_token = Histogram(
            "modelbus_gateway_first_token_seconds", "From the request's head to the first output of a stream.", ["model"],
            buckets=LATENCY_BUCKETS, registry=self.registry,
        )  # fmt: skip
        self._abort = Histogram(
            "modelbus_gateway_abort_seconds",
            "From the moment a request that a worker has is cancelled to the worker's word that its engine has let go.",
            ["model"], buckets=ABORT_BUCKETS, registry=self.registry,
        )  # fmt: skip
        self._tokens = Counter(
            "modelbus_gateway_tokens", "Tokens of completed answers: prompt, completion.", ["model", "kind"],
            registry=self.registry,
        )  # fmt: skip
        self.in_flight = Gauge(
            "modelbus_gateway_in_flight", "Requests that are being answered.", registry=self.registry,
            multiprocess_mode="livesum",
        )  # fmt: skip
        self._queued = Gauge(
            "modelbus_queue_depth", "Requests that wait in a model's queue.", ["model"], registry=self.registry,
            multiprocess_mode="livemostrecent",
        )  # fmt: skip
        self._stuck = Gauge(
            "modelbus_queue_stuck", "1: requests and pulls wait in a model's queue and nothing is delivered.", ["model"],
            registry=self.registry, multiprocess_mode="livemax",
        )  # fmt: skip
        self._request_children: dict[tuple[str, str, int], Counter] = {}
        self._seconds_children: dict[tuple[str, str], Histogram] = {}
        self._first_children: dict[str, Histogram] = {}
        self._token_children: dict[str, tuple[Counter, Counter]] = {}

    def ended(self, route: str, model: str, status: int, seconds: float) -> None:
        """``model`` is "" when the request named none that is deployed, so that labels stay few."""
        counter = self._request_children.get((route, model, status))
        if counter is None:
            counter = self._request_children[route, model, status] = self._requests.labels(route, model, status)
        counter.inc()
        histogram = self._seconds_children.get((route, model))
        if histogram is None:
            histogram = self._seconds_children[route, model] = self._seconds.labels(route, model)
        histogram.observe(seconds)

    def first_token(self, model: str, seconds: float) -> None:
        histogram = self._first_children.get(model)
        if histogram is None:
            histogram = self._first_children[model] = self._first_token.labels(model)
        histogram.observe(seconds)

    def aborted(self, model: str, seconds: float) -> None:
        self._abort.labels(model).observe(seconds)

    def tokens(self, model: str, usage: Usage) -> None:
        counters = self._token_children.get(model)
        if counters is None:
            labels = self._tokens.labels
            counters = self._token_children[model] = labels(model, "prompt"), labels(model, "completion")
        counters[0].inc(usage.prompt_tokens)
        counters[1].inc(usage.completion_tokens)

    def queued(self, depths: dict[str, int]) -> None:
        for model, depth in depths.items():
            self._queued.labels(model).set(depth)

    def stuck(self, models: Iterable[str], standing: Container[str]) -> None:
        for model in models:
            self._stuck.labels(model).set(model in standing)

    def exposition(self) -> bytes:
        """The text that Prometheus reads: of all processes, when there are several."""
        if MULTIPROCESS_FOLDER not in os.environ:
            return generate_latest(self.registry)
        everyone = CollectorRegistry()
        MultiProcessCollector(everyone)  # type: ignore[no-untyped-call]
        return generate_latest(everyone)
