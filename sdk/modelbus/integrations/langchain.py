"""A store as LangChain's vector store and retriever: `pip install 'modelbus[langchain]'`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from modelbus_broker.errors import InvalidRequest, MissingExtra
from modelbus_broker.messages.search import Chunk

from ..search.blocking import Store
from ..shared import blocking
from .metadata import attributes_of, metadata_of

try:
    from langchain_core.documents import Document
    from langchain_core.embeddings import Embeddings
    from langchain_core.vectorstores import VectorStore
except ImportError as error:
    raise MissingExtra("LangChain is not installed: pip install 'modelbus[langchain]'") from error


class ModelBusVectorStore(VectorStore):  # type: ignore[misc]
    """A store of the search service. ``as_retriever()`` makes a retriever of it.

    Searches take ``k``, and by name what :meth:`modelbus.AsyncStore.search` takes: ``mode`` (the default is hybrid),
    ``filter``, ``fusion``, ``rerank``, ... Scores of a hybrid search are 0 to 1.

    Args:
        store: the store, or its name.
        embedding: embeds texts and queries; None: the store's own embedding model does, on the bus.
    """

    def __init__(self, store: Store | str, embedding: Embeddings | None = None) -> None:
        self.store = Store(store) if isinstance(store, str) else store
        self._embedding = embedding

    @property
    def embeddings(self) -> Embeddings | None:
        """What embeds, where it is not the store."""
        return self._embedding

    @classmethod
    def from_texts(
        cls, texts: list[str], embedding: Embeddings | None, metadatas: list[dict[str, Any]] | None = None, *,
        ids: list[str] | None = None, store: Store | str = "", **kwargs: Any,
    ) -> ModelBusVectorStore:  # fmt: skip
        """A store with these texts; ``store`` names it.

        Raises:
            InvalidRequest: no store is named.
        """
        if not store:
            raise InvalidRequest("a store has a name: from_texts(..., store=NAME)", param="store")
        made = cls(store, embedding)
        made.add_texts(texts, metadatas, ids=ids)
        return made

    async def aadd_texts(
        self, texts: Iterable[str], metadatas: list[dict[str, Any]] | None = None, *, ids: list[str] | None = None,
        **kwargs: Any,
    ) -> list[str]:  # fmt: skip
        """Writes texts over those with the same ids. Returns their ids.

        Raises:
            InvalidRequest: there are more or fewer metadatas or ids than texts.
        """
        texts = list(texts)
        for name, given in (("metadatas", metadatas), ("ids", ids)):
            if given and len(given) != len(texts):
                raise InvalidRequest(f"{len(texts)} texts and {len(given)} {name}: one for each", param=name)
        embedding = self._embedding
        vectors = await embedding.aembed_documents(texts) if embedding is not None and texts else [b""] * len(texts)
        return await self.store.aio.upsert(
            {
                "id": (ids[n] if ids else None) or "", "text": text, "vector": vectors[n],
                "attributes": attributes_of(metadatas[n] if metadatas else {}),
            }
            for n, text in enumerate(texts)
        )  # fmt: skip

    async def asimilarity_search_with_score(
        self, query: str, k: int = 4, **kwargs: Any
    ) -> list[tuple[Document, float]]:
        """The best documents and their scores."""
        if self._embedding is not None and kwargs.get("mode") != "text":
            kwargs.setdefault("vector", await self._embedding.aembed_query(query))
        found = await self.store.aio.search(query, limit=k, **kwargs)
        return [(_document(hit.chunk), hit.score) for hit in found.hits]

    async def asimilarity_search(self, query: str, k: int = 4, **kwargs: Any) -> list[Document]:
        """The best documents."""
        return [document for document, _ in await self.asimilarity_search_with_score(query, k, **kwargs)]

    async def asimilarity_search_by_vector(self, embedding: list[float], k: int = 4, **kwargs: Any) -> list[Document]:
        """The documents whose vectors are nearest."""
        found = await self.store.aio.search(vector=embedding, limit=k, **kwargs)
        return [_document(hit.chunk) for hit in found.hits]

    async def adelete(self, ids: list[str] | None = None, **kwargs: Any) -> bool:
        """Deletes documents by their ids; all of them where none are given."""
        await self.store.aio.delete(ids or (), everything=ids is None)
        return True

    async def aget_by_ids(self, ids: Sequence[str], /) -> list[Document]:
        """The documents with these ids that are there."""
        return [_document(chunk) for chunk in await self.store.aio.get(ids)]

    add_texts = blocking(aadd_texts)
    similarity_search_with_score = blocking(asimilarity_search_with_score)
    similarity_search = blocking(asimilarity_search)
    similarity_search_by_vector = blocking(asimilarity_search_by_vector)
    delete = blocking(adelete)
    get_by_ids = blocking(aget_by_ids)

    def _select_relevance_score_fn(self) -> Any:
        return float  # scores are relevances already


def _document(chunk: Chunk) -> Document:
    return Document(id=chunk.id, page_content=chunk.text, metadata=metadata_of(chunk.attributes))
