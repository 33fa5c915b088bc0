"""One connection to the bus: the only module that knows nats-py.

Everything else speaks to this small face (publish, subscribe, request, JetStream by JSON, on_reconnect), so the
client library can be replaced. The settings here undo defaults of nats-py 2.16 that hurt: a dead server was found
after minutes, reconnecting stopped after 60 tries, publishes made while cut off were sent much later.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import ssl
import time
from collections.abc import Awaitable, Callable
from functools import partial
from types import TracebackType
from typing import Any, Self

from . import websockets  # noqa: F401  # isort: skip  # before nats-py

import msgspec
import nats.aio.subscription
import nats.errors

from .errors import AuthenticationFailed, BusUnavailable, ModelBusError
from .names import random_token
from .settings import BusSettings
from .wire import Msg, WireClient, header_block

__all__ = ["Bus", "JetStreamError", "Msg", "NoResponders", "PubAck", "Subscription"]

log = logging.getLogger(__name__)

_json = msgspec.json.Decoder()

#: With so many bytes waiting to be sent, whoever sends more waits.
_MUCH = 1 << 20


class NoResponders(ModelBusError):
    """Nobody listens on this subject."""

    code, default_status, retryable = "no_responders", 503, True


class JetStreamError(ModelBusError):
    """The server refused a JetStream call.

    Attributes:
        err_code: the server's own number (its errors.json), for instance 10071 = wrong last sequence.
    """

    code, default_status = "jetstream_error", 500

    def __init__(self, description: str, err_code: int, status: int) -> None:
        super().__init__(f"{description} (JetStream error {err_code})", status=status)
        self.err_code = err_code

    @property
    def full(self) -> bool:
        """A stream is at its limit of messages or bytes, or there is no room for it."""
        return self.err_code in (10077, 10122, 10054, 10047)


class Subscription:
    """Interest in a subject."""

    def __init__(self, subscription: nats.aio.subscription.Subscription) -> None:
        self._subscription: Any = subscription

    async def unsubscribe(self) -> None:
        """Ends it; messages on their way are thrown away."""
        with contextlib.suppress(nats.errors.Error):
            await self._subscription.unsubscribe()

    async def drain(self) -> None:
        """Ends it; messages that the server sent before it knew still reach the callback before this returns."""
        with contextlib.suppress(nats.errors.Error, TimeoutError):
            await self._subscription.drain()


class PubAck(msgspec.Struct, frozen=True):
    """The server has stored a message."""

    stream: str = ""
    seq: int = 0
    duplicate: bool = False
    error: dict[str, Any] | None = None


_puback = msgspec.json.Decoder(PubAck)


class Bus:
    """A connection that comes back by itself.

    Made by :meth:`connect`; use it in ``async with``. Callbacks of subscriptions are plain functions that only
    enqueue: nats-py runs them one after another, a slow one would delay all others of its subscription.
    """

    def __init__(self, settings: BusSettings, name: str) -> None:
        self.settings = settings
        self.name = name
        self._nc = WireClient()
        self._inbox = ""
        self._reply_prefix = ""
        self._replies: dict[str, Callable[[Msg], None]] = {}
        self._reply_number = 0
        self._reconnect_callbacks: list[Callable[[], Awaitable[None]]] = []
        self._last_error: Exception | None = None
        #: ``time.monotonic()`` of the last connect or reconnect.
        self.connected_at = 0.0
        #: Set when the connection is closed for good, by us or by an error that nats-py does not come back from.
        self.closed = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()

    @classmethod
    async def connect(cls, settings: BusSettings, *, name: str) -> Bus:
        """Connects, or says why not.

        Args:
            settings: where the bus is.
            name: shown by the server's monitoring.

        Raises:
            BusUnavailable: no server answers at the address.
            AuthenticationFailed: it refuses our credentials, or wants some.
        """
        bus = cls(settings, name)
        await bus._open()
        return bus

    async def _open(self) -> None:
        # nats-py annotates seconds as int; it takes fractions.
        options: dict[str, Any] = {
            "inbox_prefix": b"_INBOX",
            "reconnect_time_wait": 0.2,
            "connect_timeout": self.settings.connect_timeout_s,
        }
        if self.settings.creds:
            from .credentials import credential_options

            options.update(credential_options(self.settings.creds))
        if self.settings.tls_ca or self.settings.tls_cert:
            context = ssl.create_default_context(cafile=self.settings.tls_ca or None)
            if self.settings.tls_cert:
                context.load_cert_chain(self.settings.tls_cert, self.settings.tls_key or None)
            options["tls"] = context
        opening = self._nc.connect(
            servers=self.settings.urls,
            name=self.name,
            allow_reconnect=True,
            # Subjects are made in names.py, of tokens that are safe.
            skip_subject_validation=True,
            max_reconnect_attempts=-1,
            ping_interval=5,
            max_outstanding_pings=2,
            error_cb=self._on_error,
            disconnected_cb=self._on_disconnected,
            reconnected_cb=self._on_reconnected,
            closed_cb=self._on_closed,
            **options,
        )
        try:
            await asyncio.wait_for(opening, self.settings.connect_timeout_s + 1.0)
        except (TimeoutError, OSError, nats.errors.Error) as error:
            with contextlib.suppress(Exception, asyncio.CancelledError):
                await self._nc.close()
            cause = self._last_error or error
            # A server that refuses us may cut the connection before its words are read.
            wants_credentials = bool(getattr(self._nc, "_server_info", {}).get("auth_required"))
            cut = isinstance(cause, ConnectionError | nats.errors.UnexpectedEOF)
            words = str(cause).lower()
            if "authorization" in words or "permissions" in words or (wants_credentials and cut):
                raise AuthenticationFailed(
                    f"the bus at {self.settings.url} refuses these credentials: "
                    "name a credential file with --creds FILE (MODELBUS_CREDS)"
                ) from error
            raise BusUnavailable(
                f"no bus answers at {self.settings.url} ({cause or type(cause).__name__}): "
                "start one with `modelbus start --head`, or check --address"
            ) from error
        prefix = options["inbox_prefix"]
        self._inbox = f"{prefix.decode() if isinstance(prefix, bytes) else prefix}.{random_token(16)}"
        self._reply_prefix = f"{self._inbox}.r."
        self.connected_at = time.monotonic()
        await self._subscribe_replies()

    async def _subscribe_replies(self) -> None:
        await self.subscribe(f"{self._reply_prefix}*", self._on_reply)

    # The connection's own events. nats-py wants coroutine functions.

    async def _on_error(self, error: Exception) -> None:
        self._last_error = error
        if self.connected_at:
            log.warning("bus: %s", error)

    async def _on_disconnected(self) -> None:
        if not self._nc.is_closed and self.connected_at:
            log.warning("bus: connection lost, reconnecting")

    async def _on_reconnected(self) -> None:
        self.connected_at = time.monotonic()
        log.info("bus: reconnected to %s", self._nc.connected_url.netloc if self._nc.connected_url else "?")
        for callback in self._reconnect_callbacks:
            task = asyncio.create_task(self._run_callback(callback), name="bus-reconnected")
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _run_callback(self, callback: Callable[[], Awaitable[None]]) -> None:
        try:
            await callback()
        except (ModelBusError, TimeoutError, nats.errors.Error) as error:
            log.warning("bus: after the reconnect: %s", error)

    async def _on_closed(self) -> None:
        self.closed.set()

    # What everything else uses.

    @property
    def is_connected(self) -> bool:
        return self._nc.is_connected

    @property
    def connected_for_s(self) -> float:
        """Seconds since the last connect or reconnect; 0 while disconnected."""
        return time.monotonic() - self.connected_at if self.is_connected else 0.0

    def on_reconnect(self, callback: Callable[[], Awaitable[None]]) -> None:
        """Calls back after each reconnect, in a task of its own."""
        self._reconnect_callbacks.append(callback)

    def new_inbox(self) -> str:
        """A subject that only we may listen on."""
        return f"{self._inbox}.{random_token(8)}"

    def send(self, subject: str, payload: bytes, *, reply: str = "", headers: bytes = b"") -> None:
        """Sends without waiting for anybody. While disconnected it may be dropped.

        Args:
            headers: as ``wire.header_block`` makes them.

        Raises:
            BusUnavailable: the connection is closed, or its buffer is full.
        """
        try:
            self._nc.publish_now(subject, payload, reply, headers)
        except nats.errors.Error as error:
            raise BusUnavailable(f"cannot publish to the bus: {error}") from error

    async def publish(
        self, subject: str, payload: bytes, *, reply: str = "", headers: dict[str, str] | None = None
    ) -> None:
        """As :meth:`send`; waits when more is to be sent than the connection takes.

        Raises:
            BusUnavailable: the connection is closed, or its buffer is full.
        """
        self.send(subject, payload, reply=reply, headers=header_block(headers) if headers else b"")
        if self._nc.pending_data_size > _MUCH:
            with contextlib.suppress(nats.errors.Error, TimeoutError):
                await self._nc.room()

    async def subscribe(self, subject: str, callback: Callable[[Msg], None], *, queue: str = "") -> Subscription:
        """Listens; ``callback`` must only enqueue."""
        try:
            return Subscription(await self._nc.subscribe_now(subject, callback, queue))
        except nats.errors.Error as error:
            raise BusUnavailable(f"cannot subscribe at the bus: {error}") from error

    def on_reply(self, callback: Callable[[Msg], None]) -> str:
        """A reply subject; ``callback`` gets the first message that comes there. See :meth:`forget_reply`."""
        self._reply_number += 1
        token = str(self._reply_number)
        self._replies[token] = callback
        return self._reply_prefix + token

    def expect_reply(self) -> tuple[str, asyncio.Future[Msg]]:
        """A reply subject and the future of the first message that comes there; see :meth:`forget_reply`."""
        future: asyncio.Future[Msg] = asyncio.get_running_loop().create_future()
        return self.on_reply(partial(_resolve, future)), future

    def forget_reply(self, reply: str) -> None:
        """No longer waits for a reply."""
        self._replies.pop(reply[len(self._reply_prefix) :], None)

    def _on_reply(self, msg: Msg) -> None:
        callback = self._replies.pop(msg.subject[len(self._reply_prefix) :], None)
        if callback is not None:
            callback(msg)

    async def request(
        self, subject: str, payload: bytes = b"", *, timeout_s: float = 2.0, headers: dict[str, str] | None = None
    ) -> Msg:
        """Publishes and waits for one answer.

        Raises:
            NoResponders: nobody listens there.
            TimeoutError: no answer within ``timeout_s``.
        """
        reply, future = self.expect_reply()
        # A plain timer costs a third of asyncio.timeout, and this is in the way of every request.
        timer = asyncio.get_running_loop().call_later(timeout_s, _time_out, future)
        try:
            await self.publish(subject, payload, reply=reply, headers=headers)
            msg = await future
        finally:
            timer.cancel()
            self.forget_reply(reply)
        if msg.status == "503":
            raise NoResponders(f"nobody listens on {subject}")
        return msg

    async def js_request(self, api: str, body: object | None = None, *, timeout_s: float = 5.0) -> dict[str, Any]:
        """A JetStream API call: JSON in, JSON out.

        Raises:
            JetStreamError: the server says no.
            BusUnavailable: JetStream does not answer.
        """
        payload = b"" if body is None else msgspec.json.encode(body)
        try:
            msg = await self.request(f"$JS.API.{api}", payload, timeout_s=timeout_s)
        except (NoResponders, TimeoutError) as error:
            raise BusUnavailable(
                f"JetStream does not answer {api.split('.')[0]}: {str(error) or f'no answer in {timeout_s:g} s'}"
            ) from error
        answer: dict[str, Any] = _json.decode(msg.data)
        if "error" in answer:
            raise _jetstream_error(answer["error"])
        return answer

    async def js_publish(
        self,
        subject: str,
        payload: bytes,
        *,
        msg_id: str = "",
        ttl_s: int = 0,
        expected_last_subject_seq: int | None = None,
        headers: dict[str, str] | None = None,
        timeout_s: float = 5.0,
    ) -> PubAck:
        """Stores a message in the stream that covers the subject and waits until it is stored.

        With a ``msg_id`` it is sent again with the same id until ``timeout_s`` is over: the stream keeps one.

        Raises:
            JetStreamError: the stream refuses it (full, wrong last sequence ...).
            BusUnavailable: no stream answered in time.
        """
        sent = dict(headers or {})
        if msg_id:
            sent["Nats-Msg-Id"] = msg_id
        if ttl_s:
            sent["Nats-TTL"] = f"{ttl_s}s"
        if expected_last_subject_seq is not None:
            sent["Nats-Expected-Last-Subject-Sequence"] = str(expected_last_subject_seq)
        end = time.monotonic() + timeout_s
        while True:
            left = end - time.monotonic()
            try:
                msg = await self.request(
                    subject, payload, timeout_s=min(left, 2.0) if msg_id else left, headers=sent or None
                )
                return parse_puback(msg)
            except (NoResponders, TimeoutError, BusUnavailable) as error:
                # While a cluster elects a leader, or a server starts, nobody answers for the stream.
                if not msg_id or time.monotonic() + 0.1 >= end:
                    raise BusUnavailable(
                        f"no stream stored the message on {subject}: {str(error) or 'no answer'}"
                    ) from error
                await asyncio.sleep(0.1)

    async def flush(self) -> None:
        """Waits until the server has all that was published before.

        Raises:
            BusUnavailable: it does not answer.
        """
        try:
            # The first PING overtakes what still lies in the client's buffer; the second comes after it.
            await self._nc.flush(2)
            await self._nc.flush(2)
        except nats.errors.Error as error:
            raise BusUnavailable(f"the bus does not answer: {error}") from error

    async def close(self) -> None:
        """Closes for good; what was published before is sent if the server still listens."""
        for task in list(self._tasks):
            task.cancel()
        # nats-py can raise CancelledError into the caller when the server is gone.
        with contextlib.suppress(Exception, asyncio.CancelledError):
            if self._nc.is_connected:
                await self._nc.flush(1)
        with contextlib.suppress(Exception, asyncio.CancelledError):
            await self._nc.close()
        self.closed.set()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()


def _resolve(future: asyncio.Future[Msg], msg: Msg) -> None:
    if not future.done():
        future.set_result(msg)


def _time_out(future: asyncio.Future[Msg]) -> None:
    if not future.done():
        future.set_exception(TimeoutError())


def parse_puback(msg: Msg) -> PubAck:
    """The stream's answer to a publish.

    Raises:
        JetStreamError: the stream refused the message.
        NoResponders: no stream covers the subject.
    """
    if msg.status == "503":
        raise NoResponders("no stream covers this subject")
    ack = _puback.decode(msg.data)
    if ack.error is not None:
        raise _jetstream_error(ack.error)
    return ack


def _jetstream_error(error: dict[str, Any]) -> JetStreamError:
    return JetStreamError(
        str(error.get("description", "refused")), int(error.get("err_code", 0)), int(error.get("code", 500))
    )
