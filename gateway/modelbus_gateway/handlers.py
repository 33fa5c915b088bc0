"""One function per route. Those of tasks share one way: decode, translate, publish, and answer at once or as it comes."""

from __future__ import annotations

import asyncio
import time
from importlib.metadata import version

import msgspec
from aiohttp import web
from modelbus.answers import AnswerBuilder, collect
from modelbus.tracing import Trace
from modelbus_broker import names, topology
from modelbus_broker.adapters import resolve
from modelbus_broker.asking import CallOptions
from modelbus_broker.attaching import Attaching
from modelbus_broker.calls import Call
from modelbus_broker.connection import Bus
from modelbus_broker.errors import BusUnavailable, InvalidRequest, ModelBusError, ModelNotFound
from modelbus_broker.messages import Done
from modelbus_broker.once import Once
from modelbus_broker.publisher import Publisher
from modelbus_broker.registry import Registry

from .batches.records import BatchRecords
from .batches.running import BatchRunner
from .checks import Need
from .decisions import DECISIONS_BODY, check_decides, decision_answer, translate_decisions
from .delivery import ClientWatch
from .edge import EXCHANGE, Exchange, Traffic, body_too_large, error_body
from .engine_metrics import exposition, measure
from .event_ids import EventId, read_event_id
from .events import ChatEvents, CompletionEvents, error_event
from .files.store import FileStore
from .metrics import Metrics
from .openai_answers import ModelCard, ModelList, chat_answer, completion_answer, embedding_answer, to_json
from .relay import relay
from .resuming import Encode, Kind, Rest, View, last_event, read_view, view_text
from .scoring import (
    CLASSIFICATION_BODY,
    RERANK_BODY,
    SCORE_BODY,
    classification_answer,
    rerank_answer,
    score_answer,
    translate_classification,
    translate_rerank,
    translate_score,
)
from .settings import GatewaySettings
from .translate import (
    CHAT_BODY,
    COMPLETION_BODY,
    EMBEDDING_BODY,
    Translation,
    check_needs,
    translate_chat,
    translate_completion,
    translate_embedding,
)
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
        options = _options(request, translation, view)
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


async def chat_completions(request: web.Request) -> web.StreamResponse:
    gateway, exchange = request.app[GATEWAY], request[EXCHANGE]
    asked = CHAT_BODY.read(await gateway.body(request))
    translation = translate_chat(asked)
    view = View(
        kind="chat", model=asked.model, include_usage=translation.include_usage, logprobs=translation.logprobs,
        legacy_functions=translation.legacy_functions,
    )  # fmt: skip
    call = await gateway.submit(request, exchange, asked.model, translation, view)
    if translation.stream:
        return await _stream(gateway, request, call, _events(gateway, call, view))
    answer = await _collect(gateway, call)
    if answer.done is not None and answer.done.rung:
        exchange.headers["x-modelbus-rung"] = answer.done.rung
        exchange.headers["x-modelbus-attempts"] = str(answer.done.attempts)
    body = chat_answer(
        answer, id=call.id, created=_created(call), model=asked.model, role=gateway.settings.response_role,
        logprobs=translation.logprobs, legacy_functions=translation.legacy_functions,
    )  # fmt: skip
    return await gateway.watch.deliver(request, body, exchange.headers)


async def completions(request: web.Request) -> web.StreamResponse:
    gateway, exchange = request.app[GATEWAY], request[EXCHANGE]
    asked = COMPLETION_BODY.read(await gateway.body(request))
    translation = translate_completion(asked)
    view = View(
        kind="completion", model=asked.model, include_usage=translation.include_usage, logprobs=translation.logprobs
    )
    call = await gateway.submit(request, exchange, asked.model, translation, view)
    if translation.stream:
        return await _stream(gateway, request, call, _events(gateway, call, view))
    answer = await _collect(gateway, call)
    body = completion_answer(
        answer, id=call.id, created=_created(call), model=asked.model, logprobs=translation.logprobs
    )
    return await gateway.watch.deliver(request, body, exchange.headers)


async def chat_stream(request: web.Request) -> web.StreamResponse:
    """The rest of a chat completion's stream, whoever began it."""
    return await _resume(request, "chat")


async def completion_stream(request: web.Request) -> web.StreamResponse:
    """The rest of a text completion's stream, whoever began it."""
    return await _resume(request, "completion")


async def _resume(request: web.Request, kind: Kind) -> web.StreamResponse:
    gateway, exchange = request.app[GATEWAY], request[EXCHANGE]
    call, view, last = await gateway.resume(request, exchange, kind)
    return await _stream(gateway, request, call, _events(gateway, call, view), last)


async def embeddings(request: web.Request) -> web.StreamResponse:
    gateway, exchange = request.app[GATEWAY], request[EXCHANGE]
    asked = EMBEDDING_BODY.read(await gateway.body(request))
    translation = translate_embedding(asked)
    call = await gateway.submit(request, exchange, asked.model, translation)
    answer = await _collect(gateway, call)
    body = embedding_answer(answer, model=asked.model, base64=translation.base64)
    return await gateway.watch.deliver(request, body, exchange.headers)


async def rerank(request: web.Request) -> web.StreamResponse:
    gateway, exchange = request.app[GATEWAY], request[EXCHANGE]
    asked = RERANK_BODY.read(await gateway.body(request))
    call = await gateway.submit(request, exchange, asked.model, translate_rerank(asked))
    answer = await _collect(gateway, call)
    return await gateway.watch.deliver(request, rerank_answer(answer, asked, id=call.id), exchange.headers)


async def score(request: web.Request) -> web.StreamResponse:
    gateway, exchange = request.app[GATEWAY], request[EXCHANGE]
    asked = SCORE_BODY.read(await gateway.body(request))
    call = await gateway.submit(request, exchange, asked.model, translate_score(asked))
    answer = await _collect(gateway, call)
    body = score_answer(answer, id=call.id, created=_created(call), model=asked.model)
    return await gateway.watch.deliver(request, body, exchange.headers)


async def classify(request: web.Request) -> web.StreamResponse:
    gateway, exchange = request.app[GATEWAY], request[EXCHANGE]
    asked = CLASSIFICATION_BODY.read(await gateway.body(request))
    call = await gateway.submit(request, exchange, asked.model, translate_classification(asked))
    answer = await _collect(gateway, call)
    body = classification_answer(answer, id=call.id, created=_created(call), model=asked.model)
    return await gateway.watch.deliver(request, body, exchange.headers)


async def decisions(request: web.Request) -> web.StreamResponse:
    gateway, exchange = request.app[GATEWAY], request[EXCHANGE]
    asked = DECISIONS_BODY.read(await gateway.body(request))
    questions = translate_decisions(asked)
    model, _ = resolve(gateway.registry, gateway.model(asked.model))
    check_decides(asked.model, gateway.registry.workers_of(model))
    exchange.model = model if gateway.registry.deployments_of(model) else ""

    async def one(translation: Translation) -> AnswerBuilder:
        # One request for each question; a key for the whole would make them one.
        options = msgspec.structs.replace(_options(request, translation, None), idempotency_key="")
        call = await gateway.publisher.publish(gateway.model(asked.model), translation.task, options)
        exchange.headers.setdefault("x-request-id", call.id)
        return await _collect(gateway, call)

    try:
        async with asyncio.TaskGroup() as group:  # the first error takes the other questions back
            running = [group.create_task(one(question.translation)) for question in questions]
    except* ModelBusError as failed:
        raise failed.exceptions[0] from None
    body = decision_answer(questions, [task.result() for task in running], model=asked.model)
    return await gateway.watch.deliver(request, body, exchange.headers)


async def models(request: web.Request) -> web.Response:
    gateway = request.app[GATEWAY]
    names_shown = [*gateway.settings.served_model_names]
    services = gateway.registry.services()
    for name in reversed(gateway.registry.models()):
        if name in services:
            continue  # no OpenAI client could ask it anything
        names_shown[:0] = [name, *(f"{name}:{adapter}" for adapter in gateway.registry.adapters_of(name))]
    cards = [card for name in dict.fromkeys(names_shown) if (card := _card(gateway, name))]
    return json_response(ModelList(data=cards))


async def model(request: web.Request) -> web.Response:
    gateway, name = request.app[GATEWAY], request.match_info["model"]
    card = _card(gateway, name)
    if card is None:
        raise ModelNotFound(f"The model '{name}' does not exist.", param="model")
    return json_response(card)


async def health(request: web.Request) -> web.Response:
    """This process answers; it says nothing of the bus."""
    return json_response({"status": "ok"})


async def ready(request: web.Request) -> web.Response:
    """Requests can be taken: the bus is connected, what is deployed is known, and the gateway is not stopping."""
    gateway = request.app[GATEWAY]
    connected, registry = gateway.bus.is_connected, gateway.registry.ready
    is_ready = connected and registry and not gateway.traffic.closing
    found = {"status": "ok" if is_ready else "not ready", "bus": connected, "registry": registry}
    return json_response({**found, "models": len(gateway.registry.models())}, 200 if is_ready else 503)


async def show_version(request: web.Request) -> web.Response:
    return json_response({"version": version("modelbus")})


async def metrics(request: web.Request) -> web.Response:
    gateway = request.app[GATEWAY]
    try:
        depths = await asyncio.wait_for(topology.depths(gateway.bus), 2.0)
    except (BusUnavailable, TimeoutError):
        pass  # the last known ones stay
    else:
        gateway.metrics.queued({name: depths.get(names.model_token(name), 0) for name in gateway.registry.models()})
    gateway.metrics.stuck(gateway.registry.models(), gateway.publisher.standstill.standing)
    engines = exposition(await measure(gateway.bus, gateway.registry.workers.values()))
    return web.Response(
        body=gateway.metrics.exposition() + engines,
        headers={"Content-Type": "text/plain; version=0.0.4; charset=utf-8"},
    )


def _events(gateway: Gateway, call: Call, view: View) -> Encode:
    """Makes events of frames."""
    created = _created(call)
    if view.kind == "chat":
        return ChatEvents(
            id=call.id, created=created, model=view.model, role=gateway.settings.response_role, logprobs=view.logprobs,
            include_usage=view.include_usage, legacy_functions=view.legacy_functions,
        ).events  # fmt: skip
    return CompletionEvents(
        id=call.id, created=created, model=view.model, logprobs=view.logprobs, include_usage=view.include_usage
    ).events


def _created(call: Call) -> int:
    """The same from whichever gateway an answer comes."""
    return names.started_ms_of(call.id) // 1000


async def _stream(
    gateway: Gateway, request: web.Request, call: Call, encode: Encode, last: EventId | None = None
) -> web.StreamResponse:
    """Streams an answer, or what follows after an event of it. Until the headers are out an error is an ordinary
    response; later it is the last event.

    ``[DONE]`` comes only after a complete answer, so a cut one never looks finished.
    """
    exchange = request[EXCHANGE]
    if last is None and (header := request.headers.get("Last-Event-ID")):
        last = read_event_id(header, "Last-Event-ID")
    if last is not None:
        encode = Rest(encode, last).events
    begun = False
    done: Done | None = None
    with gateway.watch.event_stream(request, exchange.headers) as delivery:
        try:
            async with call:
                if call.outlives and call.failure is None:
                    # Who may come back needs the id, whenever the first output comes.
                    if not call.attached:
                        await call.stored()
                    await delivery.begin()
                while done is None:
                    if begun and delivery.takes_more:
                        done = await relay(call, delivery, encode)
                        continue
                    batch = await call.batch()
                    data = encode(batch)
                    if type(end := batch[-1]) is Done:
                        done = end
                    if not data:
                        continue
                    if not begun:
                        begun = True
                        gateway.metrics.first_token(exchange.model, time.monotonic() - exchange.started)
                    await delivery.write(data)
        except ModelBusError as error:
            if not delivery.begun:
                raise
            exchange.status = error.status
            delivery.response.force_close()
            await delivery.write(error_event(error_body(error)))
        else:
            if not call.attached:
                gateway.metrics.tokens(exchange.model, done.usage)
        return await delivery.end()


async def _collect(gateway: Gateway, call: Call) -> AnswerBuilder:
    answer = await collect(call)
    if not call.attached:
        gateway.metrics.tokens(call.model, answer.usage)
    return answer


def _options(request: web.Request, translation: Translation, view: View | None) -> CallOptions:
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


def _card(gateway: Gateway, name: str) -> ModelCard | None:
    try:
        model, adapter = resolve(gateway.registry, gateway.model(name))
    except ModelNotFound:
        return None
    deployments = gateway.registry.deployments_of(model)
    if not deployments:
        return None
    if adapter is not None:
        return ModelCard(id=name, created=adapter.created_ms // 1000, parent=model)
    return ModelCard(id=name, created=min(deployment.created_ms for deployment in deployments) // 1000)


def json_response(value: object, status: int = 200) -> web.Response:
    return web.Response(status=status, body=to_json(value), content_type="application/json")
