"""Recording what a client asks and gets, and giving the same answers again: a JSON line for each request.

What looks like a secret never gets into the file: values of fields with such names, and keys, tokens and passwords in
texts. It is taken out of what is asked before it is looked up as well, so a recording is found again.
"""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import msgspec
from modelbus_broker import names
from modelbus_broker.asking import CallOptions
from modelbus_broker.calls import Answer, Restarted
from modelbus_broker.errors import ConfigurationError, ModelBusError, NotRecorded
from modelbus_broker.messages import Capabilities, Delta, Done, Started, Task, Vectors

from ..model_client import ModelClient
from ..port import Answering, Publishing
from .faults import error_named
from .frames import frame_of, readable
from .model import LocalCall
from .redaction import Redact, cleaned, cleaned_frames, cleaned_task


class Recorder(ModelClient):
    """A client that writes down what is asked of another one, and the answers and errors that come.

    ``async with modelbus.connect() as client: recorder = Recorder(client, "traffic.jsonl")``. Lines are added at the end of
    the file. What was not read to its end is not recorded.
    """

    def __init__(self, client: ModelClient, path: str | Path, redact: Redact | None = None) -> None:
        """
        Args:
            redact: takes more out of every text than what is taken out anyway; a :class:`Replay` needs the same.
        """
        self._client = client
        self._path = Path(path)
        self._redact = redact
        self.publisher = _RecordingPublisher(self, client.publisher)

    def capabilities(self, model: str) -> Capabilities:
        return self._client.capabilities(model)

    def write(self, model: str, task: Task, frames: list[Answer], error: ModelBusError | None) -> None:
        """Adds a line; used by the calls."""
        line: dict[str, Any] = {"model": model, "task": cleaned_task(task, self._redact)}
        if error is not None:
            line["error"] = {"code": error.code, "message": cleaned(error.message, self._redact)}
        line["frames"] = [
            readable(frame)
            for frame in cleaned_frames(frames, self._redact)
            if isinstance(frame, Delta | Vectors | Done)
        ]
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line, ensure_ascii=False) + "\n")


class _RecordingPublisher:
    def __init__(self, recorder: Recorder, inner: Publishing) -> None:
        self._recorder, self._inner = recorder, inner
        self.loop = getattr(
            inner, "loop", None
        )  #: that the inner one is bound to, for callers without one of their own

    async def publish(self, model: str, task: Task, options: CallOptions | None = None) -> Answering:
        return await self._asked(self._inner.publish, model, task, options)

    async def submit(self, model: str, task: Task, options: CallOptions | None = None) -> Answering:
        return await self._asked(self._inner.submit, model, task, options)

    async def _asked(self, ask: Callable[..., Any], model: str, task: Task, options: CallOptions | None) -> Answering:
        try:
            call: Answering = await ask(model, task, options)
        except ModelBusError as error:
            self._recorder.write(model, task, [], error)
            raise
        return _RecordedCall(self._recorder, call, model, task)


class _RecordedCall:
    """Passes on what a call gives, and keeps it."""

    def __init__(self, recorder: Recorder, call: Answering, model: str, task: Task) -> None:
        self._recorder, self._call, self._model, self._task = recorder, call, model, task
        self._frames: list[Answer] = []
        self._written = False

    @property
    def id(self) -> str:
        return self._call.id

    async def batch(self) -> list[Answer]:
        try:
            frames = await self._call.batch()
        except ModelBusError as error:
            self._write(error)
            raise
        for frame in frames:
            if isinstance(frame, Restarted):
                self._frames = []
            else:
                self._frames.append(frame)
        if isinstance(frames[-1], Done):
            self._write(None)
        return frames

    async def batches(self) -> AsyncIterator[list[Answer]]:
        while True:
            frames = await self.batch()
            yield frames
            if isinstance(frames[-1], Done):
                return

    async def cancel(self) -> None:
        self._written = True
        await self._call.cancel()

    async def __aenter__(self) -> Self:
        await self._call.__aenter__()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._call.__aexit__(kind, error, trace)

    def _write(self, error: ModelBusError | None) -> None:
        if not self._written:
            self._written = True
            self._recorder.write(self._model, self._task, self._frames, error)


class Recording(msgspec.Struct, frozen=True, kw_only=True):
    """One line of a file."""

    model: str
    task: dict[str, Any]
    frames: list[dict[str, Any]] = []
    error: dict[str, str] | None = None


class Recordings:
    """What a file of recordings has, by request."""

    def __init__(self, recordings: list[Recording], redact: Redact | None = None) -> None:
        self._redact = redact
        self._answers: dict[tuple[str, str], list[Recording]] = {}
        self._given: dict[tuple[str, str], int] = {}
        for recording in recordings:
            self._answers.setdefault((recording.model, _key(recording.task)), []).append(recording)

    @classmethod
    def read(cls, path: str | Path, redact: Redact | None = None) -> Recordings:
        """
        Raises:
            ConfigurationError: the file cannot be read, or a line of it is no recording; the message says which.
        """
        try:
            lines = Path(path).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigurationError(f"the recordings {str(path)!r} cannot be read: {error}") from error
        recordings = []
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                recording = msgspec.json.decode(line, type=Recording)
                for frame in recording.frames:
                    frame_of(frame, "")
            except (msgspec.DecodeError, KeyError, TypeError) as error:
                raise ConfigurationError(f"line {number} of {str(path)!r} is no recording: {error}") from None
            recordings.append(recording)
        return cls(recordings, redact)

    @property
    def models(self) -> list[str]:
        return sorted({model for model, _ in self._answers})

    async def frames(
        self, model: str, task: Task, id: str = ""
    ) -> AsyncGenerator[Started | Delta | Vectors | Done, None]:
        """The recorded answer. What was asked several times gets its answers in order, and then the last one again.

        Raises:
            NotRecorded: nobody asked this when it was recorded.
            ModelBusError: the recorded error.
        """
        key = (model, _key(cleaned_task(task, self._redact)))
        found = self._answers.get(key)
        if found is None:
            raise NotRecorded(_not_recorded(model, key[1], list(self._answers)))
        turn = self._given.get(key, 0)
        self._given[key] = turn + 1
        recording = found[min(turn, len(found) - 1)]
        for frame in recording.frames:
            yield frame_of(frame, id)
        if recording.error is not None:
            raise error_named(recording.error["code"], recording.error["message"])


class Replay(ModelClient):
    """A client that gives recorded answers and asks nobody; what was not recorded raises ``NotRecorded``."""

    def __init__(self, path: str | Path, redact: Redact | None = None) -> None:
        """
        Raises:
            ConfigurationError: the file cannot be read, or a line of it is no recording.
        """
        self._recordings = Recordings.read(path, redact)
        self.publisher = _ReplayPublisher(self._recordings)

    def capabilities(self, model: str) -> Capabilities:
        """Of a model that takes everything: what was recorded had what it needed."""
        tasks = ["chat", "completion", "embedding", "score", "classification"]
        return Capabilities(
            tasks=tasks, tools=True, json_object=True, json_schema=True, logprobs=True, n=True, extra_fields=["*"]
        )


class _ReplayPublisher:
    def __init__(self, recordings: Recordings) -> None:
        self._recordings = recordings
        self._id = names.new_publisher_id("sdk")

    async def publish(self, model: str, task: Task, options: CallOptions | None = None) -> LocalCall:
        id = (options.id if options else "") or names.new_request_id(self._id)
        return LocalCall(id, self._frames(model, task, id))

    submit = publish

    async def _frames(self, model: str, task: Task, id: str) -> AsyncGenerator[Answer, None]:
        async for frame in self._recordings.frames(model, task, id):
            yield frame


def _key(task: dict[str, Any]) -> str:
    return json.dumps(task, sort_keys=True, ensure_ascii=False)


def _not_recorded(model: str, key: str, known: list[tuple[str, str]]) -> str:
    """Names what differs least from what was recorded."""
    asked = json.loads(key)
    same = [json.loads(other) for name, other in known if name == model]
    text = f"nobody asked this of {model!r} when it was recorded: {_short(asked)}"
    if not same:
        models = ", ".join(sorted({name for name, _ in known})) or "no model"
        return f"{text}; recorded are requests to {models}"

    def differing(other: dict[str, Any]) -> list[str]:
        return sorted(name for name in {*asked, *other} if asked.get(name) != other.get(name))

    nearest = min(same, key=lambda other: len(differing(other)))
    return f"{text}; the nearest of {len(same)} recorded requests differs in {', '.join(differing(nearest))}"


def _short(task: dict[str, Any]) -> str:
    messages = task.get("messages")
    last = messages[-1].get("content") if isinstance(messages, list) and messages else None
    return json.dumps(last if last is not None else task.get("input", task), ensure_ascii=False)[:200]
