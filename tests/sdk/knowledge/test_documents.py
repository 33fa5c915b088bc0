"""Files of a folder, their texts and their chunks."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path
from typing import Literal

import pytest
from modelbus.errors import InvalidRequest
from modelbus.knowledge.chunking import BLOCK, ChunkSettings, blocks, chunks_of
from modelbus.knowledge.documents import MAX_FILE_BYTES, Document, files_of, read

openpyxl = pytest.importorskip("openpyxl")
pptx = pytest.importorskip("pptx")
pytest.importorskip("markitdown")
pytest.importorskip("pypdf")


def test_a_folder_gives_its_texts_without_what_is_hidden_or_ignored(tmp_path: Path) -> None:
    for name in (
        "b.md",
        "a.txt",
        "code/x.py",
        "code/x.pyc",
        "code/.hidden.py",
        ".git/config.txt",
        "build/out.md",
        "keep/no.txt",
    ):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("x")
    (tmp_path / ".gitignore").write_text("build/\n")
    (tmp_path / "keep" / ".serveignore").write_text("*.txt\n!yes.txt\n")
    (tmp_path / "keep" / "yes.txt").write_text("x")
    (tmp_path / "loop").symlink_to(tmp_path)

    def found(*extensions: str) -> list[str]:
        return [path.relative_to(tmp_path).as_posix() for path in files_of(tmp_path, extensions)]

    assert found() == ["a.txt", "b.md", "code/x.py", "keep/yes.txt"]
    assert found(".md") == ["b.md"]


@pytest.mark.parametrize(
    ("name", "data", "text"),
    [
        ("a.md", "\ufeff# 标题\r\ntext".encode(), "# 标题\ntext"),
        ("a.txt", "你好，世界".encode("gb18030"), "你好，世界"),
        ("a.txt", "用 modelbus 部署一个模型。\nGPU 不够，請等待".encode("gb18030"), "用 modelbus 部署一个模型。\nGPU 不够，請等待"),
        ("a.txt", "Die Bremse – für große Züge".encode("cp1252"), "Die Bremse – für große Züge"),
        ("a.txt", "hello 你好".encode("utf-16"), "hello 你好"),
        ("a.txt", b"", ""),
        ("a.json", '{"a": ["ü"]}'.encode(), '{\n "a": [\n  "ü"\n ]\n}'),
        ("a.csv", b'name,age\nAda,36\n"Grace, H.",\n', "name: Ada; age: 36\nname: Grace, H."),
        ("a.tsv", b"a\tb\n", "a\tb"),
        (
            "a.html",
            b"<html><head><title>no</title></head><body><h2>Setup &amp; run</h2><script>no()</script><p>one<br>two</p>"
            b"<ul><li>three</li></ul></body>",
            "## Setup & run\n\none\ntwo\n\n- three\n",
        ),
    ],
)  # fmt: skip
def test_a_file_gives_its_text(name: str, data: bytes, text: str) -> None:
    assert read(Path(name), data).text == text


@pytest.mark.parametrize(
    ("name", "data", "words"),
    [
        ("a.txt", b"\x7fELF\0\0", "no text"),
        ("a.json", b"{", "no JSON"),
        ("a.txt", b"\xff\xff\xff", "encoding is not known"),
        ("a.txt", b"x" * (MAX_FILE_BYTES + 1), "100 MiB, at most 100"),
    ],
    ids=["binary", "json", "encoding", "size"],
)
def test_what_is_no_text_says_why(name: str, data: bytes, words: str) -> None:
    with pytest.raises(InvalidRequest, match=words):
        read(Path(name), data)


def pdf_of(*pages: str) -> bytes:
    """A PDF with a line of text on each page."""
    objects = [b"<< /Type /Catalog /Pages 2 0 R >>", b"", b"<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica >>"]
    kids = []
    for page in pages:
        content = f"BT /F1 12 Tf 50 700 Td ({page}) Tj ET".encode()
        objects.append(b"<< /Length %d >>\nstream\n%b\nendstream" % (len(content), content))
        objects.append(
            b"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 600 800] /Contents %d 0 R "
            b"/Resources << /Font << /F1 3 0 R >> >> >>" % len(objects)
        )
        kids.append(b"%d 0 R" % len(objects))
    objects[1] = b"<< /Type /Pages /Kids [%b] /Count %d >>" % (b" ".join(kids), len(kids))
    out = io.BytesIO(b"%PDF-1.4\n")
    out.seek(0, io.SEEK_END)
    places = []
    for number, body in enumerate(objects, 1):
        places.append(out.tell())
        out.write(b"%d 0 obj\n%b\nendobj\n" % (number, body))
    start = out.tell()
    out.write(b"xref\n0 %d\n0000000000 65535 f \n" % (len(objects) + 1))
    for place in places:
        out.write(b"%010d 00000 n \n" % place)
    out.write(b"trailer << /Size %d /Root 1 0 R >>\nstartxref\n%d\n%%%%EOF" % (len(objects) + 1, start))
    return out.getvalue()


def test_a_pdf_has_pages_and_a_damaged_one_says_so() -> None:
    document = read(Path("a.pdf"), pdf_of("The bus keeps requests", "Workers pull them " + "again " * 200))
    chunks = chunks_of(document, "a.pdf", ChunkSettings())
    assert "The bus keeps" in chunks[0].text and chunks[0].attributes == {"page": 1}
    assert chunks[-1].attributes == {"page": 2}
    for data, words in (
        (b"%PDF-1.4 and then nothing", "no PDF that can be read"),
        (pdf_of(""), "no text, perhaps only pictures"),
    ):
        with pytest.raises(InvalidRequest, match=words):
            read(Path("a.pdf"), data)


def test_slides_and_workbooks_become_text(tmp_path: Path) -> None:
    book = openpyxl.Workbook()
    book.active.append(["host", "port"])
    book.active.append(["one", 4222])
    book.save(tmp_path / "a.xlsx")
    assert "| one | 4222 |" in read(Path("a.xlsx"), (tmp_path / "a.xlsx").read_bytes()).text
    slides = pptx.Presentation()
    for title in ("First slide", "Second slide"):
        slides.slides.add_slide(slides.slide_layouts[5]).shapes.title.text = title
    slides.save(tmp_path / "a.pptx")
    shown = read(Path("a.pptx"), (tmp_path / "a.pptx").read_bytes())
    assert len(shown.pages) == 2 and shown.text.index("Second slide") > shown.pages[1] > shown.text.index("First slide")
    for name in ("a.docx", "a.xlsx", "a.pptx"):
        with pytest.raises(InvalidRequest, match=f"{name[1:]} file that can be read"):
            read(Path(name), b"no zip")


def test_a_text_document_of_an_office_becomes_markdown() -> None:
    """The least that a .docx has: a heading and a paragraph."""
    body = (
        '<w:p><w:pPr><w:pStyle w:val="Heading1"/></w:pPr><w:r><w:t>Guide</w:t></w:r></w:p>'
        "<w:p><w:r><w:t>The bus keeps requests.</w:t></w:r></w:p>"
    )
    main = "application/vnd.openxmlformats-officedocument.wordprocessingml.document.main+xml"
    office = "http://schemas.openxmlformats.org/officeDocument/2006/relationships/officeDocument"
    parts = {
        "[Content_Types].xml": '<Types xmlns="http://schemas.openxmlformats.org/package/2006/content-types">'
        '<Default Extension="rels" ContentType="application/vnd.openxmlformats-package.relationships+xml"/>'
        f'<Override PartName="/word/document.xml" ContentType="{main}"/></Types>',
        "_rels/.rels": '<Relationships xmlns="http://schemas.openxmlformats.org/package/2006/relationships">'
        f'<Relationship Id="r1" Type="{office}" Target="word/document.xml"/></Relationships>',
        "word/document.xml": '<w:document xmlns:w="http://schemas.openxmlformats.org/wordprocessingml/2006/main">'
        f"<w:body>{body}</w:body></w:document>",
    }
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, text in parts.items():
            archive.writestr(name, text)
    (chunk,) = chunks_of(read(Path("a.docx"), file.getvalue()), "a.docx", ChunkSettings())
    assert chunk.text.split() == ["#", "Guide", "The", "bus", "keeps", "requests."] and chunk.title == "Guide"


def test_chunks_carry_headings_lines_and_offsets_and_unchanged_ones_keep_their_ids() -> None:
    text = (
        "# Guide\n\nIntro.\n\n## Install\n\n"
        + "Do this. " * 40
        + "\n\n```\n# no heading\n```\n\n## Run\n\n"
        + "运行它。" * 60
    )
    document = Document(text=text, kind="markdown", plain=True)
    settings = ChunkSettings(size=200, most=300, overlap=20)

    chunks = chunks_of(document, "f.md", settings)
    changed = chunks_of(Document(text="New.\n\n" + text, kind="markdown", plain=True), "f.md", settings)

    assert all(chunk.text == text[chunk.start : chunk.end] and len(chunk.text) <= 300 for chunk in chunks)
    assert [chunk.ordinal for chunk in chunks] == list(range(len(chunks)))
    assert {chunk.title for chunk in chunks} == {"Guide", "Guide > Install", "Guide > Run"}
    assert (chunks[0].attributes["line"], chunks[-1].attributes["last_line"]) == (1, text.count("\n") + 1)
    assert len({chunk.id for chunk in chunks}) == len(chunks)
    kept = {chunk.id for chunk in chunks} & {chunk.id for chunk in changed}
    assert len(kept) >= len(chunks) - 2
    assert chunks_of(Document(text="", kind="text", plain=True), "f", settings) == []
    same = chunks_of(Document(text="again\n" * 400, kind="text", plain=True), "f", settings)
    assert len({chunk.id for chunk in same}) == len(same) > 3


@pytest.mark.parametrize("kind", ["markdown", "text"])
def test_a_long_text_is_cut_in_blocks_that_lose_nothing(kind: Literal["markdown", "text"]) -> None:
    # A line of 4 MB: as one block it took minutes.
    text = (
        "word " * 800_000 if kind == "text" else "".join(f"# Part {n}\n\n{'运行它 now. ' * 90}\n\n" for n in range(400))
    )
    chunks = chunks_of(Document(text=text, kind=kind, plain=True), "f", ChunkSettings())

    pieces = list(blocks(text))
    assert "".join(piece for _, piece in pieces) == text and max(len(piece) for _, piece in pieces) <= BLOCK
    assert all(text[start : start + len(piece)] == piece for start, piece in pieces) and len(pieces) > 5
    assert all(text[chunk.start : chunk.end] == chunk.text for chunk in chunks)
    gaps = [text[one.end : other.start] for one, other in zip(chunks, chunks[1:], strict=False)]
    assert not "".join(gaps).strip() and not text[chunks[-1].end :].strip() and chunks[0].start == 0
    assert len({chunk.id for chunk in chunks}) == len(chunks)
    if kind == "markdown":
        assert all(piece.startswith("# Part") for _, piece in pieces)
        at = text.index("# Part 399")
        assert chunks[-1].title == "Part 399" and chunks[-1].start >= at
        assert chunks[-1].attributes["last_line"] == text.rstrip().count("\n") + 1
    assert [piece for _, piece in blocks("x" * (2 * BLOCK + 1))] == ["x" * BLOCK, "x" * BLOCK, "x"]
    assert list(blocks("")) == [(0, "")]
