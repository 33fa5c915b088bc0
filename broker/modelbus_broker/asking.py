"""What a caller asks for becomes a request: options, what the deployment adds, and whether there is room for it."""

from __future__ import annotations

import time
import zlib
from collections.abc import Collection, Sequence
from typing import Literal, get_args

import msgspec

from . import names
from .errors import InvalidRequest, ModelNotFound, ModelUnavailable, QueueFull
from .messages import (
    Adapter,
    Chat,
    ChatMessage,
    Classification,
    Completion,
    Deployment,
    Embedding,
    Request,
    Sampling,
    Score,
    Storage,
    Task,
)
from .messages.search import ListStores
from .registry import Registry

DAY_MS = 24 * 3600 * 1000

Lane = Literal["hi", "lo"]
_LANES = get_args(Lane)


class CallOptions(msgspec.Struct, frozen=True, kw_only=True):
    """What a caller may say about one request."""

    budget_ms: int = 0  #: 0: the deployment's for lane hi, 24 h for lo and background
    lane: Lane = "hi"
    tenant: str = ""
    idempotency_key: str = ""
    background: bool = False
    wait: bool = False  #: queue it even while no worker of the model is alive
    stream: bool = True
    traceparent: str = ""
    tracestate: str = ""
    revision: str = ""  #: only a worker of this revision may take it
    id: str = ""  #: of the request, where it was given out before; "": a new one
    view: str = ""  #: see ``Request.view``
    answer_kept_s: int = 0  #: see ``Request.answer_kept_s``
    adapter: Adapter | None = None  #: weights to lay over the model's; engines without ``adapters`` refuse it
    labels: dict[str, str] = {}  #: see ``Request.labels``
    detached: bool = False  #: see ``Request.detached``; jobs.py sets it
    outlives: bool = False  #: a reader that leaves may come back: the request goes on for ``orphan_grace_s``


def smallest_task(tasks: Collection[str]) -> Task | None:
    """The least that can be asked of an engine which serves these tasks (see ``Capabilities``); None: nothing is known."""
    one_token = Sampling(max_tokens=1)
    if "chat" in tasks:
        return Chat(messages=[ChatMessage(role="user", content="Hello")], sampling=one_token)
    if "completion" in tasks:
        return Completion(prompt=["Hello"], sampling=one_token)
    if "embedding" in tasks:
        return Embedding(input=["Hello"])
    if "score" in tasks:
        return Score(queries=["Hello"], documents=["Hello"])
    if "classification" in tasks:
        return Classification(input=["Hello"])
    if "storage" in tasks:
        return Storage(operation=ListStores())
    return None


def check_room(
    model: str, deployments: Sequence[Deployment], options: CallOptions, registry: Registry, waiting: int
) -> None:
    """Whether a request is taken now.

    Args:
        deployments: of the model.
        waiting: how many requests of the model wait or run, as far as is known here.

    Raises:
        QueueFull: so many that it has to wait outside.
        ModelNotFound: the model is being undeployed.
        ModelUnavailable: none of its workers is ready, and the caller does not want to wait for one.
    """
    limit = max([deployment.queue_limit for deployment in deployments])
    if waiting >= limit:
        raise QueueFull(
            f"{waiting} requests wait for or run on {model!r}, its limit is {limit}: try again later",
            retry_after_s=1.0,
        )
    if all(deployment.closing for deployment in deployments) and not options.revision:
        raise ModelNotFound(f"the model {model!r} is being undeployed and takes no new requests", param="model")
    if options.wait or options.background or options.detached or registry.is_served(model):
        return
    if any(deployment.wait_until_ms > time.time() * 1000 for deployment in deployments):
        return
    states = sorted({worker.state for worker in registry.workers_of(model, "")})
    raise ModelUnavailable(
        f"the model {model!r} is deployed but no worker of it is ready"
        + (f" (workers are: {', '.join(states)})" if states else ""),
        retry_after_s=5.0,
    )


def make_request(
    publisher: str, model: str, task: Task, options: CallOptions, deployments: Sequence[Deployment]
) -> Request:
    """The request as its publisher sends it: what the caller leaves open comes from the model's first deployment.

    Raises:
        InvalidRequest: an option has a value that it cannot have; ``param`` names it.
    """
    if options.lane not in _LANES:
        raise InvalidRequest(f"lane must be {' or '.join(_LANES)}, not {options.lane!r}", param="lane")
    if not isinstance(options.budget_ms, int) or options.budget_ms < 0:
        raise InvalidRequest(f"budget_ms must be 0 or more milliseconds, not {options.budget_ms!r}", param="budget_ms")
    if not isinstance(options.tenant, str):
        raise InvalidRequest(f"tenant must be a text, not {options.tenant!r}", param="tenant")
    deployment = deployments[0]
    budget_ms = options.budget_ms
    if not budget_ms:
        budget_ms = DAY_MS if options.lane == "lo" or options.background or options.detached else deployment.budget_ms
    return Request(
        id=options.id or names.new_request_id(publisher),
        model=model,
        task=task,
        budget_ms=budget_ms,
        max_crashes=deployment.max_crashes,
        lane=options.lane,
        share=zlib.crc32(options.tenant.encode("utf-8", "surrogatepass")) % deployment.shares if options.tenant else 0,
        tenant=options.tenant,
        revision=options.revision,
        idempotency_key=options.idempotency_key,
        background=options.background or options.detached,
        stream=options.stream,
        traceparent=options.traceparent,
        tracestate=options.tracestate,
        fail_fast=deployment.replicas > 1 or len(deployments) > 1,
        publisher=publisher if options.id and not _names(options, publisher) else "",
        view=options.view,
        answer_kept_s=options.answer_kept_s,
        adapter=options.adapter,
        labels=options.labels,
        detached=options.detached,
    )


def _names(options: CallOptions, publisher: str) -> bool:
    """Whether the id that was given out before says all there is to say about who waits for the answer."""
    return options.detached or names.publisher_of(options.id) == publisher
