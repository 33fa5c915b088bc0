"""What a server of one's own can do: its routes say which tasks it has, and one token whether it reads tool calls."""

from __future__ import annotations

from typing import Any

import msgspec
from modelbus_broker.errors import InvalidRequest, ModelBusError

from .openai_client import Upstream
from .openai_errors import TryAgain

_ROUTES = {"/v1/chat/completions": "chat", "/v1/completions": "completion", "/v1/embeddings": "embedding"}
_TOOL: dict[str, Any] = {
    "type": "function",
    "function": {"name": "nothing", "parameters": {"type": "object", "properties": {}}},
}


class Served(msgspec.Struct, frozen=True, kw_only=True):
    """What was found out; empty where the server does not tell."""

    tasks: list[str] = []
    tools: bool = True


class _Routes(msgspec.Struct):
    paths: dict[str, msgspec.Raw]


async def probe(upstream: Upstream, model: str) -> Served:
    """Asks a server that serves one model, such as ``vllm serve`` and SGLang; never fails: the self-test does."""
    try:
        paths = msgspec.json.decode(await upstream.description(), type=_Routes).paths
    except (TryAgain, ModelBusError, msgspec.DecodeError, UnicodeDecodeError):
        return Served()
    tasks = [task for path, task in _ROUTES.items() if path in paths]
    return Served(tasks=tasks, tools="chat" in tasks and await _reads_calls(upstream, model))


async def _reads_calls(upstream: Upstream, model: str) -> bool:
    """A server that was started without a parser of calls refuses tools; another may refuse anything else."""
    body = {
        "model": model, "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 1, "tools": [_TOOL],
        "tool_choice": "auto",
    }  # fmt: skip
    try:
        await upstream.retried(lambda _: upstream.post("/chat/completions", body), fail_fast=True)
    except InvalidRequest as error:
        return "tool" not in error.message.lower()
    except ModelBusError:
        return True  # whatever it is, the self-test meets it too
    return True
