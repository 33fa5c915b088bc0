"""A store as LlamaIndex's vector store: `pip install 'modelbus[llama-index]'`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from modelbus_broker.errors import InvalidRequest, MissingExtra
from modelbus_broker.messages.search import Fusion, Mode

from ..search.blocking import Store
from ..shared import blocking

try:
    from llama_index.core.bridge.pydantic import PrivateAttr
    from llama_index.core.schema import BaseNode
    from llama_index.core.vector_stores.types import (
        BasePydanticVectorStore,
        MetadataFilters,
        VectorStoreQuery,
        VectorStoreQueryResult,
    )
except ImportError as error:
    raise MissingExtra("LlamaIndex is not installed: pip install 'modelbus[llama-index]'") from error

from .llama_nodes import chunk_of, node_of, where

_MODES: dict[str, Mode | None] = {"default": "vector", "text_search": "text", "sparse": "text", "hybrid": None}


class ModelBusVectorStore(BasePydanticVectorStore):  # type: ignore[misc]
    """A store of the search service. Query modes: default (by vector), text_search, sparse (the same) and hybrid.

    Args:
        store: the store, or its name.
        is_embedding_query: LlamaIndex embeds the queries; False: the store's own embedding model does, on the bus.
    """

    stores_text: bool = True
    is_embedding_query: bool = True
    _store: Store = PrivateAttr()

    def __init__(self, store: Store | str, *, is_embedding_query: bool = True) -> None:
        super().__init__(is_embedding_query=is_embedding_query)
        self._store = Store(store) if isinstance(store, str) else store

    @property
    def client(self) -> Store:
        """The store."""
        return self._store

    async def async_add(self, nodes: Sequence[BaseNode], **kwargs: Any) -> list[str]:
        """Writes nodes over those with the same ids; one without an embedding gets one where the store has a model."""
        return await self._store.aio.upsert([chunk_of(node) for node in nodes])

    async def adelete(self, ref_doc_id: str, **delete_kwargs: Any) -> None:
        """Deletes the nodes of a document."""
        await self._store.aio.delete(file_id=ref_doc_id)

    async def adelete_nodes(
        self, node_ids: list[str] | None = None, filters: MetadataFilters | None = None, **delete_kwargs: Any
    ) -> None:
        """Deletes the nodes with these ids that the filters let through."""
        if (condition := where(filters, ("$id", node_ids))) is not None:
            await self._store.aio.delete(filter=condition)

    async def aclear(self) -> None:
        """Deletes all nodes; the store stays."""
        await self._store.aio.delete(everything=True)

    async def aget_nodes(
        self, node_ids: list[str] | None = None, filters: MetadataFilters | None = None
    ) -> list[BaseNode]:
        """The nodes with these ids that the filters let through, at most 1000."""
        found = await self._store.aio.find(filter=where(filters, ("$id", node_ids)), limit=1000)
        return [node_of(chunk) for chunk in found]

    async def aquery(self, query: VectorStoreQuery, **kwargs: Any) -> VectorStoreQueryResult:
        """The best nodes. ``alpha`` is the vector's weight in a hybrid search; None: what the store says.

        Raises:
            InvalidRequest: a mode or a filter that the store has not.
        """
        if query.mode.value not in _MODES:
            raise InvalidRequest(f"query mode {query.mode.value!r} is none of {', '.join(_MODES)}", param="mode")
        mode = _MODES[query.mode.value]
        hybrid = mode is None
        alpha = query.alpha if hybrid else None
        found = await self._store.aio.search(
            "" if mode == "vector" and query.query_embedding else query.query_str or "",
            vector=None if mode == "text" else query.query_embedding,
            mode=mode,
            filter=where(query.filters, ("$id", query.node_ids), ("$file_id", query.doc_ids)),
            limit=(query.hybrid_top_k if hybrid else None) or query.similarity_top_k,
            fusion=None if alpha is None else Fusion(text_weight=1 - alpha, vector_weight=alpha),
        )
        nodes = [node_of(hit.chunk) for hit in found.hits]
        return VectorStoreQueryResult(
            nodes=nodes, similarities=[hit.score for hit in found.hits], ids=[node.node_id for node in nodes]
        )

    add = blocking(async_add)
    delete = blocking(adelete)
    delete_nodes = blocking(adelete_nodes)
    clear = blocking(aclear)
    get_nodes = blocking(aget_nodes)
    query = blocking(aquery)
