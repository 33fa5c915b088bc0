"""The OpenAI protocol as pure functions: the chunks of answers to chats and completions.

Decoding is lenient where providers are careless (missing indices, ``null`` lists, usage in odd places) and strict
where it matters: what is no completion is an error, and every choice needs a finish reason.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import msgspec
from modelbus.token_estimate import estimate_prompt, estimate_text
from modelbus_broker.errors import UpstreamFailed
from modelbus_broker.messages import (
    Chat,
    Completion,
    FinishReason,
    TokenLogprob,
    ToolCallDelta,
    TopLogprob,
    Usage,
)

from .base import Output

#: What providers say at the end of a choice, and what it means; other words mean that something went wrong.
_FINISH: dict[str, FinishReason] = {
    "stop": "stop", "eos": "stop", "eos_token": "stop", "end_turn": "stop", "stop_sequence": "stop",
    "complete": "stop", "completed": "stop", "normal": "stop",
    "length": "length", "max_tokens": "length", "max_output_tokens": "length", "model_length": "length",
    "tool_calls": "tool_calls", "tool_call": "tool_calls", "tool_use": "tool_calls",
    "function_call": "function_call",
    "content_filter": "content_filter", "sensitive": "content_filter", "safety": "content_filter",
}  # fmt: skip

#: Characters, about, of one output: what a provider sends at once may be larger than a message on the bus.
_PIECE_CHARS = 128 << 10
_LOGPROB_CHARS = 100
#: A provider may cut tokens into several chunks; one that sends so many more than were asked for does not end.
_CHUNKS_PER_TOKEN, _CHUNKS_MORE = 4, 1024

#: What a log probability of zero chance is in the API.
_NEVER = -9999.0


class _Function(msgspec.Struct):
    name: str | None = None
    arguments: Any = None


class _ToolCall(msgspec.Struct):
    index: int | None = None
    id: str | None = None
    function: _Function | None = None


class _Delta(msgspec.Struct):
    content: Any = None
    reasoning_content: str | None = None
    reasoning: Any = None
    refusal: str | None = None
    tool_calls: list[_ToolCall] | None = None


class _Logprob(msgspec.Struct):
    token: str
    logprob: float | None = None
    bytes: list[int] | None = None
    top_logprobs: list[_Logprob] | None = None


class _Logprobs(msgspec.Struct):
    content: list[_Logprob] | None = None
    tokens: list[str] | None = None
    token_logprobs: list[float | None] | None = None
    top_logprobs: list[dict[str, float] | None] | None = None


class _Details(msgspec.Struct):
    cached_tokens: int | None = None
    reasoning_tokens: int | None = None


class UpstreamUsage(msgspec.Struct):
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    total_tokens: int | None = None
    prompt_tokens_details: _Details | None = None
    completion_tokens_details: _Details | None = None
    prompt_cache_hit_tokens: int | None = None


class _Choice(msgspec.Struct):
    index: int | None = None
    delta: _Delta | None = None
    message: _Delta | None = None
    text: str | None = None
    finish_reason: str | None = None
    logprobs: _Logprobs | None = None
    token_ids: list[int] | None = None
    usage: UpstreamUsage | None = None


class _BaseResponse(msgspec.Struct):
    status_code: int = 0
    status_msg: str = ""


class Chunk(msgspec.Struct):
    """A chunk of a stream, or a whole answer."""

    choices: list[_Choice] | None = None
    usage: UpstreamUsage | None = None
    model: str | None = None
    system_fingerprint: str | None = None
    error: Any = None
    base_resp: _BaseResponse | None = None


_decode_chunk = msgspec.json.Decoder(Chunk, strict=False).decode


def decode_chunk(document: bytes, hide: Callable[[str], str]) -> Chunk | None:
    """The chunk, or None if the document is something else: an error of the provider, in whatever shape.

    Args:
        hide: removes secrets from what is shown in an error.

    Raises:
        UpstreamFailed: it is no JSON, or a field has a type that makes no sense.
    """
    try:
        chunk = _decode_chunk(document)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        shown = hide(document[:300].decode("utf-8", "replace"))[:200]
        raise UpstreamFailed(
            f"the provider sent a malformed chunk ({hide(str(error))}): {shown}", upstream=shown
        ) from None
    refused = chunk.base_resp is not None and chunk.base_resp.status_code != 0
    if chunk.error or refused or (chunk.choices is None and chunk.usage is None):
        return None
    return chunk


class AnswerReader:
    """Turns the chunks of one answer into outputs and knows when it is complete."""

    def __init__(self, task: Chat | Completion, *, context_length: int = 0) -> None:
        self._task = task
        longest = task.sampling.max_tokens or context_length
        self._most_chunks = longest * _CHUNKS_PER_TOKEN + _CHUNKS_MORE if longest else 0
        self._chunks: dict[int, int] = {}
        self._choices = task.sampling.n * (len(task.prompt) if isinstance(task, Completion) else 1)
        self._finished: dict[int, FinishReason] = {}
        self._texts: dict[int, list[str]] = {}
        self._tool_ids: dict[int, list[str]] = {}
        self._usage: Usage | None = None
        self._usage_is_last = False
        self.upstream_model = ""
        self.system_fingerprint = ""

    @property
    def complete(self) -> bool:
        """Every choice that was asked for has its finish reason."""
        return len(self._finished) >= self._choices

    @property
    def has_last_usage(self) -> bool:
        """The usage of the whole answer is known; earlier numbers are those of a part."""
        return self._usage_is_last

    def take(self, chunk: Chunk) -> list[Output]:
        """Raises UpstreamFailed when the provider says that it gave up in the middle."""
        self.upstream_model = chunk.model or self.upstream_model
        self.system_fingerprint = chunk.system_fingerprint or self.system_fingerprint
        outputs = []
        for choice in chunk.choices or ():
            output = self._take_choice(choice)
            if output is not None:
                outputs.append(output)
            if choice.usage is not None:
                self._take_usage(choice.usage)
        if chunk.usage is not None:
            self._take_usage(chunk.usage)
        return outputs

    def usage(self) -> Usage:
        """The provider's numbers, or our own count if it gave none."""
        if self._usage is not None:
            return self._usage
        completion = sum(estimate_text("".join(texts)) for texts in self._texts.values())
        return Usage(prompt_tokens=estimate_prompt(self._task), completion_tokens=completion, estimated=True)

    def missing(self) -> str:
        """What an incomplete answer lacks, in words."""
        if self._choices == 1:
            return "the stream ended without a finish_reason"
        return f"the stream ended with a finish_reason for {len(self._finished)} of {self._choices} choices"

    def _take_choice(self, choice: _Choice) -> Output | None:
        index = choice.index or 0
        if index in self._finished:
            return None  # some repeat the end, or say it again with the usage
        delta = choice.delta or choice.message or _Delta()
        text = choice.text or _text(delta.content)
        reasoning = delta.reasoning_content or (delta.reasoning if isinstance(delta.reasoning, str) else "") or ""
        tool_calls = [self._tool_call(index, call) for call in delta.tool_calls or ()]
        logprobs = _token_logprobs(choice.logprobs)
        reason = self._finish(choice.finish_reason)
        if not (text or reasoning or tool_calls or logprobs or reason or delta.refusal or choice.token_ids):
            return None
        said = [text, reasoning, delta.refusal or "", *(call.name + call.arguments for call in tool_calls)]
        self._texts.setdefault(index, []).extend(said)
        if reason:
            self._finished[index] = reason
        # Nobody knows the tokens of a chunk whose ids and log probabilities are not told; one is the usual number.
        tokens = len(logprobs) or int(any(said))
        self._chunks[index] = self._chunks.get(index, 0) + 1
        if 0 < self._most_chunks < self._chunks[index]:
            raise UpstreamFailed(f"the provider does not end the answer: {self._chunks[index]} chunks so far")
        return Output(
            choice=index, text=text, token_ids=choice.token_ids or [], tokens=-1 if choice.token_ids else tokens,
            finish_reason=reason, reasoning=reasoning, tool_calls=tool_calls, logprobs=logprobs,
            refusal=delta.refusal or "",
        )  # fmt: skip

    def _tool_call(self, choice: int, call: _ToolCall) -> ToolCallDelta:
        function = call.function or _Function()
        ids = self._tool_ids.setdefault(choice, [])
        index = call.index
        if index is None:
            # Providers without an index send every call whole, each with its own id.
            if call.id or not ids:
                ids.append(call.id or "")
            index = len(ids) - 1
        arguments = function.arguments
        if arguments is None:
            arguments = ""
        elif not isinstance(arguments, str):
            arguments = json.dumps(arguments, ensure_ascii=False)
        return ToolCallDelta(index=index, id=call.id or "", name=function.name or "", arguments=arguments)

    @staticmethod
    def _finish(reason: str | None) -> FinishReason:
        if not reason or reason == "null":
            return ""
        known = _FINISH.get(reason.lower().partition(":")[0])
        if known is None:
            raise UpstreamFailed(f"the provider ended the answer with {reason!r}", upstream=reason)
        return known

    def _take_usage(self, usage: UpstreamUsage) -> None:
        prompt, completion = usage.prompt_tokens or 0, usage.completion_tokens or 0
        if not prompt and not completion:
            return  # zeros stand for "not counted"
        prompt_details, details = (
            usage.prompt_tokens_details or _Details(),
            usage.completion_tokens_details or _Details(),
        )
        self._usage_is_last = self.complete
        self._usage = Usage(
            prompt_tokens=prompt,
            completion_tokens=completion,
            cached_tokens=prompt_details.cached_tokens or usage.prompt_cache_hit_tokens or 0,
            reasoning_tokens=details.reasoning_tokens or 0,
        )


def pieces(output: Output) -> list[Output]:
    """The output, in several if it is a large one."""
    chars = len(output.text) + len(output.reasoning) + len(output.refusal) + len(output.logprobs) * _LOGPROB_CHARS
    if chars + sum(len(call.arguments) for call in output.tool_calls) <= _PIECE_CHARS:
        return [output]
    found = [Output(choice=output.choice, reasoning=part, tokens=0) for part in _parts(output.reasoning)]
    found += [Output(choice=output.choice, text=part, tokens=0) for part in _parts(output.text)]
    found += [Output(choice=output.choice, refusal=part, tokens=0) for part in _parts(output.refusal)]
    for at in range(0, len(output.logprobs), _PIECE_CHARS // _LOGPROB_CHARS):
        some = output.logprobs[at : at + _PIECE_CHARS // _LOGPROB_CHARS]
        found.append(Output(choice=output.choice, logprobs=some, tokens=0))
    for call in output.tool_calls:
        first, *more = _parts(call.arguments) or [""]
        calls = [msgspec.structs.replace(call, arguments=first)]
        calls += [ToolCallDelta(index=call.index, arguments=part) for part in more]
        found += [Output(choice=output.choice, tool_calls=[part], tokens=0) for part in calls]
    found[0] = msgspec.structs.replace(found[0], token_ids=output.token_ids, tokens=output.tokens)
    found[-1] = msgspec.structs.replace(found[-1], finish_reason=output.finish_reason)
    return found


def _parts(text: str) -> list[str]:
    return [text[at : at + _PIECE_CHARS] for at in range(0, len(text), _PIECE_CHARS)]


def _text(content: Any) -> str:
    if isinstance(content, list):
        return "".join(str(part.get("text") or "") for part in content if isinstance(part, dict))
    return content if isinstance(content, str) else ""


def _token_logprobs(logprobs: _Logprobs | None) -> list[TokenLogprob]:
    if logprobs is None:
        return []
    if logprobs.content is not None:
        return [
            TokenLogprob(
                token=item.token,
                logprob=_NEVER if item.logprob is None else item.logprob,
                bytes=item.bytes,
                top=[
                    TopLogprob(token=top.token, logprob=_NEVER if top.logprob is None else top.logprob, bytes=top.bytes)
                    for top in item.top_logprobs or ()
                ],
            )
            for item in logprobs.content
        ]
    values = logprobs.token_logprobs or []
    tops = logprobs.top_logprobs or []
    return [
        TokenLogprob(
            token=token,
            # The first token of an echoed prompt has none.
            logprob=(values[i] if i < len(values) else None) or 0.0,
            top=[TopLogprob(token=t, logprob=p) for t, p in ((tops[i] if i < len(tops) else None) or {}).items()],
        )
        for i, token in enumerate(logprobs.tokens or ())
    ]
