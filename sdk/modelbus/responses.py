"""What the calls of ``LLM`` take and give, in byzerllm's shapes."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from modelbus_broker.errors import OutputError
from modelbus_broker.messages import Ladder, ToolCall, Usage

from .model_client import Messages, ModelClient

if TYPE_CHECKING:
    from .tools import ToolLike, ToolSet

T = TypeVar("T")


@dataclass(frozen=True)
class LLMResponse:
    """One answer.

    ``metadata`` has request_id, input_tokens_count, generated_tokens_count, time_cost and first_token_time (ms),
    speed (output tokens/s), prob, finish_reason and reasoning_content.
    """

    output: Any  #: text, or the vector of an embedding
    input: Any  #: the last user's turn, or the text that was embedded
    metadata: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class LLMRequest:
    """What to embed: a text or several."""

    instruction: str | list[str]
    embedding: bool = False


@dataclass(frozen=True)
class SingleOutputMeta:
    """What is known beside the text of a streamed answer so far."""

    input_tokens_count: int = 0
    generated_tokens_count: int = 0
    reasoning_content: str = ""
    finish_reason: str = ""
    first_token_time: float = 0.0  #: ms
    request_id: str = ""


@dataclass(frozen=True)
class LLMClassResponse(Generic[T]):
    """An answer that is an object: of ``chat_oai(response_class=...)``.

    ``metadata`` has rung and attempts too: how the answer came by its form, and how often the model was asked.
    """

    response: LLMResponse  #: what the model wrote
    value: T
    metadata: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class LLMFunctionCallResponse:
    """An answer that calls functions: of ``chat_oai(tools=...)``."""

    response: LLMResponse  #: what the model wrote
    values: list[Any]  #: what the functions returned, in the order of the calls; without ``execute_tool`` nothing
    calls: list[ToolCall]
    metadata: dict[str, Any] = field(default_factory=dict)


async def class_response(
    client: ModelClient,
    model: str,
    conversations: Messages,
    response_class: type[T],
    fields: Mapping[str, Any],
    ladder: Ladder,
) -> LLMClassResponse[T]:
    """The answer as an object. Raises what ``structure.answer`` raises."""
    from .structure import answer  # who asks for texts alone has no use for it

    started = time.monotonic()
    result = await answer(client, model, conversations, response_class, sampling=fields, ladder=ladder)
    took_ms = (time.monotonic() - started) * 1000
    metadata = metadata_of(result.request_id, result.usage, took_ms, 0.0, result.finish_reason)
    metadata |= {"rung": result.rung, "attempts": result.attempts}
    response = LLMResponse(output=result.raw, input=last_turn(conversations), metadata=metadata)
    return LLMClassResponse(response=response, value=result.value, metadata=metadata)


async def call_response(
    client: ModelClient,
    model: str,
    conversations: Messages,
    tools: Sequence[ToolLike | ToolSet],
    *,
    choice: str | None,
    execute: bool,
    inject: Mapping[str, Any] | None,
    fields: Mapping[str, Any],
) -> LLMFunctionCallResponse:
    """One question, the calls that the model answers with, and what they return; it is not told of that.

    Raises:
        OutputError: the model's calls are not right; or one was refused or took too long.
        Exception: what a function raises.
    """
    from .tools import Caller, ToolContext, ToolSet, run_tools

    toolset = ToolSet(*tools)
    started = time.monotonic()
    run = await run_tools(
        client, model, conversations, toolset, execute=False, choice=choice, inject=inject, sampling=fields
    )
    took_ms = (time.monotonic() - started) * 1000
    values: list[Any] = []
    if execute and run.pending:
        caller = Caller(toolset, parallel=1, inject=inject, propagate=(Exception,))
        outcomes = await caller.outcomes(
            run.pending,
            lambda call: ToolContext(client=client, model=model, messages=run.messages, call=call, round=1),
        )
        if failed := next((outcome for outcome in outcomes if not outcome.ok), None):
            raise OutputError(failed.text.removeprefix("Error: "), raw=failed.call.function.arguments)
        values = [outcome.value for outcome in outcomes]
    metadata = metadata_of(run.request_id, run.usage, took_ms, 0.0, run.finish_reason) | {"rung": run.rung}
    response = LLMResponse(output=run.answer, input=last_turn(conversations), metadata=metadata)
    return LLMFunctionCallResponse(response=response, values=values, calls=run.pending, metadata=metadata)


def metadata_of(
    request_id: str, usage: Usage, time_cost_ms: float, first_token_ms: float, finish_reason: str
) -> dict[str, Any]:
    """What byzerllm says of an answer; see ``LLMResponse``."""
    return {
        "request_id": request_id,
        "input_tokens_count": usage.prompt_tokens,
        "generated_tokens_count": usage.completion_tokens,
        "time_cost": time_cost_ms,
        "first_token_time": first_token_ms,
        "speed": usage.completion_tokens / max(time_cost_ms / 1000, 1e-6),
        "prob": -1.0,
        "finish_reason": finish_reason,
        "reasoning_content": "",
    }


def last_turn(conversations: Messages) -> str:
    """What the user said last."""
    if isinstance(conversations, str):
        return conversations
    for item in reversed(conversations):
        role = item.get("role") if isinstance(item, Mapping) else item.role
        if role == "user":
            content = item.get("content") if isinstance(item, Mapping) else item.text()
            return content if isinstance(content, str) else str(content or "")
    return ""
