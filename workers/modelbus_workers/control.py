"""What publishers and others tell a worker, on ``mb.ctl.<worker>`` and ``mb.find``."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from collections.abc import Coroutine
from typing import TYPE_CHECKING, Literal

import msgspec
from modelbus_broker import names
from modelbus_broker.connection import Msg
from modelbus_broker.errors import BusUnavailable, ModelBusError
from modelbus_broker.messages import (
    Adapter,
    AdapterChecked,
    Adopt,
    Alive,
    Answered,
    Cancelled,
    CheckAdapter,
    FoundRun,
    Go,
    LetGo,
    Measure,
    Probe,
    Resend,
    Stop,
    decode_control,
    encode,
)

from .execution import Execution

if TYPE_CHECKING:
    from .worker import Worker

log = logging.getLogger(__name__)


class Control:
    """Heeds what a worker is told, and answers what it is asked."""

    def __init__(self, worker: Worker) -> None:
        self._worker = worker
        self._tasks: set[asyncio.Task[None]] = set()

    def hear(self, msg: Msg) -> None:
        """A control message."""
        try:
            message = decode_control(msg.data)
        except msgspec.MsgspecError as error:
            log.warning("a control message cannot be decoded: %s", error)
            return
        match message:
            case Stop():
                self._stop(message, msg.reply)
            case Go(id=request_id, run=run):
                for execution in self._executions_of(request_id, run):
                    if execution.go is not None and not execution.go.done():
                        execution.go.set_result(True)
            case LetGo(id=request_id, run=run):
                for execution in self._executions_of(request_id, run):
                    execution.let_go()
            case Answered():
                self._worker.intake.answered_elsewhere(message)
            case Resend(id=request_id, run=run, seq=seq):
                self._worker.outbox.resend(request_id, run, seq)
            case Adopt():
                self._worker.liveness.hear_of(message.publisher)
                self._reply(msg, self._worker.finding.adopt(message))
            case Probe(publisher=publisher):
                self._reply(msg, self._worker.liveness.alive_for(publisher))
            case Measure():
                if msg.reply:
                    self._spawn(self._send(msg.reply, self._worker.engine.metrics().encode()))
            case CheckAdapter(adapter=adapter):
                if msg.reply:
                    self._spawn(self._check_adapter(adapter, msg.reply))

    async def _check_adapter(self, adapter: Adapter, reply: str) -> None:
        fingerprint = words = ""
        try:
            fingerprint = await self._worker.engine.check_adapter(adapter)
        except ModelBusError as error:
            words = error.message
        except Exception as error:  # an engine may raise anything; its words go to who asks
            log.exception("adapter %s cannot be checked", adapter.name)
            words = f"{type(error).__name__}: {error}"
        answer = AdapterChecked(worker=self._worker.id, host=socket.gethostname(), fingerprint=fingerprint, words=words)
        await self._send(reply, encode(answer))

    def asked(self, msg: Msg) -> None:
        """Who runs this request?"""
        self._reply(msg, self._worker.finding.found(msg))

    def _reply(self, msg: Msg, answer: Alive | FoundRun | None) -> None:
        if msg.reply and answer is not None:
            self._spawn(self._send(msg.reply, encode(answer)))

    def _stop(self, message: Stop, reply: str) -> None:
        found = self._executions_of(message.id, message.run)
        for execution in found:
            if reply:
                self._spawn(self._tell_of_stop(execution, execution.state, reply))
            execution.stop(message.reason)
        if not found and not message.run:
            self._worker.intake.cancel(message.id)  # it may be on its way

    async def _tell_of_stop(self, execution: Execution, was: Literal["held", "running", "ended"], reply: str) -> None:
        """Says that the run is here, and when its engine has let go."""
        if was != "ended":
            answer = Cancelled(id=execution.request.id, was=was, worker=self._worker.id)
            await self._send(reply, encode(answer))
            if execution.task is not None:
                await asyncio.wait([execution.task])
            await self._send(reply, encode(msgspec.structs.replace(answer, stopped=True)))

    def _executions_of(self, request_id: str, run: str) -> list[Execution]:
        if run:
            found = self._worker.executions.get(names.run_key(request_id, run))
            return [found] if found else []
        return [execution for execution in self._worker.executions.values() if execution.request.id == request_id]

    async def _send(self, subject: str, payload: bytes) -> None:
        with contextlib.suppress(BusUnavailable):
            await self._worker.bus.publish(subject, payload)

    def _spawn(self, coroutine: Coroutine[None, None, None]) -> None:
        task = asyncio.create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
