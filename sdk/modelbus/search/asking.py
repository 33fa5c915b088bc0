"""One operation on a search service, asked over the bus: the request waits in the service's queue while that restarts."""

from __future__ import annotations

from typing import TypeVar

from modelbus_broker.asking import CallOptions
from modelbus_broker.errors import EngineFailed, ModelNotFound
from modelbus_broker.messages import Storage
from modelbus_broker.messages.search import ListStores, Operation, Reply, Stores, StoreStatus, decode_reply

from ..answers import collect
from ..model_client import ModelClient

R = TypeVar("R", bound=Reply)

#: The service that is asked where none is named.
DEFAULT_SERVICE = "storage"


async def ask(
    client: ModelClient, service: str, operation: Operation, expected: type[R], *, timeout_s: float = 60.0
) -> R:
    """The reply to an operation.

    Raises:
        ModelNotFound: there is no such service.
        DeadlineExceeded: it did not answer within ``timeout_s``.
        InvalidRequest, NotFound, Conflict, EngineFailed, UpstreamFailed: what the service says; see ``docs/search.md``.
    """
    # An operation that is repeated changes nothing, so a lost worker's are simply asked again.
    options = CallOptions(wait=True, stream=False, budget_ms=max(1, round(timeout_s * 1000)))
    try:
        call = await client.publisher.publish(service, Storage(operation=operation), options)
    except ModelNotFound as error:
        raise ModelNotFound(
            f"there is no search service {service!r}: `modelbus storage start` starts one", param="service"
        ) from error
    reply = decode_reply((await collect(call)).document)
    if not isinstance(reply, expected):
        raise EngineFailed(f"{service!r} answered with {type(reply).__name__} instead of {expected.__name__}")
    return reply


async def list_stores(
    client: ModelClient, *, service: str = DEFAULT_SERVICE, timeout_s: float = 60.0
) -> list[StoreStatus]:
    """All stores of a service, by name. Raises what :func:`ask` raises."""
    return (await ask(client, service, ListStores(), Stores, timeout_s=timeout_s)).stores
