"""Collected answers become bodies that the openai package understands."""

from __future__ import annotations

import base64
import struct
from typing import Any

import pytest
from modelbus.answers import AnswerBuilder
from modelbus_broker.messages import Delta, Done, TokenLogprob, ToolCallDelta, TopLogprob, Usage, Vectors
from modelbus_gateway.openai_answers import chat_answer, completion_answer, embedding_answer
from openai.types import Completion, CreateEmbeddingResponse
from openai.types.chat import ChatCompletion

USAGE = Usage(prompt_tokens=3, completion_tokens=2, cached_tokens=1, reasoning_tokens=1)


def built(*frames: Delta | Vectors) -> AnswerBuilder:
    answer = AnswerBuilder()
    for frame in frames:
        answer.add(frame)
    answer.add(Done(id="r", run="1.1.w", seq=9, usage=USAGE, system_fingerprint="fp"))
    return answer


def delta(**fields: Any) -> Delta:
    return Delta(id="r", run="1.1.w", seq=0, **fields)


def chat(
    answer: AnswerBuilder, *, logprobs: bool = False, legacy: bool = False, role: str = "assistant"
) -> ChatCompletion:
    body = chat_answer(answer, id="r", created=7, model="m", role=role, logprobs=logprobs, legacy_functions=legacy)
    return ChatCompletion.model_validate_json(body, strict=role == "assistant")


def test_a_chat_answer_has_text_usage_and_finish_reason() -> None:
    answer = chat(built(delta(text="Hel"), delta(text="lo", finish_reason="length")))
    assert answer.choices[0].message.content == "Hello"
    assert answer.choices[0].finish_reason == "length"
    assert (answer.id, answer.created, answer.model, answer.system_fingerprint) == ("chatcmpl-r", 7, "m", "fp")
    assert answer.usage is not None and answer.usage.total_tokens == 5
    details = answer.usage.completion_tokens_details
    assert details is not None and details.reasoning_tokens == 1


def test_choices_come_in_order() -> None:
    answer = chat(built(delta(choice=1, text="b", finish_reason="stop"), delta(text="a", finish_reason="stop")))
    assert [(choice.index, choice.message.content) for choice in answer.choices] == [(0, "a"), (1, "b")]


def test_tool_calls_leave_the_content_null() -> None:
    call = ToolCallDelta(index=0, id="c", name="f", arguments="{}")
    answer = chat(built(delta(tool_calls=[call], finish_reason="tool_calls")))
    message = answer.choices[0].message
    assert message.content is None and message.tool_calls is not None
    assert message.tool_calls[0].id == "c"
    assert answer.choices[0].finish_reason == "tool_calls"


def test_clients_of_functions_get_a_function_call() -> None:
    call = ToolCallDelta(index=0, id="c", name="f", arguments="{}")
    answer = chat(built(delta(tool_calls=[call], finish_reason="tool_calls")), legacy=True)
    message = answer.choices[0].message
    assert message.tool_calls is None and message.function_call is not None and message.function_call.name == "f"
    assert answer.choices[0].finish_reason == "function_call"


def test_logprobs_are_there_only_when_asked_for() -> None:
    token = TokenLogprob(token="a", logprob=-0.5, top=[TopLogprob(token="a", logprob=-0.5)])
    frames = [delta(text="a", logprobs=[token], finish_reason="stop")]
    assert chat(built(*frames)).choices[0].logprobs is None
    logprobs = chat(built(*frames), logprobs=True).choices[0].logprobs
    assert logprobs is not None and logprobs.content is not None and logprobs.content[0].top_logprobs[0].token == "a"


def test_the_role_can_be_another() -> None:
    body = chat_answer(
        built(delta(text="a")), id="r", created=7, model="m", role="bot", logprobs=False, legacy_functions=False
    )
    assert b'"role":"bot"' in body


def test_a_completion_answer_has_texts_and_offsets() -> None:
    tokens = [TokenLogprob(token="ab", logprob=-1.0), TokenLogprob(token="c", logprob=-2.0)]
    body = completion_answer(
        built(delta(text="abc", logprobs=tokens, finish_reason="stop")), id="r", created=7, model="m", logprobs=True
    )
    answer = Completion.model_validate_json(body, strict=True)
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert (answer.choices[0].text, logprobs.text_offset, logprobs.top_logprobs) == ("abc", [0, 2], None)


def test_embeddings_come_as_numbers_or_as_base64() -> None:
    vectors = [struct.pack("<2f", 0.5, -1.0), struct.pack("<2f", 2.0, 3.0)]
    answer = built(Vectors(id="r", run="1.1.w", seq=0, start=0, dimensions=2, data=vectors))

    numbers = CreateEmbeddingResponse.model_validate_json(
        embedding_answer(answer, model="m", base64=False), strict=True
    )
    encoded = embedding_answer(answer, model="m", base64=True)

    assert [item.embedding for item in numbers.data] == [pytest.approx([0.5, -1.0]), pytest.approx([2.0, 3.0])]
    assert numbers.usage.prompt_tokens == 3
    assert base64.b64encode(vectors[1]) in encoded
