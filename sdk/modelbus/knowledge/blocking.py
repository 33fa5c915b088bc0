"""A knowledge base for plain programs: the methods of ``AsyncKnowledgeBase``, each waiting for its result."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

from modelbus_broker.messages import Context
from modelbus_broker.messages.search import StoreStatus

from ..answer_types import ChatDelta
from ..search.asking import DEFAULT_SERVICE
from ..search.store import SearchResult
from ..shared import background
from .base import Asking, AsyncKnowledgeBase, AsyncKnowledgeChat, KnowledgeAnswer, KnowledgeStream, Looking

if TYPE_CHECKING:
    from .building import BuildReport, Progress
    from .chunking import ChunkSettings


class KnowledgeBase:
    """See :class:`modelbus.AsyncKnowledgeBase` for the arguments. ``aio`` is the same knowledge base for asyncio.

    The connection of this process is made on first use. It may be used from any thread.
    """

    def __init__(
        self,
        name: str = "default",
        *,
        model: str = "",
        embedding_model: str = "",
        also: Collection[str] = (),
        description: str = "",
        service: str = DEFAULT_SERVICE,
        query_prefix: str = "",
        passage_prefix: str = "",
    ) -> None:
        self.aio = AsyncKnowledgeBase(
            name, model=model, embedding_model=embedding_model, also=also, description=description, service=service,
            query_prefix=query_prefix, passage_prefix=passage_prefix,
        )  # fmt: skip

    def __repr__(self) -> str:
        return f"KnowledgeBase({self.aio.name!r})"

    @property
    def name(self) -> str:
        return self.aio.name

    def build(
        self,
        folder: str | Path,
        *,
        extensions: Collection[str] = (),
        chunking: ChunkSettings | None = None,
        progress: Progress | None = None,
    ) -> BuildReport:
        """See :meth:`AsyncKnowledgeBase.build`."""
        return background.run(self.aio.build(folder, extensions=extensions, chunking=chunking, progress=progress))

    def search(self, query: str, **search: Any) -> SearchResult:
        """See :meth:`AsyncKnowledgeBase.search`."""
        return background.run(self.aio.search(query, **search))

    def contexts(self, question: str, **looking: Unpack[Looking]) -> list[Context]:
        """See :meth:`AsyncKnowledgeBase.contexts`."""
        return background.run(self.aio.contexts(question, **looking))

    def query(self, question: str, **asking: Unpack[Asking]) -> KnowledgeAnswer:
        """See :meth:`AsyncKnowledgeBase.query`."""
        return background.run(self.aio.query(question, **asking))

    def stream(self, question: str, **asking: Unpack[Asking]) -> BlockingKnowledgeStream:
        """See :meth:`AsyncKnowledgeBase.stream`."""
        return BlockingKnowledgeStream(self.aio.stream(question, **asking))

    def chat(self, **asking: Unpack[Asking]) -> KnowledgeChat:
        """See :meth:`AsyncKnowledgeBase.chat`."""
        return KnowledgeChat(self.aio.chat(**asking))

    def status(self) -> StoreStatus:
        """See :meth:`AsyncKnowledgeBase.status`."""
        return background.run(self.aio.status())

    def drop(self) -> int:
        """See :meth:`AsyncKnowledgeBase.drop`."""
        return background.run(self.aio.drop())


class KnowledgeChat:
    """A conversation with a knowledge base. ``history`` is what was said."""

    def __init__(self, aio: AsyncKnowledgeChat) -> None:
        self.aio = aio

    @property
    def history(self) -> list[dict[str, str]]:
        return self.aio.history

    def query(self, question: str) -> KnowledgeAnswer:
        """See :meth:`AsyncKnowledgeChat.query`."""
        return background.run(self.aio.query(question))


class BlockingKnowledgeStream:
    """An answer as it comes: iterate it for its deltas. Leaving the iteration early takes the request back.

    ``aio`` has the question and the contexts from the first delta on.
    """

    def __init__(self, aio: KnowledgeStream) -> None:
        self.aio = aio

    @property
    def contexts(self) -> list[Context]:
        return self.aio.contexts

    @property
    def answer(self) -> KnowledgeAnswer:
        """What has come so far."""
        return self.aio.answer

    def __iter__(self) -> Iterator[ChatDelta]:
        try:
            while (delta := background.run(_next(self.aio))) is not None:
                yield delta
        finally:
            background.run(self.aio.aclose())


async def _next(stream: KnowledgeStream) -> ChatDelta | None:
    return await anext(stream, None)
