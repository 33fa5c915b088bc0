"""From what a client sent to a task on the bus. Pure: no bus, no clock, no settings.

A request that makes no sense raises ``InvalidRequest`` with the field in ``param``, in the words of the OpenAI API.
What only some engines can do becomes a list of needs, which ``check_needs`` holds against the live workers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec
from modelbus_broker.errors import InvalidRequest, UnsupportedField
from modelbus_broker.messages import (
    Chat,
    Completion,
    Embedding,
    Task,
    WorkerRecord,
)

from .bodies import Body
from .checks import Need, integer, not_one_of, texts, timeout
from .conversation import conversation
from .fields import PLACED, PLACED_COMPLETION, RARE_CHAT, RARE_COMPLETION, Field, can
from .forms import checked_format, checked_ladder, checked_tools, from_functions
from .openai_types import ChatRequest, CompletionRequest, EmbeddingRequest
from .sampling import sampling_of


class Translation(msgspec.Struct, frozen=True, kw_only=True):
    """A request as the gateway goes on with it."""

    task: Task
    needs: Sequence[Need] = ()
    stream: bool = False
    include_usage: bool = False  #: a last event with the usage
    timeout_s: float = 0.0  #: 0 = the deployment's
    logprobs: bool = False  #: the client asked for them
    legacy_functions: bool = False  #: answer with ``function_call`` in place of ``tool_calls``
    base64: bool = False  #: embeddings as base64


CHAT_BODY, COMPLETION_BODY, EMBEDDING_BODY = Body(ChatRequest), Body(CompletionRequest), Body(EmbeddingRequest)


def translate_chat(request: ChatRequest) -> Translation:
    """Raises InvalidRequest or UnsupportedField, with ``param``."""
    needs: list[Need] = []
    extra = _rare_fields(RARE_CHAT.given(request), PLACED, needs)
    max_tokens = request.max_tokens
    if request.max_completion_tokens is not None:
        if max_tokens is not None and max_tokens != request.max_completion_tokens:
            raise InvalidRequest(
                "Setting 'max_tokens' and 'max_completion_tokens' to different values is not supported.",
                param="max_completion_tokens",
            )
        max_tokens = request.max_completion_tokens
        integer("max_completion_tokens", max_tokens, 1)
    elif max_tokens is not None:
        integer("max_tokens", max_tokens, 1)
    logprobs: int | None = None
    if request.logprobs:
        logprobs = request.top_logprobs or 0
        needs.append(Need("logprobs", "logprobs"))
    if request.top_logprobs is not None:
        integer("top_logprobs", request.top_logprobs, 0, 20)
        if not request.logprobs:
            raise InvalidRequest("'top_logprobs' is only allowed when 'logprobs' is true.", param="top_logprobs")
    tools, tool_choice, legacy = request.tools, request.tool_choice, False
    if request.functions or request.function_call is not None:
        tools, tool_choice = from_functions(request)
        legacy = True
    if tools or tool_choice is not None:
        tools, tool_choice = checked_tools(tools, tool_choice, "functions" if legacy else "tools")
    if request.parallel_tool_calls is not None and not tools and not request.parallel_tool_calls:
        raise InvalidRequest(
            "'parallel_tool_calls' is only allowed when 'tools' are specified.", param="parallel_tool_calls"
        )
    response_format = checked_format(request.response_format)
    ladder = checked_ladder(request.ladder, bool(tools) and tool_choice != "none", response_format, needs)
    stream, include_usage = _stream(request)
    return Translation(
        task=Chat(
            messages=conversation(request.messages, needs),
            sampling=sampling_of(request, max_tokens, logprobs, needs),
            tools=tools or None,
            tool_choice=tool_choice,
            parallel_tool_calls=request.parallel_tool_calls if tools else None,
            response_format=response_format,
            ladder=ladder,
            reasoning_effort=request.reasoning_effort,
            chat_template_kwargs=request.chat_template_kwargs or None,
            extra=extra,
        ),
        needs=needs,
        stream=stream,
        include_usage=include_usage,
        timeout_s=timeout(request.timeout),
        logprobs=logprobs is not None,
        legacy_functions=legacy,
    )


def translate_completion(request: CompletionRequest) -> Translation:
    """Raises InvalidRequest or UnsupportedField, with ``param``."""
    needs: list[Need] = []
    given = RARE_COMPLETION.given(request)
    if request.best_of is not None and request.best_of == (request.n or 1):
        given = [(field, value) for field, value in given if field.name != "best_of"]
    extra = _rare_fields(given, PLACED_COMPLETION, needs)
    if request.max_tokens is not None:
        integer("max_tokens", request.max_tokens, 0 if request.echo else 1)
    if request.logprobs is not None:
        integer("logprobs", request.logprobs, 0, 20)
        needs.append(Need("logprobs", "logprobs"))
    if request.prompt is None:
        raise InvalidRequest("Missing required parameter: 'prompt'.", param="prompt")
    stream, include_usage = _stream(request)
    return Translation(
        task=Completion(
            prompt=texts(request.prompt, "prompt", needs),
            sampling=sampling_of(request, request.max_tokens, request.logprobs, needs),
            echo=bool(request.echo),
            suffix=request.suffix or None,
            extra=extra,
        ),
        needs=needs,
        stream=stream,
        include_usage=include_usage,
        timeout_s=timeout(request.timeout),
        logprobs=request.logprobs is not None,
    )


def translate_embedding(request: EmbeddingRequest) -> Translation:
    """Raises InvalidRequest, with ``param``."""
    needs: list[Need] = []
    if request.dimensions is not None:
        integer("dimensions", request.dimensions, 1)
    if request.encoding_format not in (None, "float", "base64"):
        raise not_one_of("encoding_format", request.encoding_format, ("float", "base64"))
    return Translation(
        task=Embedding(input=texts(request.input, "input", needs), dimensions=request.dimensions),
        needs=needs,
        timeout_s=timeout(request.timeout),
        base64=request.encoding_format == "base64",
    )


def check_needs(needs: Sequence[Need], model: str, workers: Sequence[WorkerRecord]) -> None:
    """Raises UnsupportedField for the first field that no live worker of the model can do.

    Without live workers nothing is known and nothing refused: whether the request may wait is decided later.
    """
    for need in needs:
        able = [worker for worker in workers if can(worker.capabilities, need.capability)]
        if workers and not able:
            engines = ", ".join(sorted({worker.engine for worker in workers}))
            raise UnsupportedField(
                f"'{need.param}' is not supported by the model '{model}' (engine: {engines}).", param=need.param
            )
        workers = able


def _rare_fields(given: list[tuple[Field, Any]], placed: frozenset[str], needs: list[Need]) -> dict[str, Any]:
    """Refuses what must be refused; what engines may know becomes a need and, without a place, an extra."""
    extra = {}
    for field, value in given:
        if field.treatment == "refused":
            raise UnsupportedField(f"'{field.name}' is not supported here: {field.note}.", param=field.name)
        needs.append(Need(field.name, f"field:{field.name}"))
        if field.name not in placed:
            extra[field.name] = value
    return extra


def _stream(request: ChatRequest | CompletionRequest) -> tuple[bool, bool]:
    options = request.stream_options
    if options is None:
        return bool(request.stream), False
    if not request.stream:
        raise InvalidRequest(
            "The 'stream_options' parameter is only allowed when 'stream' is enabled.", param="stream_options"
        )
    return True, bool(options.include_usage)
