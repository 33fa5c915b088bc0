"""Whole programs under test: those that name a model, as ``LLM("chat")``, ``prompt(llm="chat")`` and ``Chat("chat")`` do, and no client."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..model_client import ModelClient
from ..shared import SharedClient, connected, standing_in
from .recording import Recorder, Replay
from .redaction import Redact


@contextmanager
def stand_in(model: ModelClient) -> Iterator[None]:
    """Within the block everything in this process that names a model and no client asks this one; nothing connects.

    ``with stand_in(ScriptedModel("Paris")): assert my_program() == "Paris"``. It holds for all threads, so tests that use it do not
    run side by side in one process. Deploying, statistics and jobs need a real bus.
    """
    with standing_in(model):
        yield


@contextmanager
def record(path: str | Path, redact: Redact | None = None) -> Iterator[Recorder]:
    """Within the block what this process asks over its own connection is recorded; see :class:`Recorder`.

    Raises:
        BusUnavailable, AuthenticationFailed: see ``modelbus.connect_cluster``.
    """
    recorder = Recorder(SharedClient(connected()), path, redact)
    with standing_in(recorder):
        yield recorder


@contextmanager
def replay(path: str | Path, redact: Redact | None = None) -> Iterator[Replay]:
    """Within the block this process gets recorded answers, and nothing connects; see :class:`Replay`.

    Raises:
        ConfigurationError: the file cannot be read, or a line of it is no recording.
    """
    model = Replay(path, redact)
    with standing_in(model):
        yield model
