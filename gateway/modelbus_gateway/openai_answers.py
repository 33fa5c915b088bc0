"""The bodies of plain answers, in the shapes of the OpenAI API. Pure."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
from modelbus.answers import AnswerBuilder, ChoiceAnswer, floats
from modelbus_broker.messages import FunctionCall, Grounding, TokenLogprob, ToolCall, Usage
from msgspec import UNSET, UnsetType

#: The API shows no lower log probability: JSON has no infinity.
LEAST_LOGPROB = -9999.0


class PromptTokensDetails(msgspec.Struct, frozen=True):
    cached_tokens: int
    audio_tokens: int = 0


class CompletionTokensDetails(msgspec.Struct, frozen=True):
    reasoning_tokens: int
    audio_tokens: int = 0
    accepted_prediction_tokens: int = 0
    rejected_prediction_tokens: int = 0


class UsageBody(msgspec.Struct, frozen=True):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails
    completion_tokens_details: CompletionTokensDetails


class EmbeddingUsageBody(msgspec.Struct, frozen=True):
    prompt_tokens: int
    total_tokens: int


class TopLogprobBody(msgspec.Struct, frozen=True):
    token: str
    logprob: float
    bytes: list[int] | None


class ChatLogprob(msgspec.Struct, frozen=True):
    token: str
    logprob: float
    bytes: list[int] | None
    top_logprobs: list[TopLogprobBody]


class ChatLogprobs(msgspec.Struct, frozen=True):
    content: list[ChatLogprob]
    refusal: list[ChatLogprob] | None = None


class CompletionLogprobs(msgspec.Struct, frozen=True):
    text_offset: list[int]
    token_logprobs: list[float]
    tokens: list[str]
    top_logprobs: list[dict[str, float]] | None


class AnswerMessage(msgspec.Struct, frozen=True, kw_only=True):
    role: str
    content: str | None
    refusal: str | None = None
    reasoning_content: str | UnsetType = UNSET
    tool_calls: list[ToolCall] | UnsetType = UNSET
    function_call: FunctionCall | UnsetType = UNSET


class ChatChoice(msgspec.Struct, frozen=True, kw_only=True):
    index: int
    message: AnswerMessage
    logprobs: ChatLogprobs | None
    finish_reason: str


class ChatAnswer(msgspec.Struct, frozen=True, kw_only=True):
    id: str
    object: str = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: UsageBody
    system_fingerprint: str | None
    #: Ours: of an answer out of documents, what it was made of.
    grounding: Grounding | UnsetType = UNSET


class CompletionChoice(msgspec.Struct, frozen=True, kw_only=True):
    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: str


class CompletionAnswer(msgspec.Struct, frozen=True, kw_only=True):
    id: str
    object: str = "text_completion"
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: UsageBody
    system_fingerprint: str | None


class EmbeddingItem(msgspec.Struct, frozen=True, kw_only=True):
    object: str = "embedding"
    index: int
    embedding: list[float] | bytes  #: bytes become base64


class EmbeddingAnswer(msgspec.Struct, frozen=True, kw_only=True):
    object: str = "list"
    data: list[EmbeddingItem]
    model: str
    usage: EmbeddingUsageBody


class ModelCard(msgspec.Struct, frozen=True, kw_only=True):
    id: str
    object: str = "model"
    created: int
    owned_by: str = "modelbus"
    parent: str | msgspec.UnsetType = msgspec.UNSET  #: of an adapter: its model


class ModelList(msgspec.Struct, frozen=True, kw_only=True):
    object: str = "list"
    data: list[ModelCard]


to_json = msgspec.json.Encoder().encode


def chat_answer(
    answer: AnswerBuilder, *, id: str, created: int, model: str, role: str, logprobs: bool, legacy_functions: bool
) -> bytes:
    """The body of a plain answer of /v1/chat/completions. ``legacy_functions``: the request had ``functions``."""
    done = answer.done
    return to_json(
        ChatAnswer(
            id=f"chatcmpl-{id}",
            created=created,
            model=model,
            choices=[_chat_choice(choice, role, logprobs, legacy_functions) for choice in answer.choices],
            usage=usage_body(answer.usage),
            system_fingerprint=(done.system_fingerprint or None) if done else None,
            grounding=(done.grounding or UNSET) if done else UNSET,
        )
    )


def completion_answer(answer: AnswerBuilder, *, id: str, created: int, model: str, logprobs: bool) -> bytes:
    """The body of a plain answer of /v1/completions."""
    done = answer.done
    return to_json(
        CompletionAnswer(
            id=f"cmpl-{id}",
            created=created,
            model=model,
            choices=[
                CompletionChoice(
                    index=choice.index,
                    text=choice.text,
                    logprobs=completion_logprobs(choice.logprobs, 0) if logprobs else None,
                    finish_reason=choice.finish_reason or "stop",
                )
                for choice in answer.choices
            ],
            usage=usage_body(answer.usage),
            system_fingerprint=(done.system_fingerprint or None) if done else None,
        )
    )


def embedding_answer(answer: AnswerBuilder, *, model: str, base64: bool) -> bytes:
    """The body of /v1/embeddings."""
    prompt_tokens = answer.usage.prompt_tokens
    return to_json(
        EmbeddingAnswer(
            data=[
                EmbeddingItem(index=index, embedding=vector if base64 else floats(vector))
                for index, vector in enumerate(answer.vectors)
            ],
            model=model,
            usage=EmbeddingUsageBody(prompt_tokens, prompt_tokens),
        )
    )


def usage_body(usage: Usage) -> UsageBody:
    return UsageBody(
        usage.prompt_tokens,
        usage.completion_tokens,
        usage.prompt_tokens + usage.completion_tokens,
        PromptTokensDetails(usage.cached_tokens),
        CompletionTokensDetails(usage.reasoning_tokens),
    )


def chat_logprobs(tokens: Sequence[TokenLogprob]) -> ChatLogprobs:
    return ChatLogprobs(
        [
            ChatLogprob(
                token.token,
                max(token.logprob, LEAST_LOGPROB),
                token.bytes,
                [TopLogprobBody(top.token, max(top.logprob, LEAST_LOGPROB), top.bytes) for top in token.top],
            )
            for token in tokens
        ]
    )


def completion_logprobs(tokens: Sequence[TokenLogprob], offset: int) -> CompletionLogprobs:
    """``offset``: characters of the text before the first of these tokens."""
    offsets = []
    for token in tokens:
        offsets.append(offset)
        offset += len(token.token)
    tops = [{top.token: max(top.logprob, LEAST_LOGPROB) for top in token.top} for token in tokens]
    return CompletionLogprobs(
        offsets,
        [max(token.logprob, LEAST_LOGPROB) for token in tokens],
        [token.token for token in tokens],
        tops if any(tops) else None,
    )


def _chat_choice(choice: ChoiceAnswer, role: str, logprobs: bool, legacy_functions: bool) -> ChatChoice:
    tool_calls, finish_reason = choice.tool_calls, choice.finish_reason or "stop"
    legacy = legacy_functions and bool(tool_calls)
    return ChatChoice(
        index=choice.index,
        message=AnswerMessage(
            role=role,
            # Null says: the model called a tool in place of speaking.
            content=choice.text if choice.text or not (tool_calls or choice.refusal) else None,
            refusal=choice.refusal or None,
            reasoning_content=choice.reasoning or UNSET,
            tool_calls=tool_calls if tool_calls and not legacy else UNSET,
            function_call=tool_calls[0].function if legacy else UNSET,
        ),
        logprobs=chat_logprobs(choice.logprobs) if logprobs else None,
        finish_reason="function_call" if legacy and finish_reason == "tool_calls" else finish_reason,
    )
