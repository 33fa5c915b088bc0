"""A knowledge base by its name: built out of folders, asked for passages, for answers that cite them, and talked with."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Self, TypedDict, Unpack, cast

import msgspec
from modelbus_broker.asking import CallOptions
from modelbus_broker.errors import InvalidRequest, MissingExtra
from modelbus_broker.messages import Context, Grounding, Usage
from modelbus_broker.messages.search import StoreStatus

from ..answer_types import ChatDelta
from ..model_client import ModelClient
from ..search.asking import DEFAULT_SERVICE, list_stores
from ..search.store import AsyncStore, SearchResult
from ..streams import ChatStream
from .answering import LIMIT, answer, cited, contexts, fitting, standing_alone
from .recall import recalled
from .routing import Route, routed

if TYPE_CHECKING:
    from .building import BuildReport, Progress
    from .chunking import ChunkSettings

#: In the metadata of stores that are knowledge bases.
KIND = {"kind": "knowledge"}

#: ``search``: the chunks that a search finds; ``model``: the documents that a model finds relevant, see ``recall.py``.
Recall = Literal["search", "model"]
#: Turns, ``{"role": "user" or "assistant", "content": ...}``.
History = Sequence[Mapping[str, str]]


class Looking(TypedDict, total=False):
    """How passages are looked for."""

    limit: int  #: so many at most; 6. A model gets as many of them as take half of its context length
    rerank: str  #: a rerank model on the bus that orders what a search found
    recall: Recall  #: "search"
    recall_model: str  #: that judges documents and chooses collections; the one that answers
    route: Route  #: which of several collections are looked in; "auto"


class Asking(Looking, total=False):
    """How a question is asked."""

    history: History  #: what was said before: the question may refer to it
    system: str  #: more instructions for the model that answers
    fields: Mapping[str, Any]  #: of the chat, such as {"temperature": 0, "max_tokens": 500}
    options: CallOptions  #: of the requests to the model that answers: budget, tenant, ...


class KnowledgeAnswer(msgspec.Struct, frozen=True, kw_only=True):
    """An answer, and what it was made of."""

    text: str
    question: str  #: that was looked for: understood without what was said before
    contexts: list[Context]  #: the passages that the model was given
    citations: list[Context]  #: those of them that the answer names, as ``[number]``
    usage: Usage  #: of the answer
    finish_reason: str = ""


class AsyncKnowledgeBase:
    """Documents that questions are answered from, for asyncio programs. Nothing is asked before the first call.

    Args:
        name: of the collection: a store of the search service.
        client: what asks; None: the connection that this process shares.
        model: chat model on the bus that answers. Not needed to build or to look for passages.
        embedding_model: embeds passages and questions; the collection's for life. Needed to build; later it is known there.
        also: more collections that are asked with this one.
        description: what is in it: says which questions it is asked, and is shown in lists. Kept when it is built.
        service: the search service.
        query_prefix, passage_prefix: before texts that are embedded; see ``AsyncStore``.
    """

    def __init__(
        self,
        name: str = "default",
        *,
        client: ModelClient | None = None,
        model: str = "",
        embedding_model: str = "",
        also: Collection[str] = (),
        description: str = "",
        service: str = DEFAULT_SERVICE,
        query_prefix: str = "",
        passage_prefix: str = "",
    ) -> None:
        self.name = name
        self.model = model
        self.description = description
        self._client = client
        self.store = AsyncStore(
            name, client=client, service=service, embedding_model=embedding_model, query_prefix=query_prefix,
            passage_prefix=passage_prefix, metadata=KIND | {"description": description}, timeout_s=600.0,
        )  # fmt: skip
        others = (other for other in dict.fromkeys(also) if other != name)
        #: This one and the others.
        self.stores = [
            self.store,
            *(AsyncStore(other, client=client, service=service, embedding_model=embedding_model) for other in others),
        ]

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.name!r})"

    async def build(
        self,
        folder: str | Path,
        *,
        extensions: Collection[str] = (),
        chunking: ChunkSettings | None = None,
        progress: Progress | None = None,
    ) -> BuildReport:
        """Brings it up to date with a folder: only what has changed is read and embedded. Files of other folders stay.

        Args:
            extensions: only files with these, such as ``.md``; none: all that can be read.
            progress: told after each file.

        Returns:
            what was done; its ``failed`` names the files that could not be read, and why.

        Raises:
            InvalidRequest: there is no such folder, no embedding model is named, or it was built with another one.
            MissingExtra: the packages that cut texts are not installed.
            ModelBusError: the search service or the embedding model cannot be asked. Building again goes on from there.
        """
        from .building import build

        if not self.store.embedding_model:
            raise InvalidRequest("building needs an embedding model on the bus", param="embedding_model")
        done: dict[str, Any] = {} if progress is None else {"progress": progress}
        try:
            report = await build(self.store, Path(folder), extensions=extensions, chunking=chunking, **done)
        except ImportError as error:
            raise MissingExtra(
                f"building a knowledge base needs {error.name}: pip install 'modelbus[docs]'", param="folder"
            ) from error
        before = (await self.store.status()).record.metadata
        metadata = before | KIND | {"source_dir": report.folder}
        if self.description:
            metadata["description"] = self.description
        if metadata != before:
            await self.store.update(metadata=metadata)
        return report

    async def search(self, query: str, **search: Any) -> SearchResult:
        """Its chunks, as a store finds them; see ``AsyncStore.search`` for the arguments."""
        return await self.store.search(query, **search)

    async def contexts(self, question: str, **looking: Unpack[Looking]) -> list[Context]:
        """The passages that a question is to be answered from, the best first. See :class:`Looking`.

        Raises:
            NotFound: nothing has been built under one of the names.
            InvalidRequest: it was built with another embedding model than the one named here.
            ModelBusError: what the search service and the models say.
        """
        limit = looking.get("limit", LIMIT)
        if limit < 1:
            raise InvalidRequest(f"limit is at least 1, not {limit}", param="limit")
        recall, route = looking.get("recall", "search"), looking.get("route", "auto")
        judge = looking.get("recall_model") or self.model
        client = await self._asks()
        if not judge and "model" in (recall, route):
            raise InvalidRequest("a model that judges documents is needed: name it as recall_model, or as model")
        stores = await routed(client, self.stores, question, route=route, model=judge)
        if recall == "model":
            return await recalled(client, judge, stores, question, limit=limit)
        return await contexts(stores, question, limit=limit, rerank=looking.get("rerank", ""))

    async def query(self, question: str, **asking: Unpack[Asking]) -> KnowledgeAnswer:
        """The answer to a question. See :class:`Asking` and :class:`Looking`.

        Raises:
            InvalidRequest: no model is named.
            ModelBusError: as :meth:`contexts`, and what the model says.
        """
        async with self.stream(question, **asking) as stream:
            async for _ in stream:
                pass
            return stream.answer

    def stream(self, question: str, **asking: Unpack[Asking]) -> KnowledgeStream:
        """The answer as it comes; see :meth:`query`."""
        return KnowledgeStream(self, question, asking)

    def chat(self, **asking: Unpack[Asking]) -> AsyncKnowledgeChat:
        """A conversation: each question may refer to what was said."""
        return AsyncKnowledgeChat(self, asking)

    async def status(self) -> StoreStatus:
        """Raises NotFound: nothing has been built under this name."""
        return await self.store.status()

    async def drop(self) -> int:
        """Deletes it; the documents stay where they are. Returns how many chunks it had; one that is not there: 0."""
        return await self.store.drop()

    async def _asks(self) -> ModelClient:
        if self._client is None:
            from ..shared import shared_client

            return await shared_client()
        return self._client


class KnowledgeStream:
    """A streamed answer: iterate it for its deltas. Inside ``async with`` leaving early takes the request back.

    ``question`` and ``contexts`` are there when the first delta is; ``answer`` is complete when the iteration has ended.
    """

    def __init__(self, base: AsyncKnowledgeBase, question: str, asking: Asking) -> None:
        self._base = base
        self._asked = question
        self._asking = asking
        self._stream: ChatStream | None = None
        self.question = question
        self.contexts: list[Context] = []

    async def start(self) -> None:
        """Looks for the passages and asks the model; iterating does it too. Raises what ``AsyncKnowledgeBase.query`` raises."""
        if self._stream is not None:
            return
        base, asking = self._base, self._asking
        if not base.model:
            raise InvalidRequest("answering needs a chat model on the bus: name it as model", param="model")
        client = await base._asks()
        history, options = asking.get("history", ()), asking.get("options")
        self.question = await standing_alone(client, base.model, self._asked, history, options)
        looking = {name: given for name, given in asking.items() if name in Looking.__annotations__}
        found = await base.contexts(self.question, **cast(Looking, looking))
        self.contexts = fitting(found, client.capabilities(base.model).context_length)
        self._stream = answer(
            client, base.model, self._asked, self.contexts, history, system=asking.get("system", ""), options=options,
            fields=asking.get("fields"),
        )  # fmt: skip
        await self._stream.start()

    @property
    def answer(self) -> KnowledgeAnswer:
        """What has come so far."""
        assert self._stream is not None, "nothing was asked yet: iterate first"
        said = self._stream.answer
        numbers = cited(said.text, len(self.contexts))
        return KnowledgeAnswer(
            text=said.text, question=self.question, contexts=self.contexts,
            citations=[self.contexts[number - 1] for number in numbers], usage=said.usage,
            finish_reason=said.finish_reason,
        )  # fmt: skip

    @property
    def grounding(self) -> Grounding:
        """What the answer so far was made of, as it travels with an answer on the bus."""
        now = self.answer
        return Grounding(
            question=now.question, contexts=now.contexts, citations=[context.number for context in now.citations]
        )

    async def aclose(self) -> None:
        """Ends the request if it still runs."""
        if self._stream is not None:
            await self._stream.aclose()

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> ChatDelta:
        await self.start()
        assert self._stream is not None
        return await anext(self._stream)


class AsyncKnowledgeChat:
    """A conversation with a knowledge base; ``history`` is what was said. A question that failed is not in it."""

    def __init__(self, base: AsyncKnowledgeBase, asking: Asking) -> None:
        self._base = base
        self._asking = asking
        self.history: list[dict[str, str]] = [dict(turn) for turn in asking.get("history", ())]

    def stream(self, question: str) -> KnowledgeStream:
        """The next answer as it comes; give it to :meth:`heard` when it is complete."""
        return self._base.stream(question, **self._now())

    async def query(self, question: str) -> KnowledgeAnswer:
        """The next answer. Raises what ``AsyncKnowledgeBase.query`` raises."""
        answered = await self._base.query(question, **self._now())
        self.heard(question, answered)
        return answered

    def _now(self) -> Asking:
        asking = self._asking.copy()
        asking["history"] = list(self.history)
        return asking

    def heard(self, question: str, answered: KnowledgeAnswer) -> None:
        """Takes a question and its answer into the history."""
        self.history += [{"role": "user", "content": question}, {"role": "assistant", "content": answered.text}]


async def knowledge_bases(client: ModelClient, *, service: str = DEFAULT_SERVICE) -> list[StoreStatus]:
    """All knowledge bases of a search service, by name. Raises what ``modelbus.search.asking.ask`` raises."""
    stores = await list_stores(client, service=service)
    return [store for store in stores if store.record.metadata.items() >= KIND.items()]
