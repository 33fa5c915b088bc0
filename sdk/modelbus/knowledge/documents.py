"""The documents of a folder: which files belong to it, and what text is in each."""

from __future__ import annotations

import codecs
import csv
import io
import json
import os
import re
from collections.abc import Collection, Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any, Literal

import msgspec
from modelbus_broker.errors import InvalidRequest

from .formats import OFFICE, PDF, text_of_office, text_of_pdf

#: Changes when the same file gives another text.
READERS = 3
MAX_FILE_BYTES = 100 << 20
#: Rules of files to leave out, in the form of ``.gitignore``.
IGNORE_FILES = (".gitignore", ".serveignore", ".modelbusignore")

MARKDOWN = frozenset({".md", ".markdown", ".mdx"})
HTML = frozenset({".html", ".htm", ".xhtml"})
#: What is read where nobody says which files are wanted: text in the widest sense.
TEXT = frozenset(
    """.txt .text .rst .adoc .org .tex .log .json .jsonl .csv .tsv .yaml .yml .toml .ini .cfg .conf .xml .sql .py .pyi
    .js .jsx .ts .tsx .java .kt .scala .go .rs .c .h .cc .cpp .hpp .cs .rb .php .pl .sh .bash .zsh .ps1 .lua .r .jl .swift
    .m .vue .css .scss .proto .graphql .tf .dockerfile""".split()
)

Kind = Literal["markdown", "text"]


class Document(msgspec.Struct, frozen=True, kw_only=True):
    """The text of a file. Headings of Markdown begin with ``#``; those of HTML were made so."""

    text: str
    kind: Kind
    plain: bool  #: the text is the file's own, so that its lines are the file's
    pages: list[int] = []  #: the character with which each page or slide begins; [] where there are none


def files_of(folder: Path, extensions: Collection[str] = ()) -> Iterator[Path]:
    """The files of a folder and of all below it, sorted; hidden ones and those that an ignore file names are left out.

    Args:
        extensions: only files with these (``.md``); empty: all that can be read.
    """
    import pathspec

    wanted = frozenset(extensions) or MARKDOWN | HTML | TEXT | PDF | OFFICE

    def walk(at: Path, rules: list[tuple[Path, pathspec.PathSpec[Any]]]) -> Iterator[Path]:
        lines = [
            line
            for name in IGNORE_FILES
            if (at / name).is_file()
            for line in (at / name).read_text(errors="replace").splitlines()
        ]
        if lines:
            rules = [*rules, (at, pathspec.PathSpec.from_lines("gitignore", lines))]
        for entry in sorted(os.scandir(at), key=lambda entry: entry.name):
            path = Path(entry.path)
            shown = "/" if entry.is_dir(follow_symlinks=False) else ""
            if entry.name.startswith(".") or any(
                spec.match_file(path.relative_to(base).as_posix() + shown) for base, spec in rules
            ):
                continue
            if entry.is_dir(follow_symlinks=False):
                yield from walk(path, rules)
            elif entry.is_file() and path.suffix.lower() in wanted:
                yield path

    yield from walk(folder, [])


def read(path: Path, data: bytes) -> Document:
    """The text of a file's bytes. Blocking, and long for large PDF files.

    Raises:
        InvalidRequest: it is no text, or damaged; the words are for the one who builds.
        MissingExtra: the reader of its format is not installed.
    """
    check_size(len(data))
    suffix = path.suffix.lower()
    if suffix in PDF:
        text, pages = text_of_pdf(data)
        return Document(text=text, kind="text", plain=False, pages=pages)
    if suffix in OFFICE:
        text, pages = text_of_office(data, suffix)
        return Document(text=text, kind="markdown", plain=False, pages=pages)
    text = decoded(data)
    if suffix in MARKDOWN:
        return Document(text=text, kind="markdown", plain=True)
    if suffix in HTML:
        return Document(text=text_of_html(text), kind="markdown", plain=False)
    if suffix in (".csv", ".tsv"):
        return Document(text=text_of_table(text, "\t" if suffix == ".tsv" else ","), kind="text", plain=False)
    if suffix == ".json":
        return Document(text=text_of_json(text), kind="text", plain=False)
    return Document(text=text, kind="text", plain=True)


def check_size(size: int) -> None:
    """Raises InvalidRequest: a file of so many bytes is not read."""
    if size > MAX_FILE_BYTES:
        raise InvalidRequest(f"it has {size >> 20} MiB, at most {MAX_FILE_BYTES >> 20} are read: split it")


def decoded(data: bytes) -> str:
    """UTF-8, UTF-16 with a mark, the Chinese GB 18030, or the western Windows-1252; line ends as ``\\n``.

    Raises:
        InvalidRequest: none of these.
    """
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        encodings = ["utf-16"]
    else:
        if b"\0" in data[:8192]:
            raise InvalidRequest("it is no text: it has NUL bytes")
        encodings = ["utf-8-sig", "cp1252" if _is_western(data) else "gb18030"]
    for encoding in encodings:
        try:
            return data.decode(encoding).replace("\r\n", "\n").replace("\r", "\n")
        except UnicodeDecodeError:
            continue
    raise InvalidRequest("its encoding is not known: save it as UTF-8")


def _is_western(data: bytes) -> bool:
    """Whether bytes beyond ASCII stand alone, as accents among letters do. A Chinese character has two of them, or four; also GB 18030
    takes an accent and the letter after it for a character, and says nothing."""
    runs = [len(run) for run in re.findall(rb"[\x80-\xff]+", data[: 1 << 20])]
    return runs.count(1) > len(runs) / 2


def text_of_json(text: str) -> str:
    """Indented, with characters as they are, so that it is cut between members."""
    try:
        return json.dumps(json.loads(text), ensure_ascii=False, indent=1)
    except ValueError as error:
        raise InvalidRequest(f"it is no JSON: {error}") from error


def text_of_table(text: str, delimiter: str) -> str:
    """A line for each row, each value behind the name of its column: a row is understood alone."""
    try:
        rows = list(csv.reader(io.StringIO(text), delimiter=delimiter))
    except csv.Error as error:
        raise InvalidRequest(f"it is no table: {error}") from error
    head, *rest = rows or [[]]
    lines = [
        "; ".join(f"{name}: {value}" for name, value in zip(head, row, strict=False) if value.strip()) for row in rest
    ]
    return "\n".join(line for line in lines if line) or delimiter.join(head)


def text_of_html(text: str) -> str:
    """What a reader sees, headings as in Markdown."""
    parser = _Html()
    parser.feed(text)
    parser.close()
    lines = [" ".join(line.split()) for line in "".join(parser.parts).split("\n")]
    return "\n".join(line for at, line in enumerate(lines) if line or (at and lines[at - 1]))


class _Html(HTMLParser):
    _HIDDEN = frozenset({"script", "style", "noscript", "template", "head"})
    _BLOCKS = frozenset(
        "p div section article header footer main aside nav ul ol table tr pre blockquote h1 h2 h3 h4 h5 h6 dl dt dd".split()
    )

    def __init__(self) -> None:
        super().__init__()
        self.parts: list[str] = []
        self._hidden = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in self._HIDDEN:
            self._hidden += 1
        elif tag in self._BLOCKS:
            self.parts.append("\n\n" if tag != "tr" else "\n")
            if len(tag) == 2 and tag[0] == "h" and tag[1] in "123456":
                self.parts.append("#" * int(tag[1]) + " ")
        elif tag in ("br", "li"):
            self.parts.append("\n" if tag == "br" else "\n- ")
        elif tag in ("td", "th"):
            self.parts.append(" ")

    def handle_endtag(self, tag: str) -> None:
        if tag in self._HIDDEN:
            self._hidden = max(0, self._hidden - 1)
        elif tag in self._BLOCKS:
            self.parts.append("\n")

    def handle_data(self, data: str) -> None:
        if not self._hidden:
            self.parts.append(data)
