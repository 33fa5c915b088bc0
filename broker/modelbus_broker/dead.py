"""Dead letters: requests that will not be run again, kept in ``MB_DEAD`` with the reason until someone replays or drops them.

A letter holds the original message, so that nothing of the request is lost. A body that travelled as a claim check is
copied next to its letter: the blob store forgets after a day, dead letters do not.
"""

from __future__ import annotations

import logging
import time
from collections.abc import AsyncIterator

import msgspec

from . import names
from .asking import CallOptions
from .blobs import get_blob, get_chunks, put_chunks
from .buckets import Bucket
from .calls import Call
from .connection import Bus
from .errors import InvalidRequest, ModelNotFound, NotFound
from .jobs import keep_error
from .messages import DeadLetter, Request, decode_dead_letter, decode_request, decode_task, encode
from .publisher import Publisher
from .reading import Stored, read_batch, read_stream
from .topology import model_subjects

log = logging.getLogger(__name__)

UNDEPLOYED = "undeploy"  #: stands for a worker in the frames that end what waited for a model


class StoredLetter(msgspec.Struct, frozen=True):
    """A dead letter and where it lies."""

    number: int  #: in the stream; what people call it by when it has no id
    letter: DeadLetter


# Burying


def letter_of(
    request: Request, original: bytes, subject: str, *, reason: str, detail: str, run: str = ""
) -> DeadLetter:
    """The letter of a request that could be read; ``run`` is the one that failed last, if one did."""
    return DeadLetter(
        id=request.id,
        model=request.model,
        reason=reason,
        detail=detail,
        crashes=request.crashes,
        original=original,
        subject=subject,
        at_ms=time.time_ns() // 1_000_000,
        runs=[*request.lost_runs, run] if run else request.lost_runs,
        tenant=request.tenant,
    )


async def bury(bus: Bus, letter: DeadLetter, request: Request | None, *, message_id: str) -> None:
    """Stores a letter, its body first; returns when the stream has it.

    Args:
        request: None when the original cannot be read.
        message_id: storing it twice within two minutes keeps one.

    Raises:
        ModelBusError: it is not stored: the message must stay where it is.
    """
    if request is not None and request.blob is not None:
        try:
            task = await get_blob(bus, request.blob)
        except NotFound as error:
            letter = msgspec.structs.replace(letter, detail=f"{letter.detail} ({error.message})")
        else:
            name = names.random_token(16)
            body = await put_chunks(bus, names.dead_body_subject(letter.model, name), name, task)
            letter = msgspec.structs.replace(letter, body=body)
    await bus.js_publish(names.dead_subject(letter.model), encode(letter), msg_id=f"dead.{message_id}")


async def bury_waiting(bus: Bus, model: str) -> int:
    """Moves what waits for a model that is being taken down to the dead letters, and tells those who wait for it.

    Returns how many there were. The messages themselves go with the model's queue.
    """
    count = 0
    for stream, subject in model_subjects(model):
        async for message in read_stream(bus, stream, subject):
            await _bury_undeployed(bus, model, stream, message)
            count += 1
    return count


async def _bury_undeployed(bus: Bus, model: str, stream: str, message: Stored) -> None:
    why = f"model {model!r} was undeployed while the request waited"
    message_id = f"{stream}.{message.seq}"
    try:
        request = decode_request(message.data)
        publisher = names.publisher_of(request.id)
    except (msgspec.MsgspecError, ValueError):
        letter = DeadLetter(
            id="", model=model, reason="undeployed", detail=why, original=message.data, subject=message.subject,
            at_ms=time.time_ns() // 1_000_000,
        )  # fmt: skip
        return await bury(bus, letter, None, message_id=message_id)
    letter = letter_of(request, message.data, message.subject, reason="undeployed", detail=why)
    await bury(bus, letter, request, message_id=message_id)
    if request.detached:
        answers = Bucket(bus, names.BUCKET_ANSWERS)
        await keep_error(answers, request.id, ModelNotFound(why), kept_s=request.answer_kept_s)
        return
    # No worker has this run: a first frame under a name of our own makes it the one that counts.
    run = names.run_name(request.attempt, 1, UNDEPLOYED)
    frame = ModelNotFound(why).failed(id=request.id, run=run, seq=0)
    await bus.publish(names.response_subject(publisher, UNDEPLOYED), encode([frame]))


# Reading


async def letters(bus: Bus, model: str = "") -> AsyncIterator[StoredLetter]:
    """All dead letters, oldest first; of one model or of all.

    Raises:
        BusUnavailable: the stream does not answer.
    """
    subject = names.dead_subject(model) if model else "mb.dead.*"
    async for message in read_stream(bus, names.STREAM_DEAD, subject):
        try:
            yield StoredLetter(message.seq, decode_dead_letter(message.data))
        except msgspec.MsgspecError as error:
            log.warning("dead letter %d cannot be read: %s", message.seq, error)


async def find_letter(bus: Bus, which: str) -> StoredLetter:
    """The letter of this number, or the newest one of this request id.

    Raises:
        NotFound: there is none.
    """
    if which.isdecimal():
        found = await read_batch(bus, names.STREAM_DEAD, "mb.dead.*", seq=int(which), batch=1)
        if found and found[0].seq == int(which):
            return StoredLetter(found[0].seq, decode_dead_letter(found[0].data))
    else:
        newest = None
        async for stored in letters(bus):
            if stored.letter.id == which:
                newest = stored
        if newest is not None:
            return newest
    raise NotFound(f"there is no dead letter {which!r}; `modelbus dead list` shows those that are there")


async def request_of(bus: Bus, letter: DeadLetter) -> Request:
    """The request of a letter, its task inside.

    Raises:
        InvalidRequest: the original cannot be read.
        NotFound: its body is gone.
    """
    try:
        request = decode_request(letter.original)
    except msgspec.MsgspecError as error:
        raise InvalidRequest(f"the original of this letter cannot be read: {error}") from error
    if request.task is not None:
        return request
    if letter.body is None:
        raise NotFound("the body of this request is gone: it was too large for its message and is no longer kept")
    subject = names.dead_body_subject(letter.model, letter.body.name)
    task = decode_task(await get_chunks(bus, names.STREAM_DEAD, subject, letter.body))
    return msgspec.structs.replace(request, task=task)


# Ending


async def drop(bus: Bus, stored: StoredLetter) -> None:
    """Removes a letter and its body for good."""
    letter = stored.letter
    if letter.body is not None:
        subject = names.dead_body_subject(letter.model, letter.body.name)
        await bus.js_request(f"STREAM.PURGE.{names.STREAM_DEAD}", {"filter": subject})
    await bus.js_request(f"STREAM.MSG.DELETE.{names.STREAM_DEAD}", {"seq": stored.number, "no_erase": True})


async def replay(publisher: Publisher, stored: StoredLetter) -> Call:
    """Publishes the request of a letter anew and returns when its queue has it. The letter stays: see ``drop``.

    It is a new request: a new id, no crashes, 24 hours of time, in lane ``lo`` behind those for whom someone waits.

    Raises:
        InvalidRequest, NotFound: the request cannot be read, or its body is gone.
        ModelBusError: as ``Publisher.submit``.
    """
    request = await request_of(publisher.bus, stored.letter)
    assert request.task is not None
    options = CallOptions(lane="lo", tenant=request.tenant, wait=True, stream=request.stream, adapter=request.adapter)
    return await publisher.submit(request.model, request.task, options)
