"""Any large model, on any host, behind one durable bus.

| for | use |
|---|---|
| asyncio programs | ``async with modelbus.connect() as client: await client.chat("chat", "Hello")`` |
| plain programs | ``modelbus.connect_cluster()``, then ``modelbus.LLM("chat").chat_oai([...])`` |
| work that outlives this program | ``client.submit``, ``batch``, ``map``; ``modelbus.job(id).result()`` |
| texts to be found | ``modelbus.Store("notes")``, ``modelbus.AsyncStore("notes", client=client)`` |
| folders of documents | ``modelbus.KnowledgeBase("docs", model="chat", embedding_model="emb")``: ``build``, ``query`` |
| errors | ``modelbus.errors``; the root is ``ModelBusError`` |

Names are imported on first use, so that ``import modelbus`` costs nearly nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from modelbus_broker.errors import ModelBusError
    from modelbus_broker.messages import (
        AdapterRecord,
        ChatMessage,
        ImagePart,
        ImageURL,
        Sampling,
        TextPart,
        ToolCall,
        Usage,
    )

    from . import errors
    from .answer_types import (
        ChatAnswer,
        ChatDelta,
        ClassificationAnswer,
        ClassifiedText,
        EmbeddingAnswer,
        RankedDocument,
        Ranking,
    )
    from .answers import ChoiceAnswer
    from .chats import Agent, Chat, Group, Team
    from .client import Client, connect
    from .decisions import Decision
    from .deploying import DeployResult, UndeployResult
    from .jobs import Batch, Job, JobStatus, Progress, Row
    from .jobs.blocking import BlockingJob, job
    from .knowledge.base import AsyncKnowledgeBase, AsyncKnowledgeChat, KnowledgeAnswer, KnowledgeStream
    from .knowledge.blocking import KnowledgeBase, KnowledgeChat
    from .model_client import ModelClient
    from .prompts import (
        AsyncPromptFunction,
        AsyncStream,
        AsyncStreamFunction,
        Audio,
        File,
        Image,
        Partial,
        PromptFunction,
        RenderedCall,
        Stream,
        StreamFunction,
        context,
        prompt,
    )
    from .responses import LLMClassResponse, LLMFunctionCallResponse, LLMRequest, LLMResponse, SingleOutputMeta
    from .search.blocking import Store, stores
    from .search.store import AsyncStore, SearchResult
    from .shared import connect_cluster, disconnect
    from .spec import DeploySpec
    from .stat import ModelInfo, ModelStat
    from .streams import ChatStream
    from .structure import Result
    from .sync import LLM, ByzerLLM
    from .tools import Injected, Tool, ToolSet, run_tools, tool

__version__ = "0.1.0"

#: Where each public name lives.
_HOMES = {
    "modelbus.answer_types": (
        "ChatAnswer", "ChatDelta", "ClassificationAnswer", "ClassifiedText", "EmbeddingAnswer", "RankedDocument", "Ranking",
    ),
    "modelbus.answers": ("ChoiceAnswer",),
    "modelbus.chats": ("Agent", "Chat", "Group", "Team"),
    "modelbus.client": ("Client", "connect"),
    "modelbus.model_client": ("ModelClient",),
    "modelbus.decisions": ("Decision",),
    "modelbus.deploying": ("DeployResult", "UndeployResult"),
    "modelbus.jobs": ("Batch", "Job", "JobStatus", "Progress", "Row"),
    "modelbus.jobs.blocking": ("BlockingJob", "job"),
    "modelbus.knowledge.base": ("AsyncKnowledgeBase", "AsyncKnowledgeChat", "KnowledgeAnswer", "KnowledgeStream"),
    "modelbus.knowledge.blocking": ("KnowledgeBase", "KnowledgeChat"),
    "modelbus.spec": ("DeploySpec",),
    "modelbus.streams": ("ChatStream",),
    "modelbus.structure": ("Result",),
    "modelbus.stat": ("ModelInfo", "ModelStat"),
    "modelbus.prompts": (
        "AsyncPromptFunction", "AsyncStream", "AsyncStreamFunction", "Audio", "File", "Image", "Partial",
        "PromptFunction", "RenderedCall", "Stream", "StreamFunction", "context", "prompt",
    ),
    "modelbus.search.blocking": ("Store", "stores"),
    "modelbus.search.store": ("AsyncStore", "SearchResult"),
    "modelbus.shared": ("connect_cluster", "disconnect"),
    "modelbus.responses": (
        "LLMClassResponse", "LLMFunctionCallResponse", "LLMRequest", "LLMResponse", "SingleOutputMeta",
    ),
    "modelbus.sync": ("ByzerLLM", "LLM"),
    "modelbus.tools": ("Injected", "Tool", "ToolSet", "run_tools", "tool"),
    "modelbus_broker.errors": ("ModelBusError",),
    "modelbus_broker.messages": (
        "AdapterRecord", "ChatMessage", "ImagePart", "ImageURL", "Sampling", "TextPart", "ToolCall", "Usage",
    ),
}  # fmt: skip
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    "AdapterRecord", "Agent", "AsyncKnowledgeBase", "AsyncKnowledgeChat", "AsyncPromptFunction", "AsyncStore", "AsyncStream", "AsyncStreamFunction", "Audio", "Batch",
    "BlockingJob", "ByzerLLM", "Chat", "ChatAnswer", "ChatDelta", "ChatMessage", "ChatStream", "ChoiceAnswer",
    "ClassificationAnswer", "ClassifiedText", "Client", "Decision", "DeployResult", "DeploySpec", "EmbeddingAnswer",
    "File", "Group", "Image", "ImagePart", "ImageURL", "Injected", "Job", "JobStatus", "KnowledgeAnswer", "KnowledgeBase", "KnowledgeChat", "KnowledgeStream", "LLM", "LLMClassResponse",
    "LLMFunctionCallResponse", "LLMRequest", "LLMResponse", "ModelBusError", "ModelClient", "ModelInfo", "ModelStat",
    "Partial", "Progress", "PromptFunction", "RankedDocument", "Ranking", "RenderedCall", "Result", "Row",
    "Sampling", "SearchResult", "SingleOutputMeta", "Store", "Stream", "StreamFunction", "Team", "TextPart", "Tool", "ToolCall", "ToolSet",
    "UndeployResult", "Usage", "__version__", "connect", "connect_cluster", "context", "disconnect", "errors", "job",
    "prompt", "run_tools", "stores", "tool",
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
