"""Text out of PDF and Office files, with where each page begins."""

from __future__ import annotations

import io
import logging
import re
from typing import Any

from modelbus_broker.errors import InvalidRequest, MissingExtra

PDF = frozenset({".pdf"})
OFFICE = frozenset({".docx", ".pptx", ".xlsx"})

_SLIDE = re.compile(r"^<!-- Slide number: \d+ -->\n?", re.MULTILINE)


def text_of_pdf(data: bytes) -> tuple[str, list[int]]:
    """The text of all pages, and the character with which each page begins.

    Raises:
        InvalidRequest: it is damaged or encrypted, or has no text.
        MissingExtra: its reader is not installed.
    """
    try:
        import pypdf
    except ImportError as error:
        raise MissingExtra("PDF files need more packages: pip install 'modelbus[docs]'") from error
    logging.getLogger("pypdf").setLevel(logging.CRITICAL)  # what is wrong is said by the exception
    try:
        reader = pypdf.PdfReader(io.BytesIO(data))
        locked = reader.is_encrypted and not reader.decrypt("")
        pages = [] if locked else [page.extract_text() for page in reader.pages]
    except Exception as error:  # a damaged file can fail anywhere in the library
        raise InvalidRequest(f"it is no PDF that can be read: {type(error).__name__}: {error}") from error
    if locked:
        raise InvalidRequest("it is encrypted: store it without a password")
    text, starts = _joined(pages)
    if not text.strip():
        raise InvalidRequest("it has no text, perhaps only pictures of it")
    return text, starts


def text_of_office(data: bytes, suffix: str) -> tuple[str, list[int]]:
    """A document, slides or a workbook as Markdown, and the character with which each slide begins; else [].

    Raises:
        InvalidRequest: it is damaged.
        MissingExtra: its reader is not installed.
    """
    try:
        from markitdown import StreamInfo, converters
    except ImportError as error:
        raise MissingExtra(f"{suffix} files need more packages: pip install 'modelbus[office]'") from error
    # Its own choice among all its converters would take a damaged file for a text.
    made: dict[str, Any] = {
        ".docx": converters.DocxConverter,
        ".pptx": converters.PptxConverter,
        ".xlsx": converters.XlsxConverter,
    }
    try:
        text: str = made[suffix]().convert(io.BytesIO(data), StreamInfo(extension=suffix)).text_content
    except Exception as error:  # as above
        words = str(error).strip().splitlines()
        raise InvalidRequest(
            f"it is no {suffix} file that can be read: {words[-1] if words else type(error).__name__}"
        ) from error
    if suffix == ".pptx":
        return _joined(_SLIDE.split(text)[1:])
    return text, []


def _joined(pages: list[str]) -> tuple[str, list[int]]:
    text, starts = "", []
    for page in pages:
        starts.append(len(text))
        text += page.replace("\0", "").strip() + "\n\n"
    return text, starts
