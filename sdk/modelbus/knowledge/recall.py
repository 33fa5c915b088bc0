"""Recall by a model: it judges each document, and those that it finds relevant are read whole in place of the best chunks.

Slower than a search by far, and right where a question and its answer have neither words nor meaning in common. Where a collection has
many files, a search says which of them are judged; of more than 10,000 chunks the first are.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence

import msgspec
from modelbus_broker.messages import Context
from modelbus_broker.messages.search import Chunk

from ..model_client import ModelClient
from ..search.store import AsyncStore
from .judging import RELEVANT, relevances

#: Files of a collection that are judged, and characters of a text that is judged at once.
FILES, PART = 100, 3_000
_PAGE, _PAGES = 1000, 10  #: of chunks; more cannot be listed in the order of files

_ASK = "Does this document help to answer the question?"


class Part(msgspec.Struct, frozen=True, kw_only=True):
    """A run of a file's chunks, as one text."""

    store: str
    file: str
    heading: str  #: of its first chunk
    line: int
    last_line: int
    page: int
    text: str


async def recalled(
    client: ModelClient, model: str, stores: Sequence[AsyncStore], question: str, *, limit: int
) -> list[Context]:
    """The parts of documents that a model finds relevant, the most relevant first; [] where it finds none.

    Args:
        limit: parts at most; one has about 3,000 characters.

    Raises:
        NotFound: one of the stores is not there.
        ModelBusError: what the search service or the model says.
    """
    found = await asyncio.gather(*(_parts_of(store, question) for store in stores))
    parts = [part for of_store in found for part in of_store]
    scores = await relevances(client, model, question, [f"{part.file}\n{part.text}" for part in parts], _ASK)
    best = sorted(zip(parts, scores, strict=True), key=lambda judged: -judged[1])[:limit]
    return [
        Context(
            number=number, file=part.file, heading=part.heading, line=part.line, last_line=part.last_line, page=part.page,
            text=part.text, score=score, collection=part.store,
        )
        for number, (part, score) in enumerate(((part, score) for part, score in best if score >= RELEVANT), 1)
    ]  # fmt: skip


async def _parts_of(store: AsyncStore, question: str) -> list[Part]:
    """Of all files, or of those that a search finds first."""
    condition = None
    if (await store.status()).files > FILES:
        hits = (await store.search(question, limit=_PAGE, highlights=False)).hits
        files = list(dict.fromkeys(hit.chunk.file_id for hit in hits))[:FILES]
        condition = {"type": "in", "key": "$file_id", "value": files}
    chunks: list[Chunk] = []
    for _ in range(_PAGES):
        page = await store.find(filter=condition, sort=["$file_id", "$ordinal"], limit=_PAGE, offset=len(chunks))
        chunks += page
        if len(page) < _PAGE:
            break
    return list(parts(store.name, chunks))


def parts(store: str, chunks: Sequence[Chunk], size: int = PART) -> Iterator[Part]:
    """The chunks of files, in their order, joined to texts of about so many characters; what overlaps is there once."""
    run: list[Chunk] = []
    length = 0
    for chunk in chunks:
        if run and (chunk.file_id != run[-1].file_id or length + len(chunk.text) > size):
            yield _part(store, run)
            run, length = [], 0
        run.append(chunk)
        length += len(chunk.text)
    if run:
        yield _part(store, run)


def _part(store: str, run: Sequence[Chunk]) -> Part:
    text, end = run[0].text, run[0].end
    for chunk in run[1:]:
        shared = end - chunk.start
        text += chunk.text[shared:] if shared > 0 else "\n" * min(-shared, 2) + chunk.text  # white space is cut off
        end = max(end, chunk.end)
    first, last = run[0].attributes, run[-1].attributes
    return Part(
        store=store, file=run[0].file_id or run[0].id, heading=run[0].title, line=int(first.get("line", 0)),
        last_line=int(last.get("last_line", 0)), page=int(first.get("page", 0)), text=text,
    )  # fmt: skip
