"""The one connection of this process, for whoever names a model and no connection: from any thread, on any event loop."""

from __future__ import annotations

import asyncio
import atexit
import functools
import os
import threading
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import contextmanager, suppress
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, TypeVar

from modelbus_broker.asking import CallOptions
from modelbus_broker.calls import Answer
from modelbus_broker.errors import ModelBusError
from modelbus_broker.messages import Capabilities, Task
from modelbus_broker.settings import BusSettings, bus_settings

from .background import BackgroundLoop
from .client import Client
from .model_client import ModelClient
from .port import Answering, Publishing

if TYPE_CHECKING:
    from .structure.profiles import Profile

T = TypeVar("T")

background = BackgroundLoop()  #: runs the connection
_lock = threading.Lock()
_client: Client | None = None
_client_pid = 0
_settings: BusSettings | None = None
_stand_in: ModelClient | None = None  #: asked in place of the connection


def connect_cluster(address: str = "auto", creds: str = "") -> None:
    """Connects this process to the bus; everything in it shares the connection. Does nothing when connected there.

    Args:
        address: ``nats://HOST:PORT``; "auto" is MODELBUS_ADDRESS, else the bus of `modelbus start` on this host.
        creds: path of a credential file.

    Raises:
        BusUnavailable: nothing says where the bus is, or it does not answer.
        AuthenticationFailed: it refuses the credentials.
    """
    global _client, _client_pid, _settings
    settings = bus_settings(address, creds)
    with _lock:
        if _client is not None and _client_pid == os.getpid():
            if settings == _settings:
                return
            background.run(_client.close())
            _client = None
        _client = background.run(Client.open(settings))
        _client_pid, _settings = os.getpid(), settings


def disconnect() -> None:
    """Cancels what still runs, closes the connection and ends the background loop."""
    global _client
    with _lock:
        client, _client = _client, None
        if client is not None and _client_pid == os.getpid():
            with suppress(ModelBusError):
                background.run(client.close())
            background.stop()


atexit.register(disconnect)


def connected() -> Client:
    """The client on the background loop; connects on first use, as ``connect_cluster()`` does."""
    if not _is_connected():
        connect_cluster()
    assert _client is not None
    return _client


def blocking(method: Callable[..., Coroutine[Any, Any, T]]) -> Callable[..., T]:
    """A method for plain programs out of one for asyncio: it waits for the result, on the loop of the shared connection."""

    @functools.wraps(method)
    def waiting(*arguments: Any, **named: Any) -> T:
        return background.run(method(*arguments, **named))

    return waiting


def asked() -> ModelClient:
    """Whom a program asks that names a model and no connection: what stands in for the connection, else ``connected()``."""
    return _stand_in if _stand_in is not None else connected()


@contextmanager
def standing_in(client: ModelClient) -> Iterator[None]:
    """Within the block this client is asked in place of the process's connection, by all threads; see ``modelbus.testing``."""
    global _stand_in
    before, _stand_in = _stand_in, client
    try:
        yield
    finally:
        _stand_in = before


def _is_connected() -> bool:
    return _client is not None and _client_pid == os.getpid()


class SharedClient(ModelClient):
    """The process's connection, to ask over it from any event loop. Made by :func:`shared_client`."""

    def __init__(self, client: Client) -> None:
        self.publisher = _SharedPublisher(client.publisher)
        self._client = client

    def capabilities(self, model: str) -> Capabilities:
        return self._client.capabilities(model)

    def revision(self, model: str) -> str:
        return self._client.revision(model)

    def profile(self, model: str) -> Profile:
        return self._client.profile(model)


async def shared_client() -> ModelClient:
    """As ``asked()``, for any event loop. Connects if need be, without holding up the caller's.

    Raises:
        BusUnavailable, AuthenticationFailed: see ``connect_cluster``.
    """
    if _stand_in is not None:
        return _stand_in
    if not _is_connected():
        await asyncio.to_thread(connect_cluster)
    return SharedClient(connected())


class _AcrossLoops:
    """Stands for an object of the background loop; see :func:`across_loops`."""

    def __init__(self, stands_for: object) -> None:
        self._stands_for = stands_for

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._stands_for, name)

        def call(*args: Any, **kwargs: Any) -> Coroutine[Any, Any, Any]:
            return _across(method(*args, **kwargs))

        return call


def across_loops(value: object) -> Any:
    """The same object of the background loop, but its coroutine methods can be awaited on any loop."""
    return _AcrossLoops(value)


async def _across(coroutine: Coroutine[Any, Any, T]) -> T:
    """Runs it on the background loop; cancelling the task that waits cancels it."""
    return await asyncio.wrap_future(background.submit(coroutine))


class _SharedPublisher:
    """Publishes on the background loop for callers on another one; see ``port.Publishing``."""

    def __init__(self, publisher: Publishing) -> None:
        self._publisher = publisher

    async def publish(self, model: str, task: Task, options: CallOptions | None = None) -> Answering:
        return _SharedCall(await _across(self._publisher.publish(model, task, options)))

    async def submit(self, model: str, task: Task, options: CallOptions | None = None) -> Answering:
        return _SharedCall(await _across(self._publisher.submit(model, task, options)))


class _SharedCall:
    """A call of that publisher; see ``port.Answering``. It crosses over once for all frames that are ready."""

    def __init__(self, call: Answering) -> None:
        self._call = call

    @property
    def id(self) -> str:
        return self._call.id

    async def batch(self) -> list[Answer]:
        return await _across(self._call.batch())

    async def batches(self) -> AsyncIterator[list[Answer]]:
        batches = self._call.batches()
        while (batch := await _across(_next(batches))) is not None:
            yield batch

    async def cancel(self) -> None:
        await _across(self._call.cancel())

    async def __aenter__(self) -> Self:
        await _across(self._call.__aenter__())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None, /
    ) -> None:
        await _across(self._call.__aexit__(kind, error, trace))


async def _next(batches: AsyncIterator[list[Answer]]) -> list[Answer] | None:
    return await anext(batches, None)
