"""What a worker receives: requests from its queue and control messages on ``mb.ctl.<worker>``."""

from __future__ import annotations

from typing import Literal

import msgspec

from ..names import publisher_of
from .base import Message
from .chat import Task
from .usage import Usage

Lane = Literal["re", "hi", "lo"]


class BlobRef(Message, frozen=True, kw_only=True):
    """A claim check: the bytes are in the blob store under this name."""

    name: str
    size: int  #: bytes
    sha256: str


class Adapter(Message, frozen=True, kw_only=True):
    """Weights that are laid over the model's own for one request (LoRA)."""

    name: str
    path: str  #: a folder on the worker's host
    fingerprint: str = ""  #: of its files; others are not taken for it. "": whatever lies there


class Request(Message, frozen=True, kw_only=True, tag="request"):
    """One request as it lies in the queue. ``attempt`` n+1 is published when the run of attempt n is lost."""

    id: str
    model: str
    task: Task | None = None  #: None: it is in ``blob``
    blob: BlobRef | None = None
    attempt: int = 1
    crashes: int = 0  #: runs that had started and ended without done or failed
    max_crashes: int = 3
    budget_ms: int = 600_000  #: counts from the time the stream stored the message
    lane: Lane = "hi"
    share: int = 0
    tenant: str = ""
    compat: str = ""  #: only a worker of this compat may take it; "" = any
    revision: str = ""  #: set by deploy's test request: only this revision may take it
    output_token_ids: list[list[int]] = []  #: per choice, what earlier attempts already produced
    emitted_chars: list[int] = []  #: per choice, characters that have reached the client
    prompt_tokens: int = 0  #: of attempt 1, so that usage does not count handed-over tokens as prompt
    idempotency_key: str = ""
    background: bool = False  #: runs to its end even when nobody listens
    handover: bool = False  #: given up by a draining worker; not a crash
    stream: bool = True  #: the client reads tokens as they come
    traceparent: str = ""  #: W3C trace context
    tracestate: str = ""
    avoid: list[str] = []  #: workers that failed it, or would: they leave it to others for a while
    rescues: int = 0  #: how often it went to another worker because one failed it
    fail_fast: bool = False  #: others may do it: an engine leaves further tries to them
    lost_runs: list[str] = []  #: of earlier attempts, as ``names.run_name`` makes them
    publisher: str = ""  #: who waits for the answer; "": the one that the id names
    continues: str = ""  #: the run whose tokens ``output_token_ids`` are
    earlier: bytes = b""  #: frames of earlier runs, where the whole answer is to be kept (see ``answer_kept_s``)
    earlier_blob: BlobRef | None = None  #: the same, too large for the message
    view: str = ""  #: how the publisher shows the answer; handed on as it is to whoever takes the answer up later
    answer_kept_s: int = 0  #: the worker keeps the whole answer for so long, for those who ask again; 0: it does not
    adapter: Adapter | None = None
    labels: dict[str, str] = {}  #: free words of the asker for traces: a prompt function and its version, for instance
    detached: bool = False  #: a job: no publisher waits or fails over; its worker keeps its answer or its error

    @property
    def answers_to(self) -> str:
        """The publisher that waits for the answer."""
        return self.publisher or publisher_of(self.id)


class Stop(Message, frozen=True, kw_only=True, tag="stop"):
    """Abort this request: nobody wants its answer. Who sends it to all workers, with a reply subject, hears from the
    one that has it: a ``Cancelled`` at once, and another when its engine has let go."""

    id: str
    run: str = ""  #: only this run; "" = every run of the id
    reason: str = "cancelled"


class Go(Message, frozen=True, kw_only=True, tag="go"):
    """The publisher says that this run is the one that counts."""

    id: str
    run: str


class LetGo(Message, frozen=True, kw_only=True, tag="let_go"):
    """Another run of the request counts: abort, send no terminal frame, do not ack."""

    id: str
    run: str


class Answered(Message, frozen=True, kw_only=True, tag="answered"):
    """The whole answer has come, from another run: let this one go, book that one if its worker no longer could, and
    acknowledge the message."""

    id: str
    run: str
    counted: str  #: the run that was whole
    usage: Usage


class Resend(Message, frozen=True, kw_only=True, tag="resend"):
    """Send again what the ring holds of this run, from ``seq`` on."""

    id: str
    run: str
    seq: int = 0


class Adopt(Message, frozen=True, kw_only=True, tag="adopt"):
    """Another publisher takes the request over; its frames and its alive messages go there from now on.

    A worker answers with a ``FoundRun``. The publisher that has the request gets this too, and answers with ``Held``.
    """

    id: str
    publisher: str
    seq: int = 0  #: frames from here on are sent again
    run: str = ""  #: the run that is meant; "": whichever is the newest here
    of: str = ""  #: only if it is this publisher's now
    if_unread: bool = False  #: to a publisher: only if nobody reads the answer there


class Probe(Message, frozen=True, kw_only=True, tag="probe"):
    """Are you there? A worker answers with an ``Alive`` for the asking publisher; 503 means gone."""

    publisher: str


class Measure(Message, frozen=True, kw_only=True, tag="measure"):
    """What does your engine count? The answer is plain text: Prometheus's text format, which may be empty."""


class CheckAdapter(Message, frozen=True, kw_only=True, tag="check_adapter"):
    """Can you use this adapter? The answer is an ``AdapterChecked``."""

    adapter: Adapter


Control = Stop | Go | LetGo | Answered | Resend | Adopt | Probe | Measure | CheckAdapter

decode_request = msgspec.msgpack.Decoder(Request).decode
_task_decoder: msgspec.msgpack.Decoder[Task] = msgspec.msgpack.Decoder(Task)
decode_task = _task_decoder.decode
decode_control = msgspec.msgpack.Decoder(Control).decode
