"""Passing a stream on: what comes from the bus for a client is written to its socket at once.

While the socket takes everything no task is woken for a frame; that is half of what a frame costs. Only when the
socket is full, the answer has ended or has failed, the request's own task goes on.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from modelbus_broker.calls import Answer, Call
from modelbus_broker.messages import Done

from .delivery import Delivery


async def relay(call: Call, delivery: Delivery, encode: Callable[[list[Answer]], bytes]) -> Done | None:
    """Passes on until the last frame, which it returns, or until the socket was full and has room again: None.

    Raises:
        ModelBusError: the request failed, was cancelled or ran out of time.
        ConnectionError: the client is gone.
    """
    ended: asyncio.Future[Done | None] = asyncio.get_running_loop().create_future()

    def pass_on() -> None:
        if ended.done():
            return
        try:
            if not (frames := call.ready()):
                return
            data = encode(frames)
            has_room = delivery.write_now(data) if data else True
        except Exception as error:  # the request's own task hears of it
            ended.set_exception(error)
            return
        if type(last := frames[-1]) is Done:
            ended.set_result(last)
        elif not has_room:
            ended.set_result(None)

    call.listen(pass_on)
    try:
        pass_on()  # what has come before
        done = await ended
    finally:
        call.listen(None)
    if done is None:
        await delivery.room()
    return done
