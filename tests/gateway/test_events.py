"""Frames become events that the openai package understands."""

from __future__ import annotations

from typing import Any

import msgspec
from modelbus_broker.messages import Delta, Done, TokenLogprob, ToolCallDelta, TopLogprob, Usage
from modelbus_gateway.events import ChatEvents, CompletionEvents
from openai.types import Completion
from openai.types.chat import ChatCompletionChunk

USAGE = Usage(prompt_tokens=3, completion_tokens=2, cached_tokens=1)


def delta(**fields: Any) -> Delta:
    return Delta(id="r", run="1.1.w", seq=0, **fields)


def done() -> Done:
    return Done(id="r", run="1.1.w", seq=9, usage=USAGE, system_fingerprint="fp")


def chat_events(**options: Any) -> ChatEvents:
    return ChatEvents(**{
        "id": "r", "created": 7, "model": 'a"b', "role": "assistant", "logprobs": False, "include_usage": False,
        "legacy_functions": False, **options,
    })  # fmt: skip


def payloads(data: bytes) -> list[Any]:
    assert data.endswith(b"\n\n")
    events = data.decode().removesuffix("\n\n").split("\n\n")
    assert all(event.startswith("id: ") for event in events if "data: {" in event)
    lines = [event.rpartition("\n")[2] for event in events]
    assert all(line.startswith("data: ") for line in lines)
    return [msgspec.json.decode(line[6:]) if line != "data: [DONE]" else "[DONE]" for line in lines]


def test_a_chat_stream_has_role_texts_finish_reason_and_done() -> None:
    events = chat_events()

    first = payloads(events.events([delta(text="Hé\n")]))
    rest = payloads(events.events([delta(text=' "you"'), delta(finish_reason="length"), done()]))

    assert rest.pop() == "[DONE]"
    chunks = [ChatCompletionChunk.model_validate(chunk, strict=True) for chunk in first + rest]
    assert [chunk.choices[0].delta.content for chunk in chunks] == ["Hé\n", ' "you"', None]
    assert [chunk.choices[0].delta.role for chunk in chunks] == ["assistant", None, None]
    assert [chunk.choices[0].finish_reason for chunk in chunks] == [None, None, "length"]
    assert {(chunk.id, chunk.created, chunk.model) for chunk in chunks} == {("chatcmpl-r", 7, 'a"b')}
    assert all("usage" not in chunk for chunk in first + rest)


def test_usage_comes_once_and_last_when_asked_for() -> None:
    events = chat_events(include_usage=True)
    *chunks, end = payloads(events.events([delta(text="a", finish_reason="stop"), done()]))
    assert end == "[DONE]"
    assert [chunk["usage"] for chunk in chunks[:-1]] == [None, None]
    last = ChatCompletionChunk.model_validate(chunks[-1], strict=True)
    assert last.choices == [] and last.usage is not None and last.system_fingerprint == "fp"
    assert (last.usage.prompt_tokens, last.usage.completion_tokens, last.usage.total_tokens) == (3, 2, 5)
    assert last.usage.prompt_tokens_details is not None and last.usage.prompt_tokens_details.cached_tokens == 1


def test_choices_begin_and_end_each_for_itself() -> None:
    frames = [delta(text="a"), delta(choice=1, text="b"), delta(text="c"), delta(choice=1, finish_reason="stop")]
    chunks = payloads(chat_events().events(frames))
    choices = [chunk["choices"][0] for chunk in chunks]
    assert [choice["index"] for choice in choices] == [0, 1, 0, 1]
    assert ["role" in choice["delta"] for choice in choices] == [True, True, False, False]
    assert choices[-1]["finish_reason"] == "stop"


def test_an_answer_that_ends_at_once_still_has_its_role() -> None:
    chunks = payloads(chat_events().events([delta(finish_reason="stop"), done()]))
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert chunks[1]["choices"][0] == {"index": 0, "delta": {}, "logprobs": None, "finish_reason": "stop"}


def test_reasoning_tool_calls_and_refusals_are_streamed() -> None:
    frames = [
        delta(reasoning="hm"),
        delta(tool_calls=[ToolCallDelta(index=0, id="c1", name="f", arguments="")]),
        delta(tool_calls=[ToolCallDelta(index=0, arguments='{"a":1}')], finish_reason="tool_calls"),
        delta(choice=1, refusal="no"),
    ]
    chunks = [
        ChatCompletionChunk.model_validate(chunk, strict=True) for chunk in payloads(chat_events().events(frames))
    ]
    deltas = [chunk.choices[0].delta for chunk in chunks]
    assert getattr(deltas[0], "reasoning_content", None) == "hm"
    assert deltas[1].tool_calls is not None and deltas[2].tool_calls is not None
    opening, more = deltas[1].tool_calls[0], deltas[2].tool_calls[0]
    assert opening.function is not None and more.function is not None
    assert (opening.id, opening.type, opening.function.name) == ("c1", "function", "f")
    assert (more.id, more.function.arguments) == (None, '{"a":1}')
    assert chunks[3].choices[0].finish_reason == "tool_calls"
    assert deltas[4].refusal == "no"


def test_clients_of_functions_get_function_calls() -> None:
    frames = [delta(tool_calls=[ToolCallDelta(index=0, id="c1", name="f", arguments="{}")], finish_reason="tool_calls")]
    chunks = payloads(chat_events(legacy_functions=True).events(frames))
    assert chunks[0]["choices"][0]["delta"]["function_call"] == {"name": "f", "arguments": "{}"}
    assert "tool_calls" not in chunks[0]["choices"][0]["delta"]
    assert chunks[1]["choices"][0]["finish_reason"] == "function_call"


def test_logprobs_of_chats_have_their_alternatives_and_no_infinity() -> None:
    token = TokenLogprob(token="a", logprob=-0.5, bytes=[97], top=[TopLogprob(token="b", logprob=float("-inf"))])
    chunks = payloads(chat_events(logprobs=True).events([delta(text="a", logprobs=[token])]))
    content = chunks[0]["choices"][0]["logprobs"]["content"]
    assert content == [
        {
            "token": "a",
            "logprob": -0.5,
            "bytes": [97],
            "top_logprobs": [{"token": "b", "logprob": -9999.0, "bytes": None}],
        }
    ]


def test_completion_events_have_texts_offsets_and_usage() -> None:
    events = CompletionEvents(id="r", created=7, model="m", logprobs=True, include_usage=True)
    token = TokenLogprob(token="ab", logprob=-1.0, top=[TopLogprob(token="ab", logprob=-1.0)])
    frames = [delta(text="ab", logprobs=[token]), delta(text="ab", logprobs=[token], finish_reason="stop"), done()]

    *chunks, end = payloads(events.events(frames))

    assert end == "[DONE]"
    assert [chunk["choices"][0]["logprobs"]["text_offset"] for chunk in chunks[:2]] == [[0], [2]]
    for chunk in chunks:
        # Of the package's types only the finish reason is stricter than what its API streams.
        for choice in chunk["choices"]:
            choice["finish_reason"] = choice["finish_reason"] or "stop"
        Completion.model_validate(chunk, strict=True)
    assert chunks[-1]["choices"] == [] and chunks[-1]["usage"]["total_tokens"] == 5


def test_frames_that_show_nothing_make_no_event() -> None:
    assert chat_events(role="x").events([]) == b""
    assert CompletionEvents(id="r", created=7, model="m", logprobs=False, include_usage=False).events([delta()]) == b""
