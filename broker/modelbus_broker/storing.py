"""Getting a request into its queue: sent at once, sent again until the stream says that it has it.

Nobody waits for the stream's answer before going on: it comes to the publication as the first event of its request.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Coroutine
from functools import partial
from typing import Any

import msgspec

from . import names
from .blobs import INLINE_LIMIT, put_blob
from .connection import Bus, JetStreamError, Msg, NoResponders, parse_puback
from .errors import BusUnavailable, InvalidRequest, ModelBusError, QueueFull, misfit
from .messages import Accepted, Request, decode_request, encode
from .standstill import STUCK_S

#: Without an answer for so long a request is sent again.
AGAIN_S = 2.0
#: While a cluster elects a leader, or a server starts, nobody answers for the stream.
NOBODY_S = 0.1
#: After a reconnect nothing is sent again for so long. A worker may have the request, or have answered it already while
#: we were cut off, and says so first; a bus that was restarted would take it for a new one.
HEAR_FIRST_S = 2.0

#: So long a message that is withdrawn waits for the stream to say where it lies.
WITHDRAW_S = 2.0


class PublisherSettings(msgspec.Struct, frozen=True, kw_only=True):
    """How a publisher publishes. The guarantees can be switched off to measure what each one costs."""

    dedupe: bool = True  #: a message id, so that a retried publish is stored once
    expiry: bool = True  #: a TTL, so that nothing lies in a queue long after its deadline
    accept_timeout_s: float = 30.0  #: how long to try until the queue has stored a request
    stuck_after_s: float = STUCK_S  #: a queue that stands still for so long is told of
    resume_wait_s: float = 10.0  #: how long half an answer waits while no worker lives that could go on
    orphan_grace_s: float = 30.0  #: how long a request that may find another reader goes on without one


class Publication:
    """One attempt of a request on its way into its queue.

    Attributes:
        answered: called once, when it is stored or refused.
        stream, seq: where the message lies, once ``stored``; seq 0 when only its frames say that it was stored.
        duplicate: the stream had it already, from an earlier publish.
        replaces: the lost run, whose message goes when this one is stored.
        withdrawn: nobody wants it any more: it goes as soon as it is known where it lies.
        gone: done when it has gone, for who waits for that.
    """

    __slots__ = (
        "answered", "duplicate", "error", "gone", "headers", "payload", "replaces", "reply", "sent_at", "seq", "stored", "stream",
        "subject",
        "until", "withdrawn",
    )  # fmt: skip

    def __init__(
        self,
        subject: str,
        payload: bytes,
        headers: bytes,
        *,
        until: float,
        answered: Callable[[Publication], None],
        replaces: Accepted | None = None,
    ) -> None:
        self.subject = subject
        self.payload = payload
        self.headers = headers
        self.answered = answered
        self.until = until
        self.replaces = replaces
        self.sent_at = 0.0
        self.reply = ""
        self.stored = self.withdrawn = False
        self.duplicate = False
        self.stream = ""
        self.seq = 0
        self.error: ModelBusError | None = None
        self.gone: asyncio.Future[None] | None = None

    @property
    def open(self) -> bool:
        """Neither stored nor refused yet."""
        return not self.stored and self.error is None

    def tell(self) -> None:
        """Calls ``answered``, and lets go of it: it has the call, which has this publication. Such a circle lies in
        memory until the garbage is collected; without it a request's memory is used again by the next one."""
        answered, self.answered = self.answered, _nobody
        answered(self)


def _nobody(publication: Publication) -> None:
    """Has been told."""


class Storing:
    """Sends publications and hears what becomes of them."""

    def __init__(
        self, bus: Bus, settings: PublisherSettings, spawn: Callable[[Coroutine[Any, Any, None]], object]
    ) -> None:
        self._bus = bus
        self._settings = settings
        self._spawn = spawn

    def store(
        self,
        request: Request,
        subject: str,
        payload: bytes,
        answered: Callable[[Publication], None],
        replaces: Accepted | None = None,
    ) -> Publication:
        """Sends an attempt on its way and returns at once; ``answered`` hears what becomes of it."""
        headers = b""
        if self._settings.dedupe or self._settings.expiry:
            msg_id = (
                f"Nats-Msg-Id: {names.message_id(request.id, request.attempt)}\r\n" if self._settings.dedupe else ""
            )
            ttl = f"Nats-TTL: {request.budget_ms // 1000 + 60}s\r\n" if self._settings.expiry else ""
            headers = f"NATS/1.0\r\n{msg_id}{ttl}\r\n".encode()
        until = time.monotonic() + min(self._settings.accept_timeout_s, request.budget_ms / 1000)
        publication = Publication(subject, payload, headers, until=until, answered=answered, replaces=replaces)
        self._send(publication)
        return publication

    def _send(self, publication: Publication) -> None:
        publication.sent_at = time.monotonic()
        if publication.reply:
            self._bus.forget_reply(publication.reply)
        publication.reply = self._bus.on_reply(partial(self._heard, publication))
        try:
            self._bus.send(
                publication.subject, publication.payload, reply=publication.reply, headers=publication.headers
            )
        except BusUnavailable:
            pass  # the connection takes nothing now: it is sent again until the time is up

    def _heard(self, publication: Publication, msg: Msg) -> None:
        if not publication.open:
            return
        try:
            ack = parse_puback(msg)
        except NoResponders:
            publication.sent_at = time.monotonic() - AGAIN_S + NOBODY_S
            return
        except JetStreamError as error:
            publication.error = error
            if error.full:
                publication.error = QueueFull(f"the queue of the bus is full ({error.message})", retry_after_s=1.0)
        else:
            publication.stored, publication.stream, publication.seq = True, ack.stream, ack.seq
            publication.duplicate = ack.duplicate
            publication.payload = b""
            if publication.withdrawn:
                self._spawn(self._remove(publication))
        publication.tell()

    def look_after(self, publication: Publication) -> None:
        """Sends it again when it is time to, or gives it up; to be called every now and then while it is open."""
        now = time.monotonic()
        if now - publication.sent_at < AGAIN_S:
            return
        if now < publication.until and self._settings.dedupe:
            if self._bus.connected_for_s > HEAR_FIRST_S:
                self._send(publication)
            return
        publication.error = BusUnavailable("the bus did not store the request: no answer from its stream")
        publication.tell()
        self.forget(publication)

    def forget(self, publication: Publication) -> None:
        """No longer listens for the stream's answer."""
        self._bus.forget_reply(publication.reply)
        publication.reply = ""
        publication.answered = _nobody

    async def withdraw(self, publication: Publication) -> None:
        """Takes the message out of the queue. Where it lies may not be known yet: the stream has a while to say so."""
        publication.withdrawn = True
        if publication.stored:
            await self._remove(publication)
        elif publication.open and publication.reply:
            publication.gone = asyncio.get_running_loop().create_future()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(WITHDRAW_S):
                    await publication.gone

    async def _remove(self, publication: Publication) -> None:
        """Deletes the message. That it succeeds does not say that it was still queued."""
        # Where that fails, the worker that pulls it is told to stop.
        with contextlib.suppress(ModelBusError):
            if publication.seq:
                await remove_message(self._bus, publication.stream, publication.seq)
        if publication.gone is not None and not publication.gone.done():
            publication.gone.set_result(None)


async def packed(bus: Bus, request: Request, *, check: bool = False) -> bytes:
    """A request as it travels: what is too large for a message goes to the blob store, the message refers to it.

    Args:
        check: refuse what no worker could read. For callers whose types nobody has checked: the worker would have to
            bury the message as poison.

    Raises:
        InvalidRequest: something in it cannot be sent, or has the wrong type; ``param`` names it.
        ModelBusError: the blob store does not take it.
    """
    try:
        payload = encode(request)
    except (TypeError, ValueError, OverflowError, RecursionError) as error:  # ValueError: text that is no Unicode, too
        raise InvalidRequest(f"the request cannot be sent: {error}") from error
    if check:
        try:
            decode_request(payload)
        except msgspec.ValidationError as error:
            raise misfit(error) from error
    if len(payload) <= INLINE_LIMIT:
        return payload
    blob = await put_blob(bus, f"{request.id}.{request.attempt}", encode(request.task))
    return encode(msgspec.structs.replace(request, task=None, blob=blob))


async def remove_message(bus: Bus, stream: str, seq: int) -> None:
    """Deletes a message of a stream, whether it waits or was delivered.

    Raises:
        JetStreamError: it is not there.
        BusUnavailable: the stream does not answer.
    """
    await bus.js_request(f"STREAM.MSG.DELETE.{stream}", {"seq": seq, "no_erase": True})
