"""What the routes share: the gateway's parts, and how a request of HTTP becomes one on the bus."""

from __future__ import annotations

import msgspec
from aiohttp import web
from modelbus.tracing import Trace
from modelbus_broker.adapters import resolve
from modelbus_broker.asking import CallOptions
from modelbus_broker.attaching import Attaching
from modelbus_broker.calls import Call
from modelbus_broker.connection import Bus
from modelbus_broker.errors import InvalidRequest, ModelNotFound
from modelbus_broker.once import Once
from modelbus_broker.publisher import Publisher
from modelbus_broker.registry import Registry

from .batches.records import BatchRecords
from .batches.running import BatchRunner
from .checks import Need
from .delivery import ClientWatch
from .edge import EXCHANGE, Exchange, Traffic, body_too_large
from .event_ids import EventId, read_event_id
from .files.store import FileStore
from .metrics import Metrics
from .openai_answers import to_json
from .resuming import Kind, View, last_event, read_view, view_text
from .settings import GatewaySettings
from .translate import Translation, check_needs
from .vector_stores.stores import VectorStores


class Gateway:
    """What the routes share."""

    def __init__(
        self,
        settings: GatewaySettings,
        bus: Bus,
        registry: Registry,
        publisher: Publisher,
        watch: ClientWatch,
        metrics: Metrics,
        traffic: Traffic,
    ) -> None:
        self.settings = settings
        self.bus = bus
        self.registry = registry
        self.publisher = publisher
        self.watch = watch
        self.metrics = metrics
        self.traffic = traffic
        self.attaching = Attaching(publisher)
        self.once = Once(publisher, self.attaching)
        self.files = FileStore(bus, root=settings.files_root, root_limit=settings.max_file_bytes)
        self.vector_stores = VectorStores(
            bus, registry, publisher, self.files,
            service=settings.search_service, embedding_model=settings.embedding_model,
        )  # fmt: skip
        self.batches = BatchRunner(
            BatchRecords(bus), publisher, self.files, metrics, model=self.model, role=settings.response_role
        )

    async def body(self, request: web.Request) -> bytes:
        """Raises RequestTooLarge, if the head says so before anything is read."""
        limit = self.settings.max_body_bytes
        if request.content.is_eof():  # a small body is here when its head is
            body = request.content.read_nowait()
            if len(body) > limit:
                raise body_too_large(limit)
            return body
        if request.content_length is not None and request.content_length > limit:
            raise body_too_large(limit)
        return await request.read()

    def model(self, name: str) -> str:
        """The name on the bus of what a client means: of a model, or of one and an adapter. An unknown name stays as it is.

        Raises:
            ModelNotFound: the name stands for the only model, and there are none or several.
        """
        aliases = self.settings.served_model_names
        if name in aliases:
            return self._aliased(name)
        alias, colon, adapter = name.rpartition(":")
        if alias in aliases and not self.registry.deployments_of(name):
            return f"{self._aliased(alias)}{colon}{adapter}"
        return name

    def _aliased(self, name: str) -> str:
        model = self.settings.served_model_names[name]
        if model:
            return model
        models = [name for name in self.registry.models() if name not in self.registry.services()]
        if len(models) != 1:
            raise ModelNotFound(
                f"{name!r} stands for the only model that is deployed, but there are {len(models)}; "
                f"start the gateway with --served-model-name {name}=MODEL",
                param="model",
            )
        return models[0]

    async def submit(
        self, request: web.Request, exchange: Exchange, name: str, translation: Translation, view: View | None = None
    ) -> Call:
        """Publishes the task, or takes up the request that was asked before.

        Raises what ``Publisher.publish``, ``Once.submit`` and ``Attaching.take_up`` raise, and UnsupportedField.
        """
        asked_for = self.model(name)
        model, adapter = resolve(self.registry, asked_for)
        needs = translation.needs if adapter is None else [Need("model", "adapters"), *translation.needs]
        if needs:
            check_needs(needs, name, self.registry.workers_of(model))
        options = options_of(request, translation, view)
        if translation.stream and (last := request.headers.get("Last-Event-ID")):
            event = read_event_id(last, "Last-Event-ID")
            asked = self.publisher.describe(
                asked_for, translation.task, msgspec.structs.replace(options, id=event.request)
            )
            call = await self.attaching.take_up(event.request, seen=event.seen, model=model, asked=asked)
        elif options.idempotency_key:
            call, earlier = await self.once.submit(asked_for, translation.task, options)
            if earlier:
                exchange.headers["idempotent-replayed"] = "true"
        else:
            call = await self.publisher.publish(asked_for, translation.task, options)
        exchange.model = model
        exchange.headers["x-request-id"] = call.id
        return call

    async def resume(self, request: web.Request, exchange: Exchange, kind: Kind) -> tuple[Call, View, EventId | None]:
        """Takes up the stream in the path. Raises what ``Attaching.take_up`` raises, and InvalidRequest."""
        request_id = request.match_info["id"]
        event = last_event(request.headers.get("Last-Event-ID"), request.query.get("starting_after"), request_id)
        call = await self.attaching.take_up(request_id, seen=event.seen if event else None)
        view = read_view(call.view, kind, request_id, call.model)
        exchange.model = call.model if self.registry.deployments_of(call.model) else ""
        exchange.headers["x-request-id"] = request_id
        return call, view, event


GATEWAY: web.AppKey[Gateway] = web.AppKey("gateway", Gateway)


def options_of(request: web.Request, translation: Translation, view: View | None) -> CallOptions:
    headers, trace = request.headers, request[EXCHANGE].trace
    if trace is None:
        trace = Trace(headers.get("traceparent", ""), headers.get("tracestate", ""))
    key = headers.get("Idempotency-Key", "")
    if len(key) > 255:
        raise InvalidRequest("The header 'Idempotency-Key' has at most 255 characters.", param="Idempotency-Key")
    timeout_s = translation.timeout_s
    if not timeout_s and (given := headers.get("X-Request-Timeout")) is not None:
        timeout_s = _header_timeout(given)
    return CallOptions(
        budget_ms=max(1, round(timeout_s * 1000)) if timeout_s else 0,
        stream=translation.stream,
        wait=_says_yes(headers.get("X-Modelbus-Wait")),
        idempotency_key=key,
        outlives=translation.stream and _says_yes(headers.get("X-Modelbus-Resumable")),
        view=view_text(view) if view is not None and (translation.stream or key) else "",
        traceparent=trace.traceparent,
        tracestate=trace.tracestate,
    )


def _says_yes(header: str | None) -> bool:
    return header is not None and header.lower() in ("1", "true", "yes")


def _header_timeout(given: str) -> float:
    try:
        timeout_s = float(given)
    except ValueError:
        timeout_s = -1.0
    if not 0 < timeout_s <= 7 * 86400:
        raise InvalidRequest(
            f"Invalid header 'X-Request-Timeout': expected seconds > 0 and <= 604800, but got {given!r}.",
            param="X-Request-Timeout",
        )
    return timeout_s


def json_response(value: object, status: int = 200) -> web.Response:
    return web.Response(status=status, body=to_json(value), content_type="application/json")
