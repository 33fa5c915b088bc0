"""Where a hit has the words of the query, and the part of its text where they are densest. Pure; from our own terms."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from modelbus_broker.messages.search import Span

from .terms import matches

#: Characters of the part that is shown of a longer text.
PASSAGE_CHARS = 200
#: A text beyond this is looked at up to here.
_LOOKED_AT = 100_000


def highlights(text: str, query: Collection[str]) -> tuple[list[Span], Span]:
    """The characters of the text that match the query's terms, and the best passage of about ``PASSAGE_CHARS``.

    Single characters of a CJK query count only where no pair of it matches: alone they say little.
    """
    found = list(matches(text[:_LOOKED_AT], query))
    pairs = [span for span in found if span[1] - span[0] > 1]
    spans = joined(pairs or found)
    return [Span(start=start, end=end) for start, end in spans], best_passage(text, spans)


def joined(spans: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Spans that overlap or touch become one."""
    result: list[tuple[int, int]] = []
    for start, end in sorted(spans):
        if result and start <= result[-1][1]:
            result[-1] = (result[-1][0], max(end, result[-1][1]))
        else:
            result.append((start, end))
    return result


def best_passage(text: str, spans: Sequence[tuple[int, int]]) -> Span:
    """The window with most marked characters; it begins and ends between words where there are blanks nearby."""
    if len(text) <= PASSAGE_CHARS:
        return Span(start=0, end=len(text))
    best_start, best_marked = 0, -1
    for at, (start, _) in enumerate(spans):
        marked = 0
        for low, high in spans[at:]:
            if high > start + PASSAGE_CHARS * 3 // 4:
                break
            marked += high - low
        if marked > best_marked:
            best_start, best_marked = start, marked
    begin = max(0, min(best_start - PASSAGE_CHARS // 8, len(text) - PASSAGE_CHARS))
    end = min(len(text), begin + PASSAGE_CHARS)
    if begin and (blank := text.find(" ", begin, begin + 20)) >= 0 and blank < best_start:
        begin = blank + 1
    if end < len(text) and (blank := text.rfind(" ", end - 20, end)) > begin:
        end = blank
    return Span(start=begin, end=end)
