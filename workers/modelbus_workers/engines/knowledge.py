"""The engine ``knowledge``: a knowledge base that answers as a model does; the answers are those of another model on the bus.

The last message is the question; what was said before it is understood with it. Its worker is a client of the bus itself: it asks the
search service and the models over a connection of its own.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator
from pathlib import Path

import msgspec
from modelbus.client import Client
from modelbus.knowledge.base import Asking, AsyncKnowledgeBase, Looking, Recall
from modelbus.knowledge.routing import Route
from modelbus_broker.asking import CallOptions
from modelbus_broker.credentials import load_credential
from modelbus_broker.errors import ConfigurationError, InvalidRequest, UnsupportedField
from modelbus_broker.messages import Capabilities, Chat
from modelbus_broker.settings import BusSettings

from .base import Engine, EngineConfig, EngineOutput, Finished, Output, Run
from .params import read_params


class KnowledgeSettings(msgspec.Struct, frozen=True, kw_only=True):
    """The parameters of a ``knowledge`` deployment; ``docs/knowledge.md`` lists them."""

    model: str = ""  #: that answers
    collections: str = "default"  #: with commas
    service: str = "storage"
    emb_model: str = ""  #: as the collections were built with; they know it
    limit: int = 6
    rerank: str = ""
    recall: Recall = "search"
    recall_model: str = ""
    route: Route = "auto"
    system: str = ""  #: more instructions for the model that answers
    max_tokens: int = 0  #: of an answer whose request says nothing; 0: what the model takes
    creds: str = ""  #: a client's credential file on the node, where the worker's own does not let it ask


class KnowledgeEngine(Engine):
    """Looks for passages and lets another model answer from them."""

    name = "knowledge"

    def __init__(self, config: EngineConfig) -> None:
        super().__init__(config)
        settings = self.settings = read_params(KnowledgeSettings, config.params, engine=self.name)
        self._collections = [name.strip() for name in settings.collections.split(",") if name.strip()]
        if not settings.model:
            raise ConfigurationError("a knowledge base needs model=NAME: the chat model on the bus that answers")
        if config.model in (settings.model, settings.recall_model):
            raise ConfigurationError(f"{config.model!r} cannot ask itself: model and recall_model name other models")
        if not self._collections or settings.limit < 1:
            raise ConfigurationError("parameter collections names at least one, parameter limit is at least 1")
        self._client: Client | None = None
        self._base: AsyncKnowledgeBase | None = None
        self._can = Capabilities(tasks=["chat"])

    async def start(self) -> None:
        """
        Raises:
            ConfigurationError: the worker may not ask models, or knows no bus.
            ModelNotFound, NotFound: there is no such model, or no such collection.
        """
        settings = self.settings
        self._client = await Client.open(self._bus())
        first, *also = self._collections
        self._base = AsyncKnowledgeBase(
            first,
            client=self._client,
            model=settings.model,
            embedding_model=settings.emb_model,
            also=also,
            service=settings.service,
        )
        inner = self._client.capabilities(settings.model)
        await asyncio.gather(*(store.status() for store in self._base.stores))
        # What is passed on to the model that answers, and nothing that would need its tokens or other parts than texts.
        self._can = Capabilities(
            tasks=["chat"], json_object=inner.json_object, json_schema=inner.json_schema, grammar=inner.grammar,
            seed=inner.seed, penalties=inner.penalties, logit_bias=inner.logit_bias, logprobs=inner.logprobs,
            context_length=inner.context_length, extra_fields=inner.extra_fields,
        )  # fmt: skip

    def _bus(self) -> BusSettings:
        bus = self.config.bus
        if bus is None:
            raise ConfigurationError("the engine knowledge asks other models: it runs in a worker on a bus")
        if self.settings.creds:
            return msgspec.structs.replace(bus, creds=str(Path(self.settings.creds).expanduser()))
        if bus.creds and load_credential(Path(bus.creds).expanduser()).role == "worker":
            raise ConfigurationError(
                "this node's credential lets its workers answer and not ask: give the path of a client's credential on the "
                "node as creds=PATH, or deploy with --require to the head's node"
            )
        return bus

    def capabilities(self) -> Capabilities:
        return self._can

    @property
    def slots(self) -> int:
        return self.config.slots or 32

    @property
    def broken(self) -> str:
        closed = self._client is not None and self._client.bus.closed.is_set()
        return "its connection for asking models is closed" if closed else ""

    async def self_test(self) -> None:
        """Nothing: ``start`` has asked for the model and the collections, and an answer is another model's work."""

    async def chat(self, task: Chat, run: Run) -> AsyncIterator[EngineOutput]:
        """
        Raises:
            InvalidRequest: the last message is not the user's.
            UnsupportedField: several choices are asked for.
            ModelBusError: what the search service and the models say.
        """
        assert self._base is not None
        if task.sampling.n != 1:
            raise UnsupportedField(f"model {self.config.model!r} gives one answer: n must be 1", param="n")
        question, asking = self._asked(task, run)
        tokens = 0
        async with self._base.stream(question, **asking) as stream:
            async for delta in stream:
                self.steps += 1
                tokens, before = max(tokens, delta.position), tokens
                yield Output(
                    text=delta.text, tokens=tokens - before, finish_reason=delta.finish_reason, reasoning=delta.reasoning,
                    logprobs=delta.logprobs, refusal=delta.refusal,
                )  # fmt: skip
            yield Finished(usage=stream.answer.usage, grounding=stream.grounding)

    def _asked(self, task: Chat, run: Run) -> tuple[str, Asking]:
        """The question, and all that belongs to it."""
        turns = [message for message in task.messages if message.role in ("user", "assistant")]
        if not turns or turns[-1].role != "user" or not (question := turns[-1].text().strip()):
            raise InvalidRequest(
                "the last message is the question: it must be a user's, and have a text", param="messages"
            )
        own = [message.text() for message in task.messages if message.role in ("system", "developer")]
        fields = {**msgspec.to_builtins(task.sampling), **task.extra}
        if self.settings.max_tokens and task.sampling.max_tokens is None:
            fields["max_tokens"] = self.settings.max_tokens
        if task.response_format is not None:
            fields["response_format"] = task.response_format
        left_s = run.deadline - asyncio.get_running_loop().time()
        options = CallOptions(
            budget_ms=0 if math.isinf(left_s) else max(1, round(left_s * 1000)), stream=run.stream, wait=True,
            traceparent=run.traceparent, tracestate=run.tracestate,
        )  # fmt: skip
        asking: Asking = {
            "history": [{"role": turn.role, "content": turn.text()} for turn in turns[:-1]],
            "system": "\n\n".join(text for text in (self.settings.system, *own) if text),
            "fields": fields,
            "options": options,
            **self._looking(),
        }
        return question, asking

    def _looking(self) -> Looking:
        settings = self.settings
        return {
            "limit": settings.limit, "rerank": settings.rerank, "recall": settings.recall,
            "recall_model": settings.recall_model, "route": settings.route,
        }  # fmt: skip

    async def close(self) -> None:
        if self._client is not None:
            await self._client.close()
