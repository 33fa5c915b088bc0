"""A store's BM25 index in tantivy: made from the database, and made anew when it is missing, damaged or of an older tokenizer.

Documents are a chunk's rid and its terms. Several commits may hold the same change: taking it again changes nothing.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tantivy
from modelbus_broker.errors import EngineFailed
from modelbus_broker.names import random_token

from ..terms import TOKENIZER_VERSION, terms
from .database import Database

log = logging.getLogger(__name__)

_HEAP_BYTES = 64 << 20
#: Changes taken between two commits.
_AT_ONCE = 5_000
#: A filter that lets more chunks through is not put into the query: what comes back is sieved.
_TERM_SET = 5_000
_MORE = 1.3
_FOLDER = "text"


class TextIndex:
    """Ranks by BM25 (k1 1.2, b 0.75). ``take`` by one thread at a time; searches at any time."""

    def __init__(self, database: Database, folder: Path) -> None:
        self._database = database
        self._folder = folder
        self._index: tantivy.Index | None = None
        self._writer: tantivy.IndexWriter | None = None
        self._again = True  #: what is pending may be here already
        self._schema = (
            tantivy.SchemaBuilder()
            .add_unsigned_field("rid", indexed=True, fast=True)
            .add_text_field("terms", tokenizer_name="whitespace", index_option="freq")
            .build()
        )

    def open(self) -> None:
        """Opens what is there, or begins a new one, which ``take`` fills."""
        name = self._database.meta(_FOLDER)
        version = f"text-{TOKENIZER_VERSION}-"
        why = ""
        if not name:
            why = "it is new"
        elif not name.startswith(version):
            why = "the tokenizer has changed"
        elif not (self._folder / name / "meta.json").exists():
            why = "it is missing"
        else:
            try:
                self._index = tantivy.Index.open(str(self._folder / name))
                if self._index.searcher().num_docs > self._database.counts()[0] + len(self._database.pending(1 << 30)):
                    why = "it has more than the database"
            except Exception as error:  # whatever it says of a damaged file
                why = f"it cannot be opened ({error})"
        if why:
            self._begin(version, why)
        assert self._index is not None
        self._index.config_reader("manual")
        for path in self._folder.glob("text-*"):
            if path.name != self._database.meta(_FOLDER):
                shutil.rmtree(path, ignore_errors=True)

    def _begin(self, version: str, why: str) -> None:
        if why != "it is new":
            log.warning("the text index in %s is made anew: %s", self._folder, why)
        name = version + random_token(8)
        path = self._folder / name
        path.mkdir(mode=0o700)
        self._index = tantivy.Index(self._schema, path=str(path))
        self._writer, self._again = None, False
        self._database.all_pending(_FOLDER, name)

    def close(self) -> None:
        writer, self._writer = self._writer, None
        self._index = None
        if writer is not None:
            writer.wait_merging_threads()

    def take(self) -> None:
        """Takes all that is pending in the database, and has it on disk then.

        Raises:
            EngineFailed: it cannot be written; what is pending stays so.
        """
        writer: tantivy.IndexWriter | None = None
        while pending := self._database.pending(_AT_ONCE):
            try:
                writer = self._writing()
                for item in pending:
                    if item.text is None or self._again:
                        writer.delete_documents_by_term("rid", item.rid)
                    if item.text is not None:
                        writer.add_document(_document(item.rid, item.text))
                writer.commit()
            except Exception as error:  # tantivy has ValueError and OSError for a full disk
                # Its threads may have ended, and it holds the lock file until it is gone.
                self._writer, self._again = None, True
                writer = None
                raise EngineFailed(
                    f"the text index in {self._folder} cannot be written ({error}): nothing is lost, it is taken up again "
                    "when there is room on the disk"
                ) from error
            self._database.taken(pending[-1].seq)
            if len(pending) < _AT_ONCE:
                self._again = False
        assert self._index is not None
        self._index.reload()

    def _writing(self) -> tantivy.IndexWriter:
        assert self._index is not None
        if self._writer is None:
            self._writer = self._index.writer(heap_size=_HEAP_BYTES, num_threads=1)
        return self._writer

    def search(self, words: Sequence[str], limit: int, among: Sequence[int] | None = None) -> list[tuple[int, float]]:
        """rid and score of the best, the best first.

        Args:
            words: different terms; a chunk with any of them is found.
            among: only these rids.
        """
        if not words or (among is not None and not among):
            return []
        assert self._index is not None
        searcher = self._index.searcher()
        should = [(tantivy.Occur.Should, tantivy.Query.term_query(self._schema, "terms", word)) for word in words]
        query = tantivy.Query.boolean_query(should)
        if among is None:
            return self._found(searcher, query, limit)
        if len(among) <= _TERM_SET:
            inside = tantivy.Query.const_score_query(
                tantivy.Query.term_set_query(self._schema, "rid", list(among)), 0.0
            )
            both = tantivy.Query.boolean_query([(tantivy.Occur.Must, query), (tantivy.Occur.Must, inside)])
            return self._found(searcher, both, limit)
        allowed = frozenset(among)
        # So many that, if the filter has nothing to do with the words, enough of them are let through.
        window = max(limit, round(limit * _MORE * searcher.num_docs / len(among)))
        while True:
            found = self._found(searcher, query, window)
            kept = [item for item in found if item[0] in allowed][:limit]
            if len(kept) == limit or len(found) < window:
                return kept
            window *= 8

    @staticmethod
    def _found(searcher: tantivy.Searcher, query: tantivy.Query, limit: int) -> list[tuple[int, float]]:
        hits: list[tuple[Any, tantivy.DocAddress]] = searcher.search(query, limit=limit, count=False).hits
        rids = searcher.fast_field_values("rid", [address for _, address in hits])
        return [(int(rid), float(score)) for rid, (score, _) in zip(rids, hits, strict=True) if rid is not None]


def _document(rid: int, text: str) -> tantivy.Document:
    # By the typed methods: made of keywords, the type of the number is guessed, and not always well.
    document = tantivy.Document()
    document.add_unsigned("rid", rid)
    document.add_text("terms", " ".join(terms(text)))
    return document
