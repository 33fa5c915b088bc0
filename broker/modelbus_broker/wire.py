"""The fast way through nats-py: messages go from the socket to their callback, and from ``publish`` to the socket,
without a task, a queue or a future in between.

nats-py connects, authenticates, reconnects and resubscribes; that is its part and stays so. What it does for each
message (a reader task, a queue and a task per subscription, a flusher task) costs more than the message itself:
measured on the way of a chat request, a quarter of the gateway's CPU time. So this client takes over the socket's
protocol once nats-py has logged in. Only :mod:`connection` uses it.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Callable
from typing import Any

from . import websockets  # noqa: F401  # isort: skip  # before nats-py

import nats.aio.client
import nats.errors
from nats.aio.subscription import Subscription
from nats.aio.transport import TcpTransport

log = logging.getLogger(__name__)

_CRLF = b"\r\n"
_HEADER_LINE = b"NATS/1.0"
#: With so many bytes waiting in the socket, writing is left to nats-py's flusher, which waits for room.
_WAITING_BYTES = 256 << 10
#: So many messages are written at once. More in one turn of the event loop go out bit by bit: who gets them works on
#: the first ones while the last ones are made. All at the turn's end, and each process waits for the other (measured:
#: two processes on two cores then use little more than one).
_TOGETHER = 16
#: A line of the protocol is never longer; without an end after so much, this is no NATS server.
_LONGEST_LINE = 1 << 20


class Msg:
    """A message that came. Its headers are read when somebody looks at them."""

    __slots__ = ("_header_block", "_headers", "data", "reply", "subject")

    def __init__(self, subject: str, reply: str, data: bytes, header_block: bytes = b"") -> None:
        self.subject = subject
        self.reply = reply
        self.data = data
        self._header_block = header_block
        self._headers: dict[str, str] | None = None

    @property
    def headers(self) -> dict[str, str]:
        """By name; the server's own status line as ``Status`` and ``Description``."""
        if self._headers is None:
            self._headers = _parse_headers(self._header_block) if self._header_block else {}
        return self._headers

    @property
    def status(self) -> str:
        """The server's status in a message without a body ("503", "404", "408" ...), "" in an ordinary one."""
        block = self._header_block
        if self.data or len(block) < 12 or block[8] != 32:
            return ""
        return block[9:12].decode()


def _parse_headers(block: bytes) -> dict[str, str]:
    first, _, lines = block.partition(_CRLF)
    found: dict[str, str] = {}
    status, _, description = first[len(_HEADER_LINE) :].strip().partition(b" ")
    if status:
        found["Status"] = status.decode()
        if description:
            found["Description"] = description.strip().decode("utf-8", "replace")
    for line in lines.split(_CRLF):
        name, colon, value = line.partition(b":")
        if colon:
            found[name.strip().decode("ascii", "replace")] = value.strip().decode("utf-8", "replace")
    return found


def header_block(headers: dict[str, str]) -> bytes:
    """Headers as they travel. Names and values are ours: a line break in one would be a mistake of this program.

    Raises:
        ValueError: there is one.
    """
    lines = "".join([f"{name}: {value}\r\n" for name, value in headers.items()])
    if lines.count("\n") != len(headers) or lines.count("\r") != len(headers):
        raise ValueError("a header may not have a line break")
    return b"NATS/1.0\r\n" + lines.encode() + _CRLF


class WireClient(nats.aio.client.Client):
    """nats-py's client with the ways of single messages replaced."""

    def __init__(self) -> None:
        super().__init__()
        self._writing = False
        self._handling: set[asyncio.Task[None]] = set()

    # Out

    def publish_now(self, subject: str, payload: bytes, reply: str = "", headers: bytes = b"") -> None:
        """Sends at the end of this turn of the event loop, some messages together.

        Args:
            headers: as :func:`header_block` makes them.

        Raises:
            nats.errors.Error: the connection is closed, its buffer is full, or the payload is too large.
        """
        if self.is_closed:
            raise nats.errors.ConnectionClosedError
        size = len(payload)
        connected = self.is_connected
        if not connected and size + self._pending_data_size > self._max_pending_size:
            raise nats.errors.OutboundBufferLimitError
        # The server counts the headers too, and cuts the connection when there is too much.
        if size + len(headers) > self._max_payload:
            raise nats.errors.MaxPayloadError
        if headers:
            line = f"HPUB {subject} {reply} {len(headers)} {len(headers) + size}\r\n".encode()
            command = b"".join((line, headers, payload, _CRLF))
        else:
            command = b"".join((f"PUB {subject} {reply} {size}\r\n".encode(), payload, _CRLF))
        self._pending.append(command)
        self._pending_data_size += len(command)
        if not connected:
            return
        if not self._writing:
            self._writing = True
            asyncio.get_running_loop().call_soon(self._write_rest)
            self._write_out()
        elif len(self._pending) >= _TOGETHER:
            self._write_out()

    def _write_rest(self) -> None:
        self._writing = False
        self._write_out()

    def _write_out(self) -> None:
        # While disconnected it stays; nats-py sends it after the reconnect.
        if not self._pending or not self.is_connected:
            return
        transport = self._transport
        if isinstance(transport, TcpTransport) and transport._io_writer is not None:
            socket = transport._io_writer.transport
            if not socket.is_closing() and socket.get_write_buffer_size() < _WAITING_BYTES:
                pending, self._pending, self._pending_data_size = self._pending, [], 0
                socket.write(pending[0] if len(pending) == 1 else b"".join(pending))
                return
        if self._flush_queue is not None and self._flush_queue.empty():
            self._flush_queue.put_nowait(asyncio.get_running_loop().create_future())

    async def room(self) -> None:
        """Waits until what was published is with the operating system, some seconds at most."""
        await self._flush_pending(force_flush=True)

    # In

    async def subscribe_now(self, subject: str, callback: Callable[[Msg], None], queue: str = "") -> Subscription:
        """Listens. ``callback`` runs while the socket is read: it must only enqueue.

        Raises:
            nats.errors.Error: the connection is closed.
        """
        if self.is_closed:
            raise nats.errors.ConnectionClosedError
        self._sid += 1
        subscription = _Interest(self, self._sid, subject, queue=queue)
        subscription.deliver = callback
        self._subs[self._sid] = subscription
        await self._send_subscribe(subscription)
        return subscription

    async def _read_loop(self) -> None:
        """Instead of nats-py's reader: hands the socket to :class:`_Reader` and waits for its end."""
        if not isinstance(self._transport, TcpTransport):
            await super()._read_loop()  # websockets: the slow way
            return
        reader: Any = self._transport._io_reader
        writer: Any = self._transport._io_writer
        protocol = _Reader(self._subs, writer.transport.get_protocol())
        # A task of its own: what it does may cancel this one.
        handling = asyncio.create_task(self._handle_controls(protocol.controls), name="bus-controls")
        self._handling.add(handling)
        handling.add_done_callback(self._handling.discard)
        try:
            early = bytes(reader._buffer)
            reader._buffer.clear()
            # Nothing can come in between: there is no await.
            writer.transport.set_protocol(protocol)
            # The old one may have told the socket to wait.
            if reader._paused:
                reader._paused = False
                writer.transport.resume_reading()
            if reader.at_eof() or reader.exception() is not None:
                protocol.end(reader.exception() or nats.errors.UnexpectedEOF())
            if early:
                protocol.data_received(early)
            error = await protocol.ended
            if isinstance(error, nats.errors.UnexpectedEOF):
                await self._error_cb(error)
            await self._process_op_err(error)
        except asyncio.CancelledError:
            pass  # nats-py reconnects, or closes
        finally:
            protocol.active = False
            protocol.controls.put_nowait((b"", b""))

    async def _handle_controls(self, controls: asyncio.Queue[tuple[bytes, bytes]]) -> None:
        """What is no message: pings, errors, news of servers. nats-py answers them, in their order."""
        while True:
            operation, rest = await controls.get()
            if not operation:
                return
            if operation == b"PING":
                await self._process_ping()
            elif operation == b"PONG":
                await self._process_pong()
            elif operation == b"INFO":
                await self._process_info(json.loads(rest))
            elif operation == b"-ERR":
                await self._process_err(rest.strip(b" '").decode().lower())


class _Interest(Subscription):
    """A subscription whose messages go straight to a callback."""

    deliver: Callable[[Msg], None]


class _Reader(asyncio.Protocol):
    """Cuts what comes from the server into messages and delivers them.

    What concerns writing is passed on to the protocol that nats-py's stream writer waits with.
    """

    def __init__(self, subscriptions: dict[int, Any], before: Any) -> None:
        self.active = True
        self.ended: asyncio.Future[Exception] = asyncio.get_running_loop().create_future()
        self.controls: asyncio.Queue[tuple[bytes, bytes]] = asyncio.Queue()
        self._subscriptions = subscriptions
        self._before = before
        self._parts: list[bytes] = []  #: of a message that has not come whole
        self._have = 0
        self._need = 0  #: bytes at which it may be whole

    def pause_writing(self) -> None:
        self._before.pause_writing()

    def resume_writing(self) -> None:
        self._before.resume_writing()

    def eof_received(self) -> bool:
        self.end(nats.errors.UnexpectedEOF())
        return False

    def connection_lost(self, error: Exception | None) -> None:
        self._before.connection_lost(error)
        self.end(error or nats.errors.UnexpectedEOF())

    def end(self, error: Exception) -> None:
        """The connection is of no more use."""
        if not self.ended.done():
            self.ended.set_result(error)

    def data_received(self, data: bytes) -> None:
        if not self.active:
            return
        if self._parts:
            self._parts.append(data)
            self._have += len(data)
            if self._have < self._need:
                return
            data = b"".join(self._parts)
            self._parts.clear()
        try:
            rest, self._need = self._parse(data)
        except (ValueError, IndexError):
            log.error("bus: what came is not the NATS protocol: %r", data[:80])
            self.end(nats.errors.ProtocolError())
            self.active = False
            return
        if rest:
            self._parts.append(rest)
            self._have = len(rest)

    def _parse(self, data: bytes) -> tuple[bytes, int]:
        """Delivers all that is whole. Returns the rest, and how many bytes it takes to look at it again."""
        subscriptions = self._subscriptions
        at, size = 0, len(data)
        while at < size:
            end = data.find(_CRLF, at)
            if end < 0:
                if size - at > _LONGEST_LINE:
                    raise ValueError("no end of line")
                return data[at:], 0
            line = data[at:end]
            body = end + 2
            if line[:4] == b"MSG ":
                words = line.split()
                length = int(words[-1])
                whole = body + length + 2
                if whole > size:
                    return data[at:], whole - at
                subscription = subscriptions.get(int(words[2]))
                if subscription is not None:
                    reply = words[3].decode() if len(words) == 5 else ""
                    self._deliver(subscription, Msg(words[1].decode(), reply, data[body : body + length]))
            elif line[:5] == b"HMSG ":
                words = line.split()
                length, header_length = int(words[-1]), int(words[-2])
                whole = body + length + 2
                if whole > size:
                    return data[at:], whole - at
                subscription = subscriptions.get(int(words[2]))
                if subscription is not None:
                    reply = words[3].decode() if len(words) == 6 else ""
                    headers, payload = data[body : body + header_length], data[body + header_length : body + length]
                    self._deliver(subscription, Msg(words[1].decode(), reply, payload, headers))
            else:
                whole = body
                operation, _, rest = line.partition(b" ")
                if operation not in (b"PING", b"PONG", b"INFO", b"-ERR", b"+OK"):
                    raise ValueError(operation)
                self.controls.put_nowait((operation, rest))
            at = whole
        return b"", 0

    def _deliver(self, subscription: Any, msg: Msg) -> None:
        try:
            subscription.deliver(msg)
        except Exception:  # one bad callback must not stop all others
            log.exception("bus: a message on %s was not handled", msg.subject)
