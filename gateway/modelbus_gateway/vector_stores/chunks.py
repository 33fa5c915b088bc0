"""What stands in the chunks of a vector store beside their text: the user's attributes, and ours under a prefix. Pure."""

from __future__ import annotations

from collections.abc import Mapping

from modelbus_broker.messages.files import VectorStoreFileRecord
from modelbus_broker.messages.search import Value

#: Attributes of ours; a user's do not begin so.
OURS = "mb:"
REVISION, FILENAME = f"{OURS}revision", f"{OURS}filename"


def stored_attributes(record: VectorStoreFileRecord) -> dict[str, Value]:
    """Of every chunk of a file."""
    return {**record.attributes, REVISION: record.revision, FILENAME: record.filename}


def ours(places: Mapping[str, Value]) -> dict[str, Value]:
    """Where a chunk stands in its file (line, page), under our prefix."""
    return {f"{OURS}{key}": value for key, value in places.items()}


def shown_attributes(attributes: Mapping[str, Value]) -> dict[str, Value]:
    """The user's."""
    return {key: value for key, value in attributes.items() if not key.startswith(OURS)}
