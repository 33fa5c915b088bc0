"""OpenTelemetry spans of requests, in the words of its GenAI conventions: SDK, gateway, queue and worker in one trace.

The context travels in the HTTP header ``traceparent`` and in the field of that name of a request. Nothing happens, and
nothing is imported, where OpenTelemetry is not set up: a program sets it up as it likes, gateways and workers do so when
the environment names an exporter (see :func:`configure`).
"""

from __future__ import annotations

import logging
import os
import re
import sys
import time
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Self

import msgspec
from modelbus_broker.asking import CallOptions
from modelbus_broker.errors import ModelBusError
from modelbus_broker.messages import Sampling, Usage

if TYPE_CHECKING:
    from opentelemetry.trace import Span, Tracer

log = logging.getLogger(__name__)

# Of opentelemetry-semantic-conventions; a test compares them.
OPERATION, PROVIDER = "gen_ai.operation.name", "gen_ai.provider.name"
REQUEST_MODEL, RESPONSE_MODEL, RESPONSE_ID = "gen_ai.request.model", "gen_ai.response.model", "gen_ai.response.id"
INPUT_TOKENS, OUTPUT_TOKENS = "gen_ai.usage.input_tokens", "gen_ai.usage.output_tokens"
FINISH_REASONS, ERROR_TYPE = "gen_ai.response.finish_reasons", "error.type"
#: Fields of ``Sampling`` and the attributes that say them.
SAMPLING = {
    "max_tokens": "gen_ai.request.max_tokens",
    "temperature": "gen_ai.request.temperature",
    "top_p": "gen_ai.request.top_p",
    "top_k": "gen_ai.request.top_k",
    "seed": "gen_ai.request.seed",
    "presence_penalty": "gen_ai.request.presence_penalty",
    "frequency_penalty": "gen_ai.request.frequency_penalty",
}
#: The convention's words for what a task does; others stand for themselves.
OPERATIONS = {"completion": "text_completion", "embedding": "embeddings"}
#: What only modelbus knows.
RUN, ATTEMPT, WORKER, TENANT, LABEL = (
    "modelbus.run", "modelbus.attempt", "modelbus.worker", "modelbus.tenant", "modelbus.label",
)  # fmt: skip

#: As W3C trace context has them: what does not look so is not passed on to others.
_TRACEPARENT = re.compile(r"(?!ff)[0-9a-f]{2}-(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}")
_TRACESTATE = re.compile(r"[ -~]{1,512}")

Kind = Literal["client", "server", "consumer", "internal"]


class Trace(NamedTuple):
    """Where a span belongs, as it travels (W3C trace context)."""

    traceparent: str = ""
    tracestate: str = ""

    def headers(self) -> dict[str, str]:
        """The HTTP headers that hang the spans of who gets them below this one; none where it is no W3C trace context."""
        if not _TRACEPARENT.fullmatch(self.traceparent):
            return {}
        state = {"tracestate": self.tracestate} if _TRACESTATE.fullmatch(self.tracestate) else {}
        return {"traceparent": self.traceparent, **state}


def tracer() -> Tracer | None:
    """None: this program traces nothing."""
    api = sys.modules.get("opentelemetry.trace")
    if api is None:
        return None
    provider = api.get_tracer_provider()
    if isinstance(provider, (api.ProxyTracerProvider, api.NoOpTracerProvider)):
        return None
    found: Tracer = provider.get_tracer("modelbus")
    return found


def start(
    name: str,
    kind: Kind,
    *,
    trace: Trace | None = None,
    attributes: Mapping[str, Any] | None = None,
    start_ms: float = 0.0,
) -> Span | None:
    """Begins a span; None where nothing is traced.

    Args:
        trace: of its parent; None: the current span of this program, if there is one.
        start_ms: Unix time; 0: now.
    """
    own = tracer()
    if own is None:
        return None
    from opentelemetry.trace import SpanKind
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    context = None
    if trace is not None and trace.traceparent:
        context = TraceContextTextMapPropagator().extract(trace._asdict())
    return own.start_span(
        name,
        context=context,
        kind=SpanKind[kind.upper()],
        attributes={key: value for key, value in (attributes or {}).items() if value is not None and value != ""},
        start_time=round(start_ms * 1e6) or None,
    )


def trace_of(span: Span | None) -> Trace:
    """How a span's context travels to its children; empty for None."""
    if span is None:
        return Trace()
    from opentelemetry.trace import set_span_in_context
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    carrier: dict[str, str] = {}
    TraceContextTextMapPropagator().inject(carrier, set_span_in_context(span))
    return Trace(carrier.get("traceparent", ""), carrier.get("tracestate", ""))


def end(
    span: Span | None,
    *,
    error: BaseException | str | None = None,
    attributes: Mapping[str, Any] | None = None,
    end_ms: float = 0.0,
) -> None:
    """Ends a span, once; with ``error`` (or the code of one) it has failed."""
    if span is None:
        return
    span.set_attributes({key: value for key, value in (attributes or {}).items() if value is not None and value != ""})
    if error is not None:
        from opentelemetry.trace import StatusCode

        if isinstance(error, str):
            code, words = error, error
        else:
            code = error.code if isinstance(error, ModelBusError) else type(error).__qualname__
            words = str(error)
        span.set_attribute(ERROR_TYPE, code)
        span.set_status(StatusCode.ERROR, words)
    span.end(round(end_ms * 1e6) or None)


def asked_attributes(operation: str, model: str, sampling: Sampling | None = None, **more: Any) -> dict[str, Any]:
    """What a span says of a request, by the conventions; texts of prompts and answers are never among it."""
    found: dict[str, Any] = {
        OPERATION: OPERATIONS.get(operation, operation),
        PROVIDER: "modelbus",
        REQUEST_MODEL: model,
    }
    if sampling is not None:
        found |= {attribute: getattr(sampling, field) for field, attribute in SAMPLING.items()}
    return found | more


def answered_attributes(usage: Usage, *, id: str = "", finish_reasons: Sequence[str] = ()) -> dict[str, Any]:
    """What a span says of an answer."""
    found: dict[str, Any] = {
        RESPONSE_ID: id, INPUT_TOKENS: usage.prompt_tokens, OUTPUT_TOKENS: usage.completion_tokens,
    }  # fmt: skip
    if finish_reasons:
        found[FINISH_REASONS] = list(finish_reasons)
    return found


def configure(service: str) -> bool:
    """Sets OpenTelemetry up in a process of ours, if the environment names an exporter; says whether it did.

    ``OTEL_TRACES_EXPORTER`` names it (``otlp``, ``console``, ...), or ``OTEL_EXPORTER_OTLP_ENDPOINT`` alone, which means
    ``otlp``. All other variables of OpenTelemetry count too; ``OTEL_SERVICE_NAME`` is ``service`` if nothing is said.
    """
    named = os.environ.get("OTEL_TRACES_EXPORTER", "")
    endpoint = os.environ.get("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT") or os.environ.get("OTEL_EXPORTER_OTLP_ENDPOINT")
    names = [name.strip() for name in (named or ("otlp" if endpoint else "")).split(",") if name.strip()]
    if not names or names == ["none"] or os.environ.get("OTEL_SDK_DISABLED", "").lower() == "true":
        return False
    try:
        from opentelemetry import trace
        from opentelemetry.sdk.resources import SERVICE_NAME, Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError:
        log.warning("OTEL_... asks for traces, and opentelemetry-sdk is not installed: pip install 'modelbus[tracing]'")
        return False
    from importlib.metadata import entry_points

    provider = TracerProvider(resource=Resource.create({SERVICE_NAME: os.environ.get("OTEL_SERVICE_NAME") or service}))
    for name in names:
        # OTLP has two ways; the one over HTTP is the default of OpenTelemetry.
        wanted = {"otlp": f"otlp_proto_{'grpc' if _protocol() == 'grpc' else 'http'}"}.get(name, name)
        found = list(entry_points(group="opentelemetry_traces_exporter", name=wanted))
        if not found:
            log.warning("there is no exporter %r of traces here: pip install 'modelbus[tracing]'", name)
            continue
        provider.add_span_processor(BatchSpanProcessor(found[0].load()()))
    trace.set_tracer_provider(provider)
    return True


def _protocol() -> str:
    protocols = os.environ.get("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL") or os.environ.get("OTEL_EXPORTER_OTLP_PROTOCOL")
    return protocols or "http/protobuf"


def now_ms() -> float:
    """Unix time, as spans count it."""
    return time.time_ns() / 1e6


class Asking:
    """The span of one question of the SDK; ``options`` are the caller's, with its context in them."""

    __slots__ = ("_answered", "options", "span")

    def __init__(self, operation: str, model: str, options: CallOptions, sampling: Sampling | None = None) -> None:
        self.options = options
        self._answered: dict[str, Any] = {}
        self.span = None
        if tracer() is None:
            return
        self.span = start(
            f"{OPERATIONS.get(operation, operation)} {model}",
            "client",
            trace=Trace(options.traceparent, options.tracestate),
            attributes=asked_attributes(operation, model, sampling, **{TENANT: options.tenant}),
        )
        trace = trace_of(self.span)
        self.options = msgspec.structs.replace(options, traceparent=trace.traceparent, tracestate=trace.tracestate)

    def answered(self, usage: Usage, *, id: str, finish_reasons: Sequence[str] = ()) -> None:
        """The answer is complete."""
        if self.span is not None:
            self._answered = answered_attributes(usage, id=id, finish_reasons=finish_reasons)

    def end(self, error: BaseException | None = None) -> None:
        """Ends the span, once."""
        span, self.span = self.span, None
        end(span, error=error, attributes=self._answered)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.end(error)
