"""A document's text in chunks: cut where its meaning is, with the headings above each, and where each stands."""

from __future__ import annotations

import bisect
import hashlib
import re
from array import array
from collections.abc import Iterator

import msgspec
from modelbus_broker.messages.search import Chunk

from .documents import Document

#: Changes when the same text gives other chunks.
CHUNKER = 2
#: Characters that the splitter gets at once: its time grows with their square, and 100 MB would take it hours.
BLOCK = 1 << 16

_HEADING = re.compile(r"(#{1,6})[ \t]+(.+?)[ \t#]*$")
_FENCE = re.compile(r"[ ]{0,3}(```|~~~)")
#: Where a long text is cut into blocks, the best first.
_SEAMS = tuple(re.compile(seam) for seam in (r"\n(?=#{1,6} )", r"\n\s*\n", r"\n", r"\s"))


class ChunkSettings(msgspec.Struct, frozen=True, kw_only=True):
    """Lengths in characters. A chunk between ``size`` and ``most`` ends where a paragraph or a sentence does."""

    size: int = 600
    most: int = 1000
    overlap: int = 80


def chunks_of(document: Document, file_id: str, settings: ChunkSettings) -> list[Chunk]:
    """The chunks in their order. An id is of the file, the headings and the text: what has not changed keeps its id."""
    import semantic_text_splitter

    splitter = (
        semantic_text_splitter.MarkdownSplitter if document.kind == "markdown" else semantic_text_splitter.TextSplitter
    )
    text = document.text
    headings = list(_headings(text)) if document.kind == "markdown" else []
    starts = [start for start, _ in headings]
    lines = array("q", (found.start() for found in re.finditer("\n", text)) if document.plain else ())
    chunks: list[Chunk] = []
    seen: dict[str, int] = {}
    split = splitter((settings.size, settings.most), overlap=settings.overlap).chunk_indices
    for start, part in ((first + at, part) for first, block in blocks(text) for at, part in split(block)):
        end = start + len(part)
        at = bisect.bisect_right(starts, start) - 1
        title = " > ".join(headings[at][1]) if at >= 0 else ""
        name = hashlib.sha256(f"{file_id}\0{title}\0{part}".encode(errors="replace")).hexdigest()[:32]
        seen[name] = seen.get(name, 0) + 1
        where: dict[str, str | bool | int | float] = {}
        if document.plain:
            where = {"line": bisect.bisect_left(lines, start) + 1, "last_line": bisect.bisect_left(lines, end - 1) + 1}
        if document.pages:
            where = {"page": bisect.bisect_right(document.pages, start)}
        chunks.append(
            Chunk(
                id=name if seen[name] == 1 else f"{name}-{seen[name]}", text=part, file_id=file_id, ordinal=len(chunks),
                title=title, start=start, end=end, attributes=where,
            )
        )  # fmt: skip
    return chunks


def blocks(text: str) -> Iterator[tuple[int, str]]:
    """A text in pieces of at most ``BLOCK`` characters, each with where it begins: cut before a heading, at a blank line, a line's end
    or a blank, whichever is found first in the second half of a piece."""
    start = 0
    while len(text) - start > BLOCK:
        end = start + BLOCK
        for seam in _SEAMS:
            if found := list(seam.finditer(text, start + BLOCK // 2, end)):
                end = found[-1].end()
                break
        yield start, text[start:end]
        start = end
    yield start, text[start:]


def _headings(text: str) -> Iterator[tuple[int, list[str]]]:
    """Where each heading begins, and its path: those above it and itself. What stands in a fence is none."""
    path: list[tuple[int, str]] = []
    fence, at = "", 0
    for line in text.split("\n"):
        if mark := _FENCE.match(line):
            fence = "" if fence == mark.group(1) else fence or mark.group(1)
        elif not fence and (found := _HEADING.match(line)):
            level = len(found.group(1))
            path = [item for item in path if item[0] < level] + [(level, found.group(2))]
            yield at, [title for _, title in path]
        at += len(line) + 1
