"""Sets of passages and questions with judgements of what answers them, and how well a ranking does by these.

Two sets are the project's own: its documentation, and the document that it is built from where that lies beside the
checkout. Of each question in ``tests/data/relevance_*.json`` the words of the document are given that answer it; whatever
chunk has them is relevant, and nothing else. The questions were written from the contents alone, before anything was ranked,
and none was changed afterwards.

Public sets are read where ``MODELBUS_BENCH_SETS`` names a folder with their files as they are distributed: ``xquad.en.json``
and ``xquad.zh.json`` (XQuAD: the same questions and paragraphs in both languages), ``cran.all.1400.xml``, ``cran.qry.xml`` and
``cranqrel.trec.txt`` (Cranfield in TREC's form).
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
import os
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Literal, cast

import msgspec
import numpy as np
from modelbus.knowledge.chunking import ChunkSettings, chunks_of
from modelbus.knowledge.documents import read
from modelbus_broker.messages.search import Chunk

from tests.helpers.seed_document import document

ROOT = Path(__file__).parents[2]
DATA = ROOT / "tests" / "data"
#: Generated pages: lists of names, not texts.
_GENERATED = frozenset({"api.md", "cli.md", "structure.md"})

#: Of a short document, so that there are some to choose from.
SHORT = ChunkSettings(size=150, most=300, overlap=40)

Language = Literal["en", "zh"]


class RelevanceSet(msgspec.Struct, frozen=True, kw_only=True):
    """Question n is answered by the chunks in ``relevant[n]``, by their ids."""

    name: str
    chunks: list[Chunk]
    questions: list[str]
    relevant: list[frozenset[str]]


#: Real vectors of the document's chunks and of its first questions: no test needs the model.
SEED_VECTORS = DATA / "seed_vectors.json"
#: So many questions of the document are a test.
REGRESSION = 7


def digest(text: str) -> str:
    """What a text's vector is kept under."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def kept_vector(text: str) -> bytes:
    """A vector of multilingual-e5-small, float32, out of ``SEED_VECTORS``.

    Raises:
        KeyError: the document is cut otherwise now: ``python -m tests.bench.quality`` writes the file anew.
    """
    return np.frombuffer(base64.b64decode(_kept_vectors()[digest(text)]), dtype="<f2").astype("<f4").tobytes()


@cache
def _kept_vectors() -> dict[str, str]:
    return cast(dict[str, str], json.loads(SEED_VECTORS.read_text()))


def ndcg(ranked: Sequence[str], relevant: Collection[str], depth: int = 10) -> float:
    """Discounted gain of the first places as a share of the best that there could be; a relevant chunk gains 1.

    Jarvelin and Kekalainen 2002, as trec_eval's ``ndcg_cut``.
    """
    gained = sum(1 / math.log2(place + 2) for place, key in enumerate(ranked[:depth]) if key in relevant)
    best = sum(1 / math.log2(place + 2) for place in range(min(len(relevant), depth)))
    return gained / best


def recall(ranked: Sequence[str], relevant: Collection[str], depth: int = 10) -> float:
    """The share of what is relevant that is among the first places."""
    return len(set(ranked[:depth]) & set(relevant)) / len(relevant)


def documentation(questions: Language) -> RelevanceSet:
    """The pages of docs/, with English questions or their Chinese translations."""
    asked = json.loads((DATA / "relevance_docs.json").read_text())
    pages = [path for path in sorted((ROOT / "docs").glob("*.md")) if path.name not in _GENERATED]
    chunks = [chunk for path in pages for chunk in _chunks(path)]
    relevant = [
        answering([chunk for chunk in chunks if chunk.file_id == item["file"]], item["answer"]) for item in asked
    ]
    name = "documentation" if questions == "en" else "documentation, Chinese questions"
    return RelevanceSet(name=name, chunks=chunks, questions=[item[questions] for item in asked], relevant=relevant)


def seed_document() -> RelevanceSet | None:
    """The document that the project is built from, mostly Chinese; None where only its commands are here."""
    path = document()
    if path.name != "seed-document.md":
        return None
    asked = json.loads((DATA / "relevance_seed.json").read_text())
    chunks = _chunks(path, SHORT)
    return RelevanceSet(
        name="Chinese document",
        chunks=chunks,
        questions=[item["question"] for item in asked],
        relevant=[answering(chunks, item["answer"]) for item in asked],
    )


def public_sets() -> Iterator[tuple[RelevanceSet, Literal["e5", "minilm"]]]:
    """Those whose files are there, each with the embedding model that it is measured with."""
    folder = os.environ.get("MODELBUS_BENCH_SETS")
    if not folder:
        return
    paragraphs = {
        language: _squad(path) for language in ("en", "zh") if (path := Path(folder, f"xquad.{language}.json")).exists()
    }
    for asked, questions in paragraphs.items():
        for written, texts in paragraphs.items():
            name = f"XQuAD {asked}" if asked == written else f"XQuAD, {asked} questions, {written} texts"
            yield _of_squad(name, questions, texts), "e5"
    if Path(folder, "cran.all.1400.xml").exists():
        yield cranfield(Path(folder)), "minilm"


def answering(chunks: Sequence[Chunk], words: str) -> frozenset[str]:
    """The ids of the chunks that have these words, however they are broken into lines.

    Raises:
        RuntimeError: none has them: the document has changed, and what answers has to be looked for again.
    """
    found = frozenset(chunk.id for chunk in chunks if _one_line(words) in _one_line(chunk.text))
    if not found:
        raise RuntimeError(
            f"no chunk has the words {words!r}, which answer a question: correct tests/data/relevance_*.json"
        )
    return found


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _chunks(path: Path, settings: ChunkSettings | None = None) -> list[Chunk]:
    return chunks_of(read(path, path.read_bytes()), path.name, settings or ChunkSettings())


# SQuAD's form


def _squad(path: Path) -> list[tuple[str, list[str]]]:
    """Paragraphs and what is asked about each."""
    return [
        (paragraph["context"], [question["question"] for question in paragraph["qas"]])
        for article in json.loads(path.read_text())["data"]
        for paragraph in article["paragraphs"]
    ]


def _of_squad(name: str, asked: list[tuple[str, list[str]]], written: list[tuple[str, list[str]]]) -> RelevanceSet:
    """The questions of one language about the paragraphs of another, which are in the same order."""
    chunks = [Chunk(id=f"p{n}", text=text) for n, (text, _) in enumerate(written)]
    pairs = [(question, frozenset({f"p{n}"})) for n, (_, questions) in enumerate(asked) for question in questions]
    return RelevanceSet(
        name=name, chunks=chunks, questions=[question for question, _ in pairs], relevant=[found for _, found in pairs]
    )


# TREC's form


def cranfield(folder: Path) -> RelevanceSet:
    """1400 abstracts of aerodynamics and 225 questions of those who work on it, judged by them (Cleverdon 1967).

    Judgements below 1 say that a text is not relevant. Three texts are empty.
    """
    texts = _trec((folder / "cran.all.1400.xml").read_text(), "doc", "docno", "text")
    asked = list(_trec((folder / "cran.qry.xml").read_text(), "top", "num", "title").values())
    judged: dict[str, set[str]] = {}
    for line in (folder / "cranqrel.trec.txt").read_text().splitlines():
        question, _, text, grade = line.split()
        if int(grade) > 0 and text in texts:
            judged.setdefault(question, set()).add(text)
    # Judgements count the questions from 1; the questions' own numbers have gaps.
    judged_ones = [(question, judged[str(n)]) for n, question in enumerate(asked, 1) if str(n) in judged]
    return RelevanceSet(
        name="Cranfield",
        chunks=[Chunk(id=number, text=text) for number, text in texts.items()],
        questions=[question for question, _ in judged_ones],
        relevant=[frozenset(found) for _, found in judged_ones],
    )


def _trec(text: str, item: str, number: str, content: str) -> Mapping[str, str]:
    """Number -> content of each item that has one."""
    found: dict[str, str] = {}
    for part in re.findall(rf"<{item}>(.*?)</{item}>", text, re.DOTALL):
        fields = {name: _one_line(value) for name, value in re.findall(r"<(\w+)>(.*?)</\1>", part, re.DOTALL)}
        if fields.get(content):
            found[fields[number]] = fields[content]
    return found
