"""Requests that change their publisher: a client that comes back through another gateway takes its request along.

The publisher that has a request gives it up when it is asked to; from then on it says nothing about it any more,
neither that it should stop nor that its last frame has come: that is the other one's business.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import OrderedDict
from typing import TYPE_CHECKING

from .errors import ModelBusError, StreamMoved
from .messages import Accepted, Adopt, Held

if TYPE_CHECKING:
    from .calls import Call
    from .publisher import Publisher

log = logging.getLogger(__name__)

KEPT = 10_000  #: how many requests that were given up are remembered


class Moving:
    """What one publisher gives up and what it keeps for readers that may come back."""

    def __init__(self, publisher: Publisher) -> None:
        self._publisher = publisher
        self._gone: OrderedDict[str, str] = OrderedDict()  #: request -> who has it now, "" if that is not known

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._gone

    def away(self, request_id: str, to: str = "") -> None:
        """A request is no longer ours, or not yet."""
        self._gone[request_id] = to
        if len(self._gone) > KEPT:
            self._gone.popitem(last=False)

    def expect(self, request_id: str) -> None:
        """A request is on its way here: until its call is ready we neither want it nor want it stopped."""
        if request_id not in self._gone:
            self.away(request_id)

    def back(self, request_id: str) -> None:
        """A request is ours."""
        self._gone.pop(request_id, None)

    def successor(self, accepted: Accepted) -> Adopt | None:
        """What to tell a worker that has begun with a request which was given up while it was queued."""
        to = self._gone[accepted.id]
        return Adopt(id=accepted.id, run=accepted.run, publisher=to, of=self._publisher.id) if to else None

    def give(self, adopt: Adopt) -> Held:
        """Gives a request up, if it is here and may be taken, and says what is known of it."""
        call = self._publisher.call_of(adopt.id)
        if call is None:
            return Held(id=adopt.id, moved_to=self._gone.get(adopt.id, ""))
        publication = call.publication
        held = Held(
            id=adopt.id,
            known=True,
            given=call.unread or not adopt.if_unread,
            stored=publication is None or publication.stored or bool(call.reception.run) or call.end is not None,
            run=call.reception.run,
            left_ms=max(0, round((call.deadline - asyncio.get_running_loop().time()) * 1000)),
            request=call.attempt,
        )
        if held.given:
            ours = adopt.publisher == self._publisher.id
            self.away(adopt.id, "" if ours else adopt.publisher)
            call.fail(StreamMoved())
        return held

    async def keep(self, call: Call) -> None:
        """Reads on in place of a reader that has left, until another one takes the request or its time is up."""
        call.unread = True
        key = call.request.idempotency_key
        try:
            async with asyncio.timeout(None if key else self._publisher.settings.orphan_grace_s):
                async for _ in call.batches():
                    pass
        except TimeoutError:
            await call.cancel()
        except ModelBusError as error:
            log.info("request %s ended while nobody read it: %s", call.id, error.message)
        finally:
            if not call.over:
                # Nobody keeps it any more, but those who run it go on for a while.
                self.away(call.id)
                with contextlib.suppress(ModelBusError):
                    call.fail(StreamMoved())
