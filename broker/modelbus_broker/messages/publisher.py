"""What a publisher receives: frames on ``mb.rsp.<publisher>.<worker>``, alive messages on ``mb.gw.<publisher>``.

A bus message there is a *list* of frames of any requests: all that became ready in one turn of the worker's
event loop. ``run`` names the execution (see ``modelbus_broker.names.run_name``), ``seq`` counts the frames of
one run from 0 without gaps.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from .base import Message, Row
from .usage import Usage
from .worker import Adopt, Answered, Request

FinishReason = Literal["", "stop", "length", "tool_calls", "content_filter", "function_call"]


class TopLogprob(Row, frozen=True, kw_only=True):
    token: str
    logprob: float
    bytes: list[int] | None = None


class TokenLogprob(Row, frozen=True, kw_only=True):
    token: str
    logprob: float
    bytes: list[int] | None = None
    top: list[TopLogprob] = []
    token_id: int = -1


class ToolCallDelta(Row, frozen=True, kw_only=True):
    """A piece of a tool call: ``arguments`` is appended to the call with the same index."""

    index: int
    id: str = ""
    name: str = ""
    arguments: str = ""


class Accepted(Row, frozen=True, kw_only=True, tag="a"):
    """A worker has the request in hand; it has not started."""

    id: str
    run: str
    seq: int
    ack_subject: str  #: whoever publishes +TERM there takes the message from this run
    position: int = 0  #: output tokens that the run starts from, over all choices
    compat: str = ""
    delivery: int = 1
    asks: bool = False  #: it waits for ``go`` or ``let_go`` before it starts
    continues: str = ""  #: the run that this one goes on from; "" begins at the beginning
    starts: list[list[int]] = []  #: then, per choice: tokens and characters of the runs before
    view: str = ""  #: of the request


class Started(Row, frozen=True, kw_only=True, tag="s"):
    """The engine is about to get the request."""

    id: str
    run: str
    seq: int
    prompt_tokens: int = 0  #: 0: not known yet


class Delta(Row, frozen=True, kw_only=True, tag="d"):
    """New output of one choice."""

    id: str
    run: str
    seq: int
    choice: int = 0
    text: str = ""
    token_ids: list[int] = []
    position: int = 0  #: output tokens of this choice after this frame
    finish_reason: FinishReason = ""  #: set in the last delta of a choice
    reasoning: str = ""
    tool_calls: list[ToolCallDelta] = []
    logprobs: list[TokenLogprob] = []
    refusal: str = ""
    prompt_logprobs: list[
        TokenLogprob | None
    ] = []  #: one per prompt token, None for the first; in one delta, the first


class Vectors(Row, frozen=True, kw_only=True, tag="v"):
    """Results ``start``, ``start + 1`` ...: each ``dimensions`` float32, little endian.

    A vector per text for embeddings, one number per pair for scores, a probability per class for classifications.
    """

    id: str
    run: str
    seq: int
    start: int
    dimensions: int
    data: list[bytes]
    labels: list[str] = []  #: of the dimensions, for classifications


class Document(Row, frozen=True, kw_only=True, tag="o"):
    """A piece of an answer that is one encoded document: the pieces follow each other in the order of ``seq``."""

    id: str
    run: str
    seq: int
    data: bytes


class Context(Message, frozen=True, kw_only=True, omit_defaults=False):
    """A passage of a document that an answer was made of, and may cite as ``[number]``."""

    number: int  #: from 1
    file: str
    heading: str = ""  #: those above it
    line: int = 0  #: of the file, from 1; 0: the text is not the file's own
    last_line: int = 0
    page: int = 0  #: or slide, from 1; 0: the file has none
    text: str = ""
    score: float = 0.0
    collection: str = ""  #: the store that it lies in

    @property
    def place(self) -> str:
        """The file, its lines or page, and the headings."""
        lines = f":{self.line}-{self.last_line}" if self.line else f", page {self.page}" if self.page else ""
        return f"{self.file}{lines}" + (f"  {self.heading}" if self.heading else "")


class Grounding(Message, frozen=True, kw_only=True, omit_defaults=False):
    """What an answer out of documents was made of."""

    question: str = ""  #: that was looked for: the caller's, understood without what was said before
    contexts: list[Context] = []  #: that the model was given
    citations: list[int] = []  #: the numbers of those that the answer names


class Done(Row, frozen=True, kw_only=True, tag="z"):
    """The answer is complete. ``seq`` is the last of the run."""

    id: str
    run: str
    seq: int
    usage: Usage = Usage()
    engine_ms: float = 0.0
    upstream_model: str = ""  #: the model name that a provider reported
    system_fingerprint: str = ""
    rung: str = ""  #: how a form that was asked for was come by, see ``Rung``; "": none was asked for
    attempts: int = 0  #: how often the model was asked for it
    grounding: Grounding | None = None  #: of an answer out of documents


class Failed(Row, frozen=True, kw_only=True, tag="f"):
    """The request ended without an answer, or in the middle of one. ``seq`` is the last of the run."""

    id: str
    run: str
    seq: int
    code: str  #: see modelbus_broker.errors
    message: str
    status: int = 500  #: the HTTP status that says it best
    param: str = ""
    retry_after_s: float = 0.0
    upstream: str = ""  #: the provider's own error text
    usage: Usage = Usage()
    retry: bool = False  #: another worker may answer where this one could not
    handover: bool = False  #: the worker is being stopped: only this run has ended, another worker goes on


Frame = Accepted | Started | Delta | Vectors | Document | Done | Failed
TERMINAL = (Done, Failed)


class RunState(Row, frozen=True, kw_only=True):
    id: str
    run: str
    seq: int  #: of the last frame sent; -1 before the first
    state: Literal["held", "running", "ended"]


class Alive(Message, frozen=True, kw_only=True, tag="alive"):
    """Every 400 ms from each worker to each publisher with runs there."""

    worker: str
    steps: int  #: the engine's step counter: stands still when the engine hangs
    runs: list[RunState] = []


class AliveReply(Message, frozen=True, kw_only=True, tag="alive_reply"):
    """The publisher's answer to an alive message."""

    stop: list[str] = []  #: keys (``names.run_key``) of runs that nobody wants
    confirmed: list[str] = []  #: keys of runs whose last frame has come: the ring may forget them
    let_go: list[str] = []  #: keys of runs in whose place another one counts: no frame, no ack, their usage is waste
    answered: list[Answered] = []  #: runs of requests that another run has answered


class FindRun(Message, frozen=True, kw_only=True, tag="find"):
    """On ``mb.find``, to all workers: who runs, or remembers, this id? Only that one answers, with a ``FoundRun``."""

    id: str


class FoundRun(Message, frozen=True, kw_only=True, tag="found"):
    """What a worker knows of a run that someone looks for."""

    worker: str
    state: RunState
    publisher: str = ""  #: to whom its frames go
    first: int = -1  #: the first frame that can still be sent again; -1: none
    ack_subject: str = ""
    compat: str = ""
    delivery: int = 1
    left_ms: int = 0  #: until its deadline
    request: Request | None = None


class Held(Message, frozen=True, kw_only=True, tag="held"):
    """What a publisher knows of a request that another one wants to take over."""

    id: str
    known: bool = False  #: it has the request
    given: bool = False  #: it has given it up to the one who asked
    moved_to: str = ""  #: it has given it up to this publisher
    stored: bool = False  #: the queue is known to have it
    run: str = ""  #: that counts, "" while none is known
    left_ms: int = 0  #: until its deadline
    request: Request | None = None  #: as published last


class Cancel(Message, frozen=True, kw_only=True, tag="cancel"):
    """On ``mb.ctl.<publisher>``: take this request back; whoever waits for it gets ``request_cancelled``."""

    id: str


class AdapterChecked(Message, frozen=True, kw_only=True, tag="adapter_checked"):
    """What a worker says of an adapter that it was asked about."""

    worker: str
    host: str
    fingerprint: str = ""  #: of its files
    words: str = ""  #: why it cannot be used


class Cancelled(Message, frozen=True, kw_only=True, tag="cancelled"):
    """What became of a request that was to be cancelled, said by its publisher, or by the worker that had it."""

    id: str
    was: Literal["running", "held", "queued", "unknown"]
    worker: str = ""  #: that had it
    stopped: bool = False  #: nothing of it runs any more; False: it was told to stop and has not said that it did


decode_frames = msgspec.msgpack.Decoder(list[Frame]).decode
decode_alive = msgspec.msgpack.Decoder(Alive).decode
decode_alive_reply = msgspec.msgpack.Decoder(AliveReply).decode
decode_find = msgspec.msgpack.Decoder(FindRun).decode
decode_found = msgspec.msgpack.Decoder(FoundRun).decode
decode_held = msgspec.msgpack.Decoder(Held).decode
#: What a publisher receives on ``mb.ctl.<publisher>``.
decode_publisher_control = msgspec.msgpack.Decoder(Cancel | Adopt).decode
decode_adapter_checked = msgspec.msgpack.Decoder(AdapterChecked).decode
decode_cancelled = msgspec.msgpack.Decoder(Cancelled).decode
