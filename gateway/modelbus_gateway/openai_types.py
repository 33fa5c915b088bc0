"""What clients send, as structs that are decoded straight from the body.

Every field of the OpenAI API is declared here, so that none can be dropped by accident; ``fields`` says what
becomes of each. All but the essential ones may be null, which means "not given", as the API does it. Messages
are the bus's own struct, so a conversation is not translated but handed on.
"""

from __future__ import annotations

from typing import Any

import msgspec
from modelbus_broker.messages import ChatMessage, FunctionCall, Ladder


class RequestMessage(ChatMessage, frozen=True, kw_only=True):
    """A turn as clients send it: with the fields that the bus has no need for."""

    function_call: FunctionCall | None = None  #: deprecated form of ``tool_calls``
    audio: Any = None


class StreamOptions(msgspec.Struct, frozen=True, kw_only=True):
    include_usage: bool | None = None
    include_obfuscation: bool | None = None


class EngineFields(msgspec.Struct, frozen=True, kw_only=True):
    """Fields beyond the OpenAI API that engines understand, and rare ones of the API, by their wire name."""

    top_k: int | None = None
    min_p: float | None = None
    min_tokens: int | None = None
    repetition_penalty: float | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool | None = None
    timeout: float | None = None  #: seconds

    add_special_tokens: Any = None
    allowed_token_ids: Any = None
    bad_words: Any = None
    cache_salt: Any = None
    detokenize: Any = None
    early_stopping: Any = None
    guided_choice: Any = None
    guided_decoding_backend: Any = None
    guided_grammar: Any = None
    guided_json: Any = None
    guided_regex: Any = None
    guided_whitespace_pattern: Any = None
    include_stop_str_in_output: Any = None
    length_penalty: Any = None
    logits_processors: Any = None
    lora_request: Any = None
    mirostat: Any = None
    mirostat_eta: Any = None
    mirostat_tau: Any = None
    priority: Any = None
    prompt_logprobs: Any = None
    return_token_ids: Any = None
    return_tokens_as_token_ids: Any = None
    skip_special_tokens: Any = None
    spaces_between_special_tokens: Any = None
    structured_outputs: Any = None
    tfs_z: Any = None
    top_a: Any = None
    truncate_prompt_tokens: Any = None
    typical_p: Any = None
    use_beam_search: Any = None
    vllm_xargs: Any = None


class ChatRequest(EngineFields, frozen=True, kw_only=True):
    """POST /v1/chat/completions"""

    model: str
    messages: list[RequestMessage]
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: int | None = None
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    stop: str | list[str] | None = None
    seed: int | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    response_format: dict[str, Any] | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    ladder: Ladder | None = None
    functions: list[dict[str, Any]] | None = None
    function_call: str | dict[str, Any] | None = None
    reasoning_effort: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    prediction: Any = None
    verbosity: Any = None
    service_tier: str | None = None
    store: bool | None = None
    audio: Any = None
    modalities: list[str] | None = None
    moderation: Any = None
    web_search_options: Any = None
    metadata: dict[str, str] | None = None
    user: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_options: Any = None
    prompt_cache_retention: str | None = None

    add_generation_prompt: Any = None
    chat_template: Any = None
    continue_final_message: Any = None
    documents: Any = None
    echo: Any = None
    enable_search: Any = None
    enable_thinking: Any = None
    include_reasoning: Any = None
    mm_processor_kwargs: Any = None
    reasoning: Any = None
    separate_reasoning: Any = None
    thinking: Any = None
    thinking_budget: Any = None
    thinking_token_budget: Any = None


class CompletionRequest(EngineFields, frozen=True, kw_only=True):
    """POST /v1/completions"""

    model: str
    prompt: str | list[str | int | list[int]] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: int | None = None
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    stop: str | list[str] | None = None
    seed: int | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    logprobs: int | None = None
    echo: bool | None = None
    suffix: str | None = None
    best_of: int | None = None
    user: str | None = None

    prompt_embeds: Any = None
    response_format: Any = None


class EmbeddingRequest(msgspec.Struct, frozen=True, kw_only=True):
    """POST /v1/embeddings"""

    model: str
    input: str | list[str | int | list[int]]
    dimensions: int | None = None
    encoding_format: str | None = None
    user: str | None = None
    timeout: float | None = None  #: seconds
