"""One function per route. Those of tasks share one way: decode, translate, publish, and answer at once or as it comes."""

from __future__ import annotations

import asyncio
import time
from importlib.metadata import version

import msgspec
from aiohttp import web
from modelbus.answers import AnswerBuilder, collect
from modelbus_broker import names, topology
from modelbus_broker.adapters import resolve
from modelbus_broker.calls import Call
from modelbus_broker.errors import BusUnavailable, ModelBusError, ModelNotFound
from modelbus_broker.messages import Done

from .decisions import DECISIONS_BODY, check_decides, decision_answer, translate_decisions
from .edge import EXCHANGE, error_body
from .engine_metrics import exposition, measure
from .event_ids import EventId, read_event_id
from .events import ChatEvents, CompletionEvents, error_event
from .gateway import GATEWAY, Gateway, json_response, options_of
from .openai_answers import ModelCard, ModelList, chat_answer, completion_answer, embedding_answer
from .relay import relay
from .resuming import Encode, Kind, Rest, View
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
from .translate import (
    CHAT_BODY,
    COMPLETION_BODY,
    EMBEDDING_BODY,
    Translation,
    translate_chat,
    translate_completion,
    translate_embedding,
)


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
        options = msgspec.structs.replace(options_of(request, translation, None), idempotency_key="")
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
