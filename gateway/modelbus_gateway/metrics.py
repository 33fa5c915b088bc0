"""What Prometheus reads.

With ``--processes`` the parent gives all processes one folder (``PROMETHEUS_MULTIPROC_DIR``) and whichever answers
/metrics answers for all of them.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Container, Iterable

from modelbus.prices import PriceTable
from modelbus_broker.messages import Usage
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.multiprocess import MultiProcessCollector

LATENCY_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
ABORT_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
MULTIPROCESS_FOLDER = "PROMETHEUS_MULTIPROC_DIR"


class Metrics:
    """The numbers of one gateway.

    Label children are kept, because looking one up costs more than counting, and what only grows is added up here
    and passed on when somebody reads: a locked counter costs ten times a plain one, and every request has five. Where
    several processes count together any of them may be asked, or killed, so there each request is passed on at once.

    Args:
        running: says how many requests are being answered now.
        prices: of tokens; what is not there costs nothing that is counted.
    """

    def __init__(self, running: Callable[[], int], prices: PriceTable | None = None) -> None:
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
        self._prices = prices or PriceTable({})
        self._cost = Counter(
            "modelbus_gateway_cost", "What completed answers cost, by the table of --prices.", ["model", "currency"],
            registry=self.registry,
        )  # fmt: skip
        self._new_costs: dict[tuple[str, str], float] = {}
        self._in_flight = Gauge(
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
        self._running = running
        self._shared = MULTIPROCESS_FOLDER in os.environ
        self._new_requests: dict[tuple[str, str, int], int] = {}
        self._new_tokens: dict[str, list[int]] = {}
        self._seconds_children: dict[tuple[str, str], Histogram] = {}
        self._first_children: dict[str, Histogram] = {}

    def ended(self, route: str, model: str, status: int, seconds: float) -> None:
        """``model`` is "" when the request named none that is deployed, so that labels stay few."""
        key = route, model, status
        self._new_requests[key] = self._new_requests.get(key, 0) + 1
        if self._shared:
            self._settle()
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
        new = self._new_tokens.get(model)
        if new is None:
            new = self._new_tokens[model] = [0, 0]
        new[0] += usage.prompt_tokens
        new[1] += usage.completion_tokens
        if (price := self._prices.of(model)) is not None:
            key = model, price.currency
            self._new_costs[key] = self._new_costs.get(key, 0.0) + price.cost(usage)

    def _settle(self) -> None:
        """Passes on what was added up."""
        requests, self._new_requests = self._new_requests, {}
        for (route, model, status), count in requests.items():
            self._requests.labels(route, model, status).inc(count)
        tokens, self._new_tokens = self._new_tokens, {}
        for model, (prompt, completion) in tokens.items():
            self._tokens.labels(model, "prompt").inc(prompt)
            self._tokens.labels(model, "completion").inc(completion)
        costs, self._new_costs = self._new_costs, {}
        for (model, currency), cost in costs.items():
            self._cost.labels(model, currency).inc(cost)
        self._in_flight.set(self._running())

    def queued(self, depths: dict[str, int]) -> None:
        for model, depth in depths.items():
            self._queued.labels(model).set(depth)

    def stuck(self, models: Iterable[str], standing: Container[str]) -> None:
        for model in models:
            self._stuck.labels(model).set(model in standing)

    def exposition(self) -> bytes:
        """The text that Prometheus reads: of all processes, when there are several."""
        self._settle()
        if not self._shared:
            return generate_latest(self.registry)
        everyone = CollectorRegistry()
        MultiProcessCollector(everyone)  # type: ignore[no-untyped-call]
        return generate_latest(everyone)
