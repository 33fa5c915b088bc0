"""The OpenAI protocol as pure functions: the bodies of requests."""

from __future__ import annotations

from typing import Any

from modelbus_broker.messages import Chat, Completion, Embedding, Sampling

from .presets import Preset


def chat_body(task: Chat, model: str, preset: Preset) -> dict[str, Any]:
    body: dict[str, Any] = {"model": model, "messages": task.messages, "stream": True}
    if preset.usage_option:
        body["stream_options"] = {"include_usage": True}
    body |= _sampling(task.sampling, preset.max_tokens_field)
    if task.sampling.logprobs is not None:
        body["logprobs"] = True
        if task.sampling.logprobs:
            body["top_logprobs"] = task.sampling.logprobs
    for name in (
        "tools", "tool_choice", "parallel_tool_calls", "response_format", "reasoning_effort", "chat_template_kwargs",
    ):  # fmt: skip
        if (value := getattr(task, name)) is not None:
            body[name] = value
    return body | task.extra


def completion_body(task: Completion, model: str, preset: Preset) -> dict[str, Any]:
    # One prompt goes as it is: not every server takes lists.
    prompt = task.prompt[0] if len(task.prompt) == 1 else task.prompt
    body: dict[str, Any] = {"model": model, "prompt": prompt, "stream": True}
    if preset.usage_option:
        body["stream_options"] = {"include_usage": True}
    body |= _sampling(task.sampling, "max_tokens")
    if task.sampling.logprobs is not None:
        body["logprobs"] = task.sampling.logprobs
    if task.echo:
        body["echo"] = True
    if task.suffix is not None:
        body["suffix"] = task.suffix
    return body | task.extra


def embedding_body(task: Embedding, model: str, preset: Preset) -> dict[str, Any]:
    body: dict[str, Any] = {"model": model, "input": task.input}
    if preset.base64_vectors:
        body["encoding_format"] = "base64"
    if task.dimensions is not None:
        body["dimensions"] = task.dimensions
    return body


def _sampling(sampling: Sampling, max_tokens_field: str) -> dict[str, Any]:
    values = {
        "n": sampling.n if sampling.n != 1 else None,
        max_tokens_field: sampling.max_tokens,
        "stop": sampling.stop or None,
        "stop_token_ids": sampling.stop_token_ids or None,
        "ignore_eos": sampling.ignore_eos or None,
    }
    for name in (
        "min_tokens", "temperature", "top_p", "top_k", "min_p", "seed", "presence_penalty", "frequency_penalty",
        "repetition_penalty", "logit_bias",
    ):  # fmt: skip
        values[name] = getattr(sampling, name)
    return {name: value for name, value in values.items() if value is not None}
