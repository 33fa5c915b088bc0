"""What is told to OpenTelemetry of a provider: one client span for each try, below that of the run."""

from __future__ import annotations

import asyncio
from types import TracebackType
from typing import Self
from urllib.parse import urlsplit

from modelbus import tracing
from modelbus.tracing import Trace
from modelbus_broker.errors import RequestCancelled
from modelbus_broker.messages import Sampling, Usage

from .base import Run
from .openai_errors import TryAgain
from .presets import Preset

#: The convention's names of providers, where ours are others.
_PROVIDERS = {"azure_openai": "azure.ai.openai", "gemini": "gcp.gemini", "kimi": "moonshot_ai"}
_ADDRESS, _PORT, _RESENT = "server.address", "server.port", "http.request.resend_count"


class Try:
    """One try. Where nothing is traced it passes on the context of whoever asked.

    Args:
        number: of tries before it.
        pass_on: the provider is told the context, so that its spans hang below this one.

    Attributes:
        headers: for the provider.
    """

    __slots__ = ("_span", "headers")

    def __init__(
        self,
        operation: str,
        model: str,
        run: Run,
        *,
        preset: Preset,
        base_url: str,
        number: int,
        pass_on: bool,
        sampling: Sampling | None = None,
    ) -> None:
        trace = Trace(run.traceparent, run.tracestate)
        self._span = None
        if tracing.tracer() is not None:
            url = urlsplit(base_url)
            more = {
                tracing.PROVIDER: _PROVIDERS.get(preset.name, preset.name),
                _ADDRESS: url.hostname,
                _PORT: url.port or (443 if url.scheme == "https" else 80),
                _RESENT: number or None,
            }
            said = tracing.asked_attributes(operation, model, sampling) | more
            self._span = tracing.start(f"{said[tracing.OPERATION]} {model}", "client", trace=trace, attributes=said)
            trace = tracing.trace_of(self._span)
        self.headers = trace.headers() if pass_on else {}

    def answered(self, usage: Usage, model: str) -> None:
        """The whole answer has come; ``model`` is the provider's word for who gave it."""
        self._end(attributes=tracing.answered_attributes(usage) | {tracing.RESPONSE_MODEL: model})

    def _end(self, error: BaseException | str | None = None, attributes: dict[str, object] | None = None) -> None:
        span, self._span = self._span, None
        tracing.end(span, error=error, attributes=attributes)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(error, (GeneratorExit, asyncio.CancelledError)):
            self._end(RequestCancelled.code)
        else:
            self._end(error.error if isinstance(error, TryAgain) else error)
