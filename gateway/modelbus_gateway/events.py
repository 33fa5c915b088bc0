"""From frames to server-sent events, in the shapes of the OpenAI API. Pure.

What is the same in every event of an answer is encoded once; a piece of text costs one small JSON string, one id and
a join. Every event but the last (``[DONE]``, or an error) has an id that a client can resume from.
"""

from __future__ import annotations

from collections.abc import Iterable

import msgspec
from modelbus_broker.messages import Delta, Done, ToolCallDelta
from msgspec import UNSET, UnsetType

from .event_ids import EventIds
from .openai_answers import chat_logprobs, completion_logprobs, to_json, usage_body

DONE = b"data: [DONE]\n\n"
KEEP_ALIVE = b": keep-alive\n\n"


def error_event(body: bytes) -> bytes:
    """The last event of an answer that could not be completed; no ``[DONE]`` follows it."""
    return b"data: " + body + b"\n\n"


class FunctionDelta(msgspec.Struct, frozen=True):
    arguments: str
    name: str | UnsetType = UNSET


class ToolCallBody(msgspec.Struct, frozen=True, kw_only=True):
    index: int
    id: str | UnsetType = UNSET
    type: str | UnsetType = UNSET
    function: FunctionDelta


class DeltaBody(msgspec.Struct, frozen=True, kw_only=True):
    role: str | UnsetType = UNSET
    content: str | UnsetType | None = UNSET
    reasoning_content: str | UnsetType = UNSET
    refusal: str | UnsetType = UNSET
    tool_calls: list[ToolCallBody] | UnsetType = UNSET
    function_call: FunctionDelta | UnsetType = UNSET


class ChatEvents:
    """Makes the events of one streamed answer of /v1/chat/completions.

    The first event of each choice has the role, the last one nothing but ``finish_reason``.
    """

    def __init__(
        self,
        *,
        id: str,
        created: int,
        model: str,
        role: str,
        logprobs: bool,
        include_usage: bool,
        legacy_functions: bool,
    ) -> None:
        self._head = (
            b'data: {"id":"chatcmpl-%b","object":"chat.completion.chunk","created":%d,"model":%b,'
            % (id.encode(), created, to_json(model))
        )  # fmt: skip
        self._tail = b'}],"usage":null}\n\n' if include_usage else b"}]}\n\n"
        self._text_tail = b'},"logprobs":null,"finish_reason":null' + self._tail
        self._role = role
        self._logprobs, self._include_usage, self._legacy = logprobs, include_usage, legacy_functions
        self._text_heads: dict[int, bytes] = {}  #: of the choices that have begun
        self._ended: set[int] = set()  #: choices whose end is out; a run that goes on says it once more
        self._ids = EventIds(id)

    def events(self, frames: Iterable[object]) -> bytes:
        """The events of the frames of one batch, joined; b"" if they show the client nothing."""
        out: list[bytes] = []
        for frame in frames:
            if isinstance(frame, Delta):
                self._delta(frame, out)
            elif isinstance(frame, Done):
                self._done(frame, out)
        return b"".join(out)

    def _delta(self, delta: Delta, out: list[bytes]) -> None:
        head = self._text_heads.get(delta.choice)
        plain = not (delta.reasoning or delta.tool_calls or delta.refusal or (self._logprobs and delta.logprobs))
        ends = bool(delta.finish_reason) and delta.choice not in self._ended
        if head is not None and plain:
            if delta.text:
                line = self._ids.first(delta) if ends else self._ids.whole(delta)
                out += (line, head, to_json(delta.text), self._text_tail)
        elif head is None or not plain:
            out.append(self._ids.first(delta) if ends else self._ids.whole(delta))
            self._full(delta, head is None, out)
        if ends:
            self._ended.add(delta.choice)
            reason: str = delta.finish_reason
            if self._legacy and reason == "tool_calls":
                reason = "function_call"
            out += (
                self._ids.whole(delta), self._head, b'"choices":[{"index":%d,"delta":{},"logprobs":null,"finish_reason":"%b"' % (delta.choice, reason.encode()),
                self._tail,
            )  # fmt: skip

    def _full(self, delta: Delta, first: bool, out: list[bytes]) -> None:
        if first:
            choice_head = self._head + b'"choices":[{"index":%d,"delta":{' % delta.choice
            self._text_heads[delta.choice] = choice_head + b'"content":'
        body = DeltaBody(
            role=self._role if first else UNSET,
            content=delta.text if delta.text or (first and not delta.tool_calls) else UNSET,
            reasoning_content=delta.reasoning or UNSET,
            refusal=delta.refusal or UNSET,
            tool_calls=[_tool_call(call) for call in delta.tool_calls]
            if delta.tool_calls and not self._legacy
            else UNSET,
            function_call=_legacy_call(delta.tool_calls) if self._legacy else UNSET,
        )
        logprobs = to_json(chat_logprobs(delta.logprobs)) if self._logprobs and delta.logprobs else b"null"
        out += (
            self._head, b'"choices":[{"index":%d,"delta":' % delta.choice, to_json(body),
            b',"logprobs":', logprobs, b',"finish_reason":null', self._tail,
        )  # fmt: skip

    def _done(self, done: Done, out: list[bytes]) -> None:
        grounding = b',"grounding":' + to_json(done.grounding) if done.grounding is not None else b""
        if self._include_usage:
            fingerprint = to_json(done.system_fingerprint or None)
            out += (
                self._ids.first(done), self._head, b'"system_fingerprint":', fingerprint,
                b',"choices":[],"usage":', to_json(usage_body(done.usage)), grounding, b"}\n\n",
            )  # fmt: skip
        elif grounding:
            # With a choice in it: clients that asked for no usage look into each event's first one.
            out += (
                self._ids.first(done), self._head,
                b'"choices":[{"index":0,"delta":{},"logprobs":null,"finish_reason":null}]', grounding, b"}\n\n",
            )  # fmt: skip
        out.append(DONE)


class CompletionEvents:
    """Makes the events of one streamed answer of /v1/completions."""

    def __init__(self, *, id: str, created: int, model: str, logprobs: bool, include_usage: bool) -> None:
        self._head = (
            b'data: {"id":"cmpl-%b","object":"text_completion","created":%d,"model":%b,'
            % (id.encode(), created, to_json(model))
        )  # fmt: skip
        self._tail = b'}],"usage":null}\n\n' if include_usage else b"}]}\n\n"
        self._logprobs, self._include_usage = logprobs, include_usage
        self._offsets: dict[int, int] = {}  #: characters of each choice so far
        self._ended: set[int] = set()  #: choices whose end is out; a run that goes on says it once more
        self._ids = EventIds(id)

    def events(self, frames: Iterable[object]) -> bytes:
        """The events of the frames of one batch, joined; b"" if they show the client nothing."""
        out: list[bytes] = []
        for frame in frames:
            if isinstance(frame, Delta):
                self._delta(frame, out)
            elif isinstance(frame, Done):
                if self._include_usage:
                    fingerprint = to_json(frame.system_fingerprint or None)
                    out += (
                        self._ids.first(frame), self._head, b'"system_fingerprint":', fingerprint,
                        b',"choices":[],"usage":', to_json(usage_body(frame.usage)), b"}\n\n",
                    )  # fmt: skip
                out.append(DONE)
        return b"".join(out)

    def _delta(self, delta: Delta, out: list[bytes]) -> None:
        ends = bool(delta.finish_reason) and delta.choice not in self._ended
        if not (delta.text or ends or (self._logprobs and delta.logprobs)):
            return
        logprobs = b"null"
        if self._logprobs:
            offset = self._offsets.get(delta.choice, 0)
            self._offsets[delta.choice] = offset + len(delta.text)
            if delta.logprobs:
                logprobs = to_json(completion_logprobs(delta.logprobs, offset))
        reason = b"null"
        if ends:
            self._ended.add(delta.choice)
            reason = b'"%b"' % delta.finish_reason.encode()
        out += (
            self._ids.whole(delta), self._head, b'"choices":[{"index":%d,"text":' % delta.choice, to_json(delta.text),
            b',"logprobs":', logprobs, b',"finish_reason":', reason, self._tail,
        )  # fmt: skip


def _tool_call(call: ToolCallDelta) -> ToolCallBody:
    return ToolCallBody(
        index=call.index,
        id=call.id or UNSET,
        type="function" if call.id or call.name else UNSET,
        function=FunctionDelta(call.arguments, call.name or UNSET),
    )


def _legacy_call(calls: list[ToolCallDelta]) -> FunctionDelta | UnsetType:
    """The deprecated form knows one call only: the first."""
    first = [call for call in calls if call.index == 0]
    if not first:
        return UNSET
    name = next((call.name for call in first if call.name), "")
    return FunctionDelta("".join(call.arguments for call in first), name or UNSET)
