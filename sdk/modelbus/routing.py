"""Several models behind one name: each question goes to the one that has answered fastest of late.

``Router(client, ["small", "large"])`` is a client. Whatever is asked through it, and whatever model is named, goes to one of
its candidates: by turns until each has been measured often enough, then to the fastest. What is measured stays in this
program and is forgotten after the window.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from types import TracebackType
from typing import Literal, NamedTuple, Self

from modelbus_broker.asking import CallOptions
from modelbus_broker.calls import Answer
from modelbus_broker.errors import ConfigurationError
from modelbus_broker.messages import Capabilities, Delta, Done, Task, Vectors

from .model_client import ModelClient
from .port import Answering, Publishing
from .stat import shared_capabilities

#: What is compared: time to the first output, time to the last, or output tokens a second from the first to the last.
Metric = Literal["first_token", "duration", "tokens_per_second"]


class Sample(NamedTuple):
    """One answer, as it was measured."""

    at: float  #: monotonic
    first_token_s: float
    duration_s: float
    tokens_per_second: float  #: 0: too few tokens to say


class Measured:
    """What is known of the speed of some models. Pure but for the clock, which is given.

    Args:
        window_s: samples older than this are forgotten.
        min_samples: a model with fewer is asked in its turn, so that it is measured.
    """

    def __init__(
        self,
        models: Sequence[str],
        *,
        metric: Metric = "first_token",
        window_s: float = 300.0,
        min_samples: int = 3,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if len(set(models)) < 2:
            raise ConfigurationError("a router needs at least two different models")
        if min_samples < 1 or window_s <= 0:
            raise ConfigurationError("min_samples must be at least 1 and window_s more than 0")
        self.models = list(dict.fromkeys(models))
        self.metric: Metric = metric
        self._window_s, self._min_samples, self._clock = window_s, min_samples, clock
        self._samples: dict[str, deque[Sample]] = {model: deque() for model in self.models}
        self._turn = 0

    def add(self, model: str, sample: Sample) -> None:
        """One more answer of a model."""
        self._samples[model].append(sample)

    def pick(self) -> str:
        """The model to ask now."""
        cold = [model for model in self.models if len(self._recent(model)) < self._min_samples]
        if cold:
            self._turn += 1
            return cold[self._turn % len(cold)]
        return min(self.models, key=self._cost)

    def mean(self, model: str) -> float | None:
        """Of the metric, over the window; None: nothing was measured."""
        values = [value for sample in self._recent(model) if (value := self._value(sample))]
        return sum(values) / len(values) if values else None

    def _cost(self, model: str) -> float:
        mean = self.mean(model)
        if mean is None:
            return float("inf")
        return -mean if self.metric == "tokens_per_second" else mean

    def _value(self, sample: Sample) -> float:
        match self.metric:
            case "first_token":
                return sample.first_token_s
            case "duration":
                return sample.duration_s
            case "tokens_per_second":
                return sample.tokens_per_second

    def _recent(self, model: str) -> deque[Sample]:
        samples, oldest = self._samples[model], self._clock() - self._window_s
        while samples and samples[0].at < oldest:
            samples.popleft()
        return samples


class Router(ModelClient):
    """A client that chooses among models; see the module. ``measured`` says what it knows.

    Raises:
        ConfigurationError: there are fewer than two candidates, or a number makes no sense.
    """

    def __init__(
        self,
        client: ModelClient,
        models: Sequence[str],
        *,
        metric: Metric = "first_token",
        window_s: float = 300.0,
        min_samples: int = 3,
    ) -> None:
        self.measured = Measured(models, metric=metric, window_s=window_s, min_samples=min_samples)
        self._client = client
        self.publisher = _Routed(client.publisher, self.measured)

    def capabilities(self, model: str) -> Capabilities:
        """What can be relied on whichever of the candidates is asked."""
        return shared_capabilities([self._client.capabilities(one) for one in self.measured.models])

    def revision(self, model: str) -> str:
        """Of all candidates: any of them may answer."""
        return " ".join(f"{one}={self._client.revision(one)}" for one in self.measured.models)


class _Routed:
    """Publishes to the model that is picked, and measures; see ``port.Publishing``."""

    def __init__(self, publisher: Publishing, measured: Measured) -> None:
        self._publisher, self._measured = publisher, measured
        if (loop := getattr(publisher, "loop", None)) is not None:
            self.loop = loop  #: of the connection, for those who wait on another one

    async def publish(self, model: str, task: Task, options: CallOptions | None = None) -> Answering:
        picked = self._measured.pick()
        return _Timed(await self._publisher.publish(picked, task, options), picked, self._measured)

    async def submit(self, model: str, task: Task, options: CallOptions | None = None) -> Answering:
        picked = self._measured.pick()
        return _Timed(await self._publisher.submit(picked, task, options), picked, self._measured)


class _Timed:
    """A call that is measured while it is read; see ``port.Answering``."""

    def __init__(self, call: Answering, model: str, measured: Measured) -> None:
        self._call, self._model, self._measured = call, model, measured
        self._began = time.monotonic()
        self._first = 0.0

    @property
    def id(self) -> str:
        return self._call.id

    async def batch(self) -> list[Answer]:
        frames = await self._call.batch()
        self._look(frames)
        return frames

    async def batches(self) -> AsyncIterator[list[Answer]]:
        async for frames in self._call.batches():
            self._look(frames)
            yield frames

    async def cancel(self) -> None:
        await self._call.cancel()

    async def __aenter__(self) -> Self:
        await self._call.__aenter__()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None, /
    ) -> None:
        await self._call.__aexit__(kind, error, trace)

    def _look(self, frames: Sequence[Answer]) -> None:
        now = time.monotonic()
        if not self._first and any(isinstance(frame, (Delta, Vectors)) for frame in frames):
            self._first = now
        if frames and isinstance(done := frames[-1], Done):
            first = self._first or now
            writing_s = now - first
            tokens = done.usage.completion_tokens - 1
            speed = tokens / writing_s if tokens > 0 and writing_s > 0 else 0.0
            self._measured.add(self._model, Sample(now, first - self._began, now - self._began, speed))
