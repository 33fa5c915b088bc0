"""What clients ask, as tasks; and everything that is refused, with the field that is at fault."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from modelbus_broker.errors import InvalidRequest, UnsupportedField
from modelbus_broker.messages import (
    Capabilities,
    Chat,
    ChatMessage,
    Completion,
    Embedding,
    ImagePart,
    Ladder,
    Sampling,
    WorkerRecord,
    decode_task,
    encode,
)
from modelbus_gateway.checks import Need
from modelbus_gateway.translate import (
    CHAT_BODY,
    COMPLETION_BODY,
    EMBEDDING_BODY,
    Translation,
    check_needs,
    translate_chat,
    translate_completion,
    translate_embedding,
)

HELLO = [{"role": "user", "content": "Hello"}]
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
OTHER_TOOL = {"type": "function", "function": {"name": "time"}}
IMAGE = {"type": "image_url", "image_url": {"url": "https://example.org/a.png"}}


def chat(**fields: Any) -> Translation:
    body = {"model": "m", "messages": HELLO, **fields}
    return translate_chat(CHAT_BODY.read(msgspec.json.encode(body)))


def completion(**fields: Any) -> Translation:
    body = {"model": "m", "prompt": "Once", **fields}
    return translate_completion(COMPLETION_BODY.read(msgspec.json.encode(body)))


def embedding(**fields: Any) -> Translation:
    body = {"model": "m", "input": "Once", **fields}
    return translate_embedding(EMBEDDING_BODY.read(msgspec.json.encode(body)))


def chat_task(**fields: Any) -> Chat:
    task = chat(**fields).task
    assert isinstance(task, Chat)
    return task


def test_a_conversation_becomes_a_chat_task_that_survives_the_bus() -> None:
    task = chat_task(temperature=0.5, max_tokens=7, stop="END", top_p=1)

    assert decode_task(encode(task)) == Chat(
        messages=[ChatMessage(role="user", content="Hello")],
        sampling=Sampling(temperature=0.5, max_tokens=7, stop=["END"], top_p=1.0),
    )


def test_the_common_request_needs_no_capability() -> None:
    assert chat(n=1, presence_penalty=0, logit_bias={}, logprobs=False, tools=[], service_tier="auto").needs == []


@pytest.mark.parametrize(
    ("fields", "need"),
    [
        ({"n": 2}, Need("n", "n")),
        ({"seed": 1}, Need("seed", "seed")),
        ({"presence_penalty": 1}, Need("presence_penalty", "penalties")),
        ({"frequency_penalty": -1}, Need("frequency_penalty", "penalties")),
        ({"logit_bias": {"7": -100}}, Need("logit_bias", "logit_bias")),
        ({"logprobs": True, "top_logprobs": 3}, Need("logprobs", "logprobs")),
        ({"tools": [TOOL], "ladder": {"rungs": ["native"]}}, Need("tools", "rungs:tools:native")),
        (
            {"response_format": {"type": "json_object"}, "ladder": {"rungs": ["native", "grammar"]}},
            Need("response_format", "rungs:schema:native,grammar"),
        ),
        ({"messages": [{"role": "user", "content": [IMAGE]}]}, Need("messages[0].content[0].image_url", "vision")),
        ({"top_k": 4}, Need("top_k", "field:top_k")),
        ({"reasoning_effort": "low"}, Need("reasoning_effort", "field:reasoning_effort")),
        ({"guided_regex": "a+"}, Need("guided_regex", "field:guided_regex")),
        ({"service_tier": "flex"}, Need("service_tier", "field:service_tier")),
    ],
)
def test_what_only_some_engines_can_do_becomes_a_need(fields: dict[str, Any], need: Need) -> None:
    assert need in chat(**fields).needs


def test_forms_need_nothing_of_an_engine() -> None:
    asked = chat(tools=[TOOL], parallel_tool_calls=False, response_format={"type": "json_object"}, ladder={"reasks": 1})

    assert asked.needs == []
    assert isinstance(asked.task, Chat) and asked.task.ladder == Ladder(reasks=1)
    assert chat_task(ladder={"reasks": 1}).ladder is None, "no form is asked for"


def test_engine_fields_without_a_place_in_the_task_travel_as_extra() -> None:
    task = chat_task(guided_choice=["a", "b"], top_k=5, chat_template_kwargs={"enable_thinking": False})

    assert task.extra == {"guided_choice": ["a", "b"]}
    assert task.sampling.top_k == 5
    assert task.chat_template_kwargs == {"enable_thinking": False}


def test_fields_nobody_knows_are_ignored() -> None:
    assert chat_task(frobnicate=1).extra == {}


def test_null_means_not_given() -> None:
    task = chat_task(temperature=None, stop=None, tools=None, n=None, logprobs=None, guided_json=None, store=None)
    assert task == chat_task()


def test_max_completion_tokens_is_max_tokens() -> None:
    assert chat_task(max_completion_tokens=9).sampling.max_tokens == 9
    assert chat_task(max_completion_tokens=9, max_tokens=9).sampling.max_tokens == 9


def test_image_parts_are_handed_on() -> None:
    content = (
        chat_task(messages=[{"role": "user", "content": [{"type": "text", "text": "What?"}, IMAGE]}])
        .messages[0]
        .content
    )
    assert isinstance(content, list) and isinstance(content[1], ImagePart)


def test_deprecated_functions_become_tools() -> None:
    translation = chat(
        functions=[TOOL["function"]],
        function_call={"name": "weather"},
        messages=[
            *HELLO,
            {"role": "assistant", "content": None, "function_call": {"name": "weather", "arguments": "{}"}},
            {"role": "function", "name": "weather", "content": "sunny"},
        ],
    )

    task = translation.task
    assert isinstance(task, Chat) and translation.legacy_functions
    assert task.tools == [TOOL]
    assert task.tool_choice == {"type": "function", "function": {"name": "weather"}}
    calls = task.messages[1].tool_calls
    assert calls is not None and calls[0].function.name == "weather"
    assert (task.messages[2].role, task.messages[2].tool_call_id) == ("tool", calls[0].id)
    assert decode_task(encode(task)) == decode_task(encode(task))


def test_allowed_tools_shorten_the_list_of_tools() -> None:
    allowed = {"mode": "required", "tools": [{"type": "function", "function": {"name": "time"}}]}
    task = chat_task(tools=[TOOL, OTHER_TOOL], tool_choice={"type": "allowed_tools", "allowed_tools": allowed})
    assert task.tools == [OTHER_TOOL]
    assert task.tool_choice == "required"


def test_stream_options_ask_for_usage() -> None:
    translation = chat(stream=True, stream_options={"include_usage": True})
    assert translation.stream and translation.include_usage


def test_completions_take_texts_tokens_and_lists_of_both() -> None:
    def prompt(value: Any) -> list[Any]:
        task = completion(prompt=value).task
        assert isinstance(task, Completion)
        return list(task.prompt)

    assert prompt("a") == ["a"]
    assert prompt(["a", "b"]) == ["a", "b"]
    assert prompt([1, 2]) == [[1, 2]]
    assert prompt([[1, 2], [3]]) == [[1, 2], [3]]
    assert Need("prompt", "token_prompts") in completion(prompt=[1, 2]).needs


def test_best_of_is_accepted_where_it_asks_for_nothing() -> None:
    assert completion(best_of=1).needs == []
    assert completion(best_of=3, n=3).needs == [Need("n", "n")]


def test_embeddings_take_texts_and_tokens() -> None:
    translation = embedding(input=["a", [1, 2]], encoding_format="base64", dimensions=8)
    assert translation.task == Embedding(input=["a", [1, 2]], dimensions=8)
    assert translation.base64


BAD_CHAT: list[tuple[dict[str, Any], str]] = [
    ({"model": None}, "model"),
    ({"model": 5}, "model"),
    ({"messages": None}, "messages"),
    ({"messages": "Hello"}, "messages"),
    ({"messages": []}, "messages"),
    ({"messages": [{"content": "Hello"}]}, "messages[0].role"),
    ({"messages": [*HELLO, {"role": "robot", "content": "Hello"}]}, "messages[1].role"),
    ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content"),
    ({"messages": [{"role": "user"}]}, "messages[0].content"),
    ({"messages": [{"role": "user", "content": None}]}, "messages[0].content"),
    ({"messages": [{"role": "user", "content": []}]}, "messages[0].content"),
    ({"messages": [{"role": "assistant"}]}, "messages[0].content"),
    ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].tool_call_id"),
    ({"messages": [{"role": "function", "content": "x"}]}, "messages[0].name"),
    ({"messages": [{"role": "assistant", "content": "x", "audio": {"id": "a"}}]}, "messages[0].audio"),
    (
        {"messages": [{"role": "assistant", "tool_calls": [{"id": "a", "type": "custom", "custom": {}}]}]},
        "messages[0].tool_calls[0].type",
    ),
    ({"messages": [{"role": "user", "content": [{"type": "video"}]}]}, "messages[0].content[0].type"),
    ({"messages": [{"role": "user", "content": [{"type": "text", "text": 5}]}]}, "messages[0].content[0].text"),
    (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "ftp://x"}}]}]},
        "messages[0].content[0].image_url.url",
    ),
    (
        {"messages": [{"role": "user", "content": [{"type": "file", "file": {"file_id": "f"}}]}]},
        "messages[0].content[0].file.file_id",
    ),
    ({"temperature": 2.5}, "temperature"),
    ({"temperature": -0.1}, "temperature"),
    ({"temperature": "hot"}, "temperature"),
    ({"top_p": 1.5}, "top_p"),
    ({"n": 0}, "n"),
    ({"n": 129}, "n"),
    ({"n": 1.5}, "n"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_completion_tokens": -1}, "max_completion_tokens"),
    ({"max_tokens": 1, "max_completion_tokens": 2}, "max_completion_tokens"),
    ({"presence_penalty": 3}, "presence_penalty"),
    ({"frequency_penalty": -3}, "frequency_penalty"),
    ({"logit_bias": {"7": 101}}, "logit_bias.7"),
    ({"logit_bias": {"7": "x"}}, "logit_bias.7"),
    ({"logit_bias": {"word": 1}}, "logit_bias"),
    ({"logprobs": 5}, "logprobs"),
    ({"top_logprobs": 21, "logprobs": True}, "top_logprobs"),
    ({"top_logprobs": 2}, "top_logprobs"),
    ({"stop": [str(number) for number in range(17)]}, "stop"),
    ({"stop": [""]}, "stop"),
    ({"stop": [5]}, "stop[0]"),
    ({"seed": "x"}, "seed"),
    ({"seed": 2**63}, "seed"),
    ({"stream": "yes"}, "stream"),
    ({"stream_options": {"include_usage": True}}, "stream_options"),
    ({"stream": True, "stream_options": {"include_usage": 1}}, "stream_options.include_usage"),
    ({"tools": "weather"}, "tools"),
    ({"tools": [{"type": "function"}]}, "tools[0].function"),
    ({"tools": [{"type": "function", "function": {}}]}, "tools[0].function.name"),
    ({"tools": [TOOL, {"type": "custom", "custom": {"name": "x"}}]}, "tools[1].type"),
    ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
    ({"tool_choice": "auto"}, "tool_choice"),
    ({"tools": [TOOL], "tool_choice": "maybe"}, "tool_choice"),
    ({"tools": [TOOL], "tool_choice": OTHER_TOOL}, "tool_choice"),
    ({"tools": [TOOL], "functions": [{"name": "x"}]}, "functions"),
    ({"functions": [{}]}, "functions[0].function.name"),
    ({"parallel_tool_calls": False}, "parallel_tool_calls"),
    ({"response_format": {"type": "xml"}}, "response_format.type"),
    ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
    ({"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}}, "response_format.json_schema.schema"),
    ({"store": True}, "store"),
    ({"modalities": ["text", "audio"]}, "modalities"),
    ({"audio": {"voice": "alloy", "format": "wav"}}, "audio"),
    ({"moderation": {"model": "x"}}, "moderation"),
    ({"web_search_options": {}}, "web_search_options"),
    ({"metadata": {"a": 1}}, "metadata.a"),
    ({"user": 5}, "user"),
    ({"top_k": -2}, "top_k"),
    ({"min_p": 2}, "min_p"),
    ({"min_tokens": -1}, "min_tokens"),
    ({"repetition_penalty": 0}, "repetition_penalty"),
    ({"timeout": 0}, "timeout"),
]


@pytest.mark.parametrize(("fields", "param"), BAD_CHAT, ids=[f"{param}-{n}" for n, (_, param) in enumerate(BAD_CHAT)])
def test_a_bad_chat_request_is_refused_with_the_field_at_fault(fields: dict[str, Any], param: str) -> None:
    body = {"model": "m", "messages": HELLO, **fields}
    if fields.get("model", "m") is None or fields.get("messages", "m") is None:
        body = {name: value for name, value in body.items() if value is not None}

    with pytest.raises(InvalidRequest) as caught:
        translate_chat(CHAT_BODY.read(msgspec.json.encode(body)))

    assert caught.value.param == param
    assert caught.value.status == 400


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prompt": None}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [[]]}, "prompt[0]"),
        ({"prompt": ["a", 5]}, "prompt[1]"),
        ({"prompt": [5, "a"]}, "prompt[1]"),
        ({"prompt": [-1]}, "prompt[0]"),
        ({"prompt": {"text": "a"}}, "prompt"),
        ({"logprobs": 21}, "logprobs"),
        ({"logprobs": True}, "logprobs"),
        ({"best_of": 2}, "best_of"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"echo": "yes"}, "echo"),
    ],
)
def test_a_bad_completion_request_is_refused_with_the_field_at_fault(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        completion(**fields)
    assert caught.value.param == param


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"input": ""}, "input"),
        ({"input": []}, "input"),
        ({"input": ["a", ""]}, "input[1]"),
        ({"input": ["a", None]}, "input[1]"),
        ({"input": ["a"] * 2049}, "input"),
        ({"dimensions": 0}, "dimensions"),
        ({"encoding_format": "hex"}, "encoding_format"),
    ],
)
def test_a_bad_embedding_request_is_refused_with_the_field_at_fault(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        embedding(**fields)
    assert caught.value.param == param


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"[]", b"null", b"\xff\xfe", b'{"model": NaN}', b"[" * 100_000, b'{"model":"m","messages":[{"role":"user","content":"\\ud800"}]}'],
    ids=["empty", "cut", "list", "null", "binary", "nan", "deep", "surrogate"],
)  # fmt: skip
def test_a_body_that_is_no_request_is_refused(body: bytes) -> None:
    with pytest.raises(InvalidRequest):
        CHAT_BODY.read(body)


def test_the_error_for_a_range_says_what_is_expected_and_what_came() -> None:
    with pytest.raises(InvalidRequest, match=r"Expected a value <= 2, but got 2\.5 instead"):
        chat(temperature=2.5)


def worker(**capabilities: Any) -> WorkerRecord:
    return WorkerRecord(
        id="w", model="m", deployment="m", revision="1", replica=0, node="n", engine="e", state="ok",
        capabilities=Capabilities(**capabilities),
    )  # fmt: skip


def test_a_need_is_met_when_one_live_worker_can() -> None:
    check_needs(
        [Need("tools", "tools"), Need("top_k", "field:top_k")], "m", [worker(), worker(tools=True, extra_fields=["*"])]
    )


def test_rungs_are_looked_for_among_the_live_workers() -> None:
    able = worker(json_schema=True, grammar=True, tools=True)
    for wanted in ("rungs:schema:grammar", "rungs:tools:native,grammar", "rungs:tools:prompted"):
        check_needs([Need("x", wanted)], "m", [worker(), able])
    for wanted in ("rungs:schema:native", "rungs:tools:native"):
        with pytest.raises(UnsupportedField):
            check_needs([Need("x", wanted)], "m", [worker(), able])
    check_needs([Need("x", "rungs:tools:native")], "m", [worker(tools=True, native_tools=True)])


def test_a_need_that_no_live_worker_meets_is_refused() -> None:
    with pytest.raises(UnsupportedField, match="'tools' is not supported by the model 'm'") as caught:
        check_needs([Need("tools", "tools")], "m", [worker(), worker(seed=True)])
    assert caught.value.param == "tools"


def test_needs_must_be_met_by_one_and_the_same_worker() -> None:
    with pytest.raises(UnsupportedField) as caught:
        check_needs([Need("tools", "tools"), Need("seed", "seed")], "m", [worker(tools=True), worker(seed=True)])
    assert caught.value.param == "seed"


def test_without_live_workers_nothing_is_refused() -> None:
    check_needs([Need("tools", "tools")], "m", [])
