"""Providers that speak the OpenAI protocol, by name: where they are and what they do differently.

A preset is chosen by ``--pretrained_model_type saas/<name>``. Any other server is reached with ``saas/openai`` (or
``saas/openai_compatible``) and ``saas.base_url``.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Literal

import msgspec
from modelbus_broker.errors import ConfigurationError


class Preset(msgspec.Struct, frozen=True, kw_only=True):
    """A provider and its quirks."""

    name: str
    base_url: str = ""  #: "": the deployment must say it
    needs_key: bool = True
    max_tokens_field: Literal["max_tokens", "max_completion_tokens"] = "max_tokens"
    usage_option: bool = True  #: takes ``stream_options.include_usage``
    n: bool = True  #: gives several choices
    lists_models: bool = True  #: has GET /models
    completions: bool = False  #: has /completions
    probes: bool = False  #: a server of one model, which is asked what it can do
    base64_vectors: bool = False  #: can send embeddings as base64, a third of the size
    embedding_batch: int = 256  #: most inputs per call
    azure: bool = False  #: deployments in the path, ``api-key`` header, ``api-version``


def _table(*presets: Preset, **aliases: str) -> Mapping[str, Preset]:
    table = {preset.name: preset for preset in presets}
    return MappingProxyType(table | {alias: table[name] for alias, name in aliases.items()})


#: All presets by name and alias.
PRESETS: Mapping[str, Preset] = _table(
    Preset(name="openai", base_url="https://api.openai.com/v1", max_tokens_field="max_completion_tokens",
           base64_vectors=True, embedding_batch=2048),
    Preset(name="openai_compatible", needs_key=False, completions=True),
    Preset(name="azure_openai", azure=True, max_tokens_field="max_completion_tokens", lists_models=False,
           base64_vectors=True, embedding_batch=2048),
    Preset(name="deepseek", base_url="https://api.deepseek.com/v1", n=False),
    Preset(name="kimi", base_url="https://api.moonshot.cn/v1"),
    Preset(name="qianwen", base_url="https://dashscope.aliyuncs.com/compatible-mode/v1", lists_models=False,
           embedding_batch=10),
    Preset(name="zhipu", base_url="https://open.bigmodel.cn/api/paas/v4", n=False, lists_models=False,
           usage_option=False, embedding_batch=64),
    Preset(name="baichuan", base_url="https://api.baichuan-ai.com/v1", n=False, lists_models=False,
           usage_option=False, embedding_batch=16),
    Preset(name="minimax", base_url="https://api.minimaxi.com/v1", n=False, lists_models=False),
    Preset(name="qianfan", base_url="https://qianfan.baidubce.com/v2", n=False, embedding_batch=16),
    Preset(name="sparkdesk", base_url="https://spark-api-open.xf-yun.com/v1", n=False, lists_models=False,
           usage_option=False),
    Preset(name="gemini", base_url="https://generativelanguage.googleapis.com/v1beta/openai", embedding_batch=100),
    Preset(name="siliconflow", base_url="https://api.siliconflow.cn/v1", embedding_batch=32),
    Preset(name="openrouter", base_url="https://openrouter.ai/api/v1", n=False, completions=True),
    Preset(name="volcengine", base_url="https://ark.cn-beijing.volces.com/api/v3", n=False, lists_models=False),
    Preset(name="ollama", base_url="http://127.0.0.1:11434/v1", needs_key=False, n=False, completions=True),
    Preset(name="vllm", base_url="http://127.0.0.1:8000/v1", needs_key=False, completions=True, base64_vectors=True,
           probes=True),
    Preset(name="sglang", base_url="http://127.0.0.1:30000/v1", needs_key=False, completions=True, probes=True),
    official_openai="openai", reasoning_openai="openai", compatible="openai_compatible",
    moonshot="kimi", qwen="qianwen", qianwen_vl="qianwen", dashscope="qianwen", spark="sparkdesk", glm="zhipu",
    ark="volcengine",
)  # fmt: skip

#: Vendors of the seed whose protocol is another one.
_OTHER_PROTOCOLS = frozenset(
    {
        "claude", "anthropic", "aws_bedrock", "azure", "chatglm", "pangu", "openai_response", "openai_responses",
        "filelogger",
    }
)  # fmt: skip


def preset_for(pretrained_model_type: str) -> Preset:
    """The preset of ``saas/<name>`` or ``<name>``; "" is ``openai``.

    Raises:
        ConfigurationError: there is none; the message lists those that there are.
    """
    name = pretrained_model_type.strip().lower().removeprefix("saas/").replace("-", "_") or "openai"
    if name in PRESETS:
        return PRESETS[name]
    known = ", ".join(sorted(PRESETS))
    if name in _OTHER_PROTOCOLS:
        raise ConfigurationError(
            f"saas/{name} does not speak the OpenAI protocol; vendors with another protocol come in a later version. "
            f"Those that do: {known}"
        )
    raise ConfigurationError(
        f"there is no preset saas/{name}; known are: {known}. "
        "Any other OpenAI-compatible server: saas/openai with saas.base_url=URL"
    )
