"""Any large model, on any host, behind one durable bus.

| for | use |
|---|---|
| asyncio programs | ``async with modelbus.connect() as client: await client.chat("chat", "Hello")`` |
| plain programs | ``modelbus.connect_cluster()``, then ``modelbus.LLM("chat").chat_oai([...])`` |
| errors | ``modelbus.errors``; the root is ``ModelBusError`` |

Names are imported on first use, so that ``import modelbus`` costs nearly nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from modelbus_broker.errors import ModelBusError
    from modelbus_broker.messages import ChatMessage, ImagePart, ImageURL, Sampling, TextPart, ToolCall, Usage

    from . import errors
    from .answers import ChoiceAnswer
    from .client import (
        ChatAnswer,
        ChatDelta,
        ChatStream,
        ClassificationAnswer,
        ClassifiedText,
        Client,
        EmbeddingAnswer,
        RankedDocument,
        Ranking,
        connect,
    )
    from .deploying import DeployResult, UndeployResult
    from .spec import DeploySpec
    from .stat import ModelInfo, ModelStat
    from .sync import LLM, ByzerLLM, LLMRequest, LLMResponse, SingleOutputMeta, connect_cluster, disconnect

__version__ = "0.1.0"

#: Where each public name lives.
_HOMES = {
    "modelbus.answers": ("ChoiceAnswer",),
    "modelbus.client": (
        "ChatAnswer", "ChatDelta", "ChatStream", "ClassificationAnswer", "ClassifiedText", "Client", "EmbeddingAnswer",
        "RankedDocument", "Ranking", "connect",
    ),
    "modelbus.deploying": ("DeployResult", "UndeployResult"),
    "modelbus.spec": ("DeploySpec",),
    "modelbus.stat": ("ModelInfo", "ModelStat"),
    "modelbus.sync": (
        "ByzerLLM", "LLM", "LLMRequest", "LLMResponse", "SingleOutputMeta", "connect_cluster", "disconnect",
    ),
    "modelbus_broker.errors": ("ModelBusError",),
    "modelbus_broker.messages": (
        "ChatMessage", "ImagePart", "ImageURL", "Sampling", "TextPart", "ToolCall", "Usage",
    ),
}  # fmt: skip
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    "ByzerLLM", "ChatAnswer", "ChatDelta", "ChatMessage", "ChatStream", "ChoiceAnswer", "ClassificationAnswer",
    "ClassifiedText", "Client", "DeployResult",
    "DeploySpec", "EmbeddingAnswer", "ImagePart", "ImageURL", "LLM", "LLMRequest", "LLMResponse", "ModelBusError",
    "ModelInfo", "ModelStat", "RankedDocument", "Ranking", "Sampling", "SingleOutputMeta", "TextPart", "ToolCall", "UndeployResult", "Usage", "__version__",
    "connect", "connect_cluster", "disconnect", "errors",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name == "errors":
        return import_module("modelbus.errors")
    home = _HOME_OF.get(name)
    if home is None:
        raise AttributeError(f"module 'modelbus' has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(home), name)
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
