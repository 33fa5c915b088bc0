"""LlamaIndex's nodes and filters as chunks and filters of a store, and back. Pure."""

from __future__ import annotations

from typing import Any, Literal

from llama_index.core.schema import BaseNode, MetadataMode
from llama_index.core.vector_stores.types import MetadataFilters
from llama_index.core.vector_stores.utils import metadata_dict_to_node, node_to_metadata_dict
from modelbus_broker.errors import InvalidRequest
from modelbus_broker.messages.search import Chunk, Filter

from .metadata import attributes_of, metadata_of

_OPERATORS: dict[str, Literal["eq", "ne", "gt", "gte", "lt", "lte", "in", "nin"]] = {
    "==": "eq", "!=": "ne", ">": "gt", ">=": "gte", "<": "lt", "<=": "lte", "in": "in", "nin": "nin",
}  # fmt: skip


def chunk_of(node: BaseNode) -> dict[str, Any]:
    """A node as a chunk: its document is the chunk's file, its metadata are attributes."""
    whole = node_to_metadata_dict(node, remove_text=True)
    more = {name: whole[name] for name in ("_node_content", "_node_type")}
    return {
        "id": node.node_id, "text": node.get_content(metadata_mode=MetadataMode.NONE), "vector": node.embedding,
        "file_id": node.ref_doc_id or "", "attributes": attributes_of(node.metadata, more),
    }  # fmt: skip


def node_of(chunk: Chunk) -> BaseNode:
    """The node that a chunk was made of."""
    return metadata_dict_to_node(metadata_of(chunk.attributes), text=chunk.text)


def where(filters: MetadataFilters | None, *ids: tuple[str, list[str] | None]) -> Filter | None:
    """Chunks that the filters let through and whose keys have these values; None: all of them.

    Raises:
        InvalidRequest: a filter that the store has not.
    """
    conditions = [Filter(type="in", key=key, value=list(values)) for key, values in ids if values is not None]
    if filters is not None and filters.filters:
        conditions.append(_filter(filters))
    return Filter(type="and", filters=conditions) if conditions else None


def _filter(filters: Any) -> Filter:
    if not isinstance(filters, MetadataFilters):
        if filters.operator.value not in _OPERATORS or filters.value is None:
            raise InvalidRequest(
                f"a filter with {filters.operator.value!r} on {filters.key!r} cannot be meant: there are "
                f"{', '.join(_OPERATORS)}, with a value",
                param="filters",
            )
        return Filter(type=_OPERATORS[filters.operator.value], key=filters.key, value=filters.value)
    parts = [_filter(item) for item in filters.filters]
    if filters.condition is not None and filters.condition.value == "not":  # none of them holds
        return Filter(type="not", filters=[Filter(type="or", filters=parts)])
    return Filter(
        type="or" if filters.condition is not None and filters.condition.value == "or" else "and", filters=parts
    )
