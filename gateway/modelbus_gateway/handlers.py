"""One function per route. Those of tasks share one way: decode, translate, publish, and answer at once or as it comes."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from importlib.metadata import version

from aiohttp import web
from modelbus.answers import AnswerBuilder, collect
from modelbus_broker import names, topology
from modelbus_broker.calls import Answer, Call
from modelbus_broker.connection import Bus
from modelbus_broker.errors import BusUnavailable, InvalidRequest, ModelBusError, ModelNotFound
from modelbus_broker.messages import Done
from modelbus_broker.publisher import CallOptions, Publisher
from modelbus_broker.registry import Registry

from .delivery import ClientWatch
from .edge import EXCHANGE, Exchange, Traffic, body_too_large, error_body
from .events import ChatEvents, CompletionEvents, error_event
from .metrics import Metrics
from .openai_answers import ModelCard, ModelList, chat_answer, completion_answer, embedding_answer, to_json
from .relay import relay
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

    async def body(self, request: web.Request) -> bytes:
        """Raises RequestTooLarge, if the head says so before anything is read."""
        limit = self.settings.max_body_bytes
        if request.content_length is not None and request.content_length > limit:
            raise body_too_large(limit)
        return await request.read()

    def model(self, name: str) -> str:
        """The model that a client means; an unknown name is returned as it is.

        Raises:
            ModelNotFound: the name stands for the only model, and there are none or several.
        """
        model = self.settings.served_model_names.get(name)
        if model is None:
            return name
        if model:
            return model
        models = self.registry.models()
        if len(models) != 1:
            raise ModelNotFound(
                f"{name!r} stands for the only model that is deployed, but there are {len(models)}; "
                f"start the gateway with --served-model-name {name}=MODEL",
                param="model",
            )
        return models[0]

    async def submit(self, request: web.Request, exchange: Exchange, name: str, translation: Translation) -> Call:
        """Publishes the task. Raises what ``Publisher.publish`` raises, and UnsupportedField."""
        model = self.model(name)
        if translation.needs:
            check_needs(translation.needs, name, self.registry.workers_of(model))
        call = await self.publisher.publish(model, translation.task, _options(request, translation))
        exchange.model = model
        exchange.headers["x-request-id"] = call.id
        return call


GATEWAY: web.AppKey[Gateway] = web.AppKey("gateway", Gateway)


async def chat_completions(request: web.Request) -> web.StreamResponse:
    gateway, exchange = request.app[GATEWAY], request[EXCHANGE]
    asked = CHAT_BODY.read(await gateway.body(request))
    translation = translate_chat(asked)
    call = await gateway.submit(request, exchange, asked.model, translation)
    created, role, legacy = int(time.time()), gateway.settings.response_role, translation.legacy_functions
    if translation.stream:
        events = ChatEvents(
            id=call.id, created=created, model=asked.model, role=role, logprobs=translation.logprobs,
            include_usage=translation.include_usage, legacy_functions=legacy,
        )  # fmt: skip
        return await _stream(gateway, request, call, events.events)
    answer = await _collect(gateway, call)
    body = chat_answer(
        answer, id=call.id, created=created, model=asked.model, role=role, logprobs=translation.logprobs, legacy_functions=legacy
    )  # fmt: skip
    return await gateway.watch.deliver(request, body, exchange.headers)


async def completions(request: web.Request) -> web.StreamResponse:
    gateway, exchange = request.app[GATEWAY], request[EXCHANGE]
    asked = COMPLETION_BODY.read(await gateway.body(request))
    translation = translate_completion(asked)
    call = await gateway.submit(request, exchange, asked.model, translation)
    created = int(time.time())
    if translation.stream:
        events = CompletionEvents(
            id=call.id, created=created, model=asked.model, logprobs=translation.logprobs,
            include_usage=translation.include_usage,
        )  # fmt: skip
        return await _stream(gateway, request, call, events.events)
    answer = await _collect(gateway, call)
    body = completion_answer(answer, id=call.id, created=created, model=asked.model, logprobs=translation.logprobs)
    return await gateway.watch.deliver(request, body, exchange.headers)


async def embeddings(request: web.Request) -> web.StreamResponse:
    gateway, exchange = request.app[GATEWAY], request[EXCHANGE]
    asked = EMBEDDING_BODY.read(await gateway.body(request))
    translation = translate_embedding(asked)
    call = await gateway.submit(request, exchange, asked.model, translation)
    answer = await _collect(gateway, call)
    body = embedding_answer(answer, model=asked.model, base64=translation.base64)
    return await gateway.watch.deliver(request, body, exchange.headers)


async def models(request: web.Request) -> web.Response:
    gateway = request.app[GATEWAY]
    names_shown = [*gateway.registry.models(), *gateway.settings.served_model_names]
    cards = [card for name in dict.fromkeys(names_shown) if (card := _card(gateway, name))]
    return _json(ModelList(data=cards))


async def model(request: web.Request) -> web.Response:
    gateway, name = request.app[GATEWAY], request.match_info["model"]
    card = _card(gateway, name)
    if card is None:
        raise ModelNotFound(f"The model '{name}' does not exist.", param="model")
    return _json(card)


async def health(request: web.Request) -> web.Response:
    """This process answers; it says nothing of the bus."""
    return _json({"status": "ok"})


async def ready(request: web.Request) -> web.Response:
    """Requests can be taken: the bus is connected, what is deployed is known, and the gateway is not stopping."""
    gateway = request.app[GATEWAY]
    connected, registry = gateway.bus.is_connected, gateway.registry.ready
    is_ready = connected and registry and not gateway.traffic.closing
    found = {"status": "ok" if is_ready else "not ready", "bus": connected, "registry": registry}
    return _json({**found, "models": len(gateway.registry.models())}, 200 if is_ready else 503)


async def show_version(request: web.Request) -> web.Response:
    return _json({"version": version("modelbus")})


async def metrics(request: web.Request) -> web.Response:
    gateway = request.app[GATEWAY]
    try:
        depths = await asyncio.wait_for(topology.depths(gateway.bus), 2.0)
    except (BusUnavailable, TimeoutError):
        pass  # the last known ones stay
    else:
        gateway.metrics.queued({name: depths.get(names.model_token(name), 0) for name in gateway.registry.models()})
    gateway.metrics.stuck(gateway.registry.models(), gateway.publisher.standstill.standing)
    return web.Response(
        body=gateway.metrics.exposition(), headers={"Content-Type": "text/plain; version=0.0.4; charset=utf-8"}
    )


async def _stream(
    gateway: Gateway, request: web.Request, call: Call, encode: Callable[[list[Answer]], bytes]
) -> web.StreamResponse:
    """Streams an answer. Until its first byte is out an error is an ordinary response; later it is the last event.

    ``[DONE]`` comes only after a complete answer, so a cut one never looks finished.
    """
    exchange = request[EXCHANGE]
    begun = False
    done: Done | None = None
    with gateway.watch.event_stream(request, exchange.headers) as delivery:
        try:
            async with call:
                while done is None:
                    if delivery.takes_more:
                        done = await relay(call, delivery, encode)
                        continue
                    batch = await call.batch()
                    data = encode(batch)
                    if type(last := batch[-1]) is Done:
                        done = last
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
            gateway.metrics.tokens(exchange.model, done.usage)
        return await delivery.end()


async def _collect(gateway: Gateway, call: Call) -> AnswerBuilder:
    answer = await collect(call)
    gateway.metrics.tokens(call.model, answer.usage)
    return answer


def _options(request: web.Request, translation: Translation) -> CallOptions:
    headers = request.headers
    timeout_s = translation.timeout_s
    if not timeout_s and (given := headers.get("X-Request-Timeout")) is not None:
        timeout_s = _header_timeout(given)
    return CallOptions(
        budget_ms=max(1, round(timeout_s * 1000)) if timeout_s else 0,
        stream=translation.stream,
        wait=headers.get("X-Modelbus-Wait", "").lower() in ("1", "true", "yes"),
        traceparent=headers.get("traceparent", ""),
        tracestate=headers.get("tracestate", ""),
    )


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
        deployments = gateway.registry.deployments_of(gateway.model(name))
    except ModelNotFound:
        return None
    if not deployments:
        return None
    return ModelCard(id=name, created=min(deployment.created_ms for deployment in deployments) // 1000)


def _json(value: object, status: int = 200) -> web.Response:
    return web.Response(status=status, body=to_json(value), content_type="application/json")
