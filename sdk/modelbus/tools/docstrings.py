"""Docstrings of tools: what the function does, and what its parameters mean, in the styles of Google, numpy and Sphinx."""

from __future__ import annotations

import inspect
import re
from typing import NamedTuple

_GOOGLE = re.compile(r"^(Args|Arguments|Parameters|Params|Keyword Args|Keyword Arguments|Other Parameters)\s*:\s*$")
#: Sections that end the description, or those of parameters.
_OTHER = re.compile(
    r"^(Returns?|Raises?|Yields?|Examples?|Notes?|Warnings?|Warns|See Also|References|Attributes|Todo|Receives)\s*:\s*$"
)
_GOOGLE_ENTRY = re.compile(r"^\*{0,2}(\w+)\s*(?:\([^)]*\))?\s*:\s*(.*)$")
_NUMPY_ENTRY = re.compile(r"^\*{0,2}(\w+(?:\s*,\s*\*{0,2}\w+)*)\s*(?::.*)?$")
_SPHINX = re.compile(r"^\s*:(?:param|parameter|arg|argument|key|keyword)\s+(?:[^:]*\s)?\*{0,2}(\w+)\s*:\s*(.*)$")
_SPHINX_OTHER = re.compile(r"^\s*:(?:type|returns?|rtype|raises?|except|exception|yields?|var|ivar|meta)\b[^:]*:")


class Docstring(NamedTuple):
    """What a docstring says of a function."""

    text: str  #: without the sections about parameters, results and errors
    parameters: dict[str, str]


def read_docstring(doc: str | None) -> Docstring:
    """The parts of a docstring; what is in no known style is text."""
    lines = inspect.cleandoc(doc or "").splitlines()
    text: list[str] = []
    parameters: dict[str, str] = {}
    at = 0
    while at < len(lines):
        line = lines[at]
        underlined = at + 1 < len(lines) and re.fullmatch(r"-{3,}\s*", lines[at + 1]) is not None
        if _SPHINX.match(line) or _SPHINX_OTHER.match(line):
            at = _sphinx(lines, at, parameters)
        elif underlined:
            section, at = _section(lines, at + 2, numpy=True)
            if line.strip() in ("Parameters", "Other Parameters"):
                _entries(section, _NUMPY_ENTRY, parameters)
        elif _GOOGLE.match(line):
            section, at = _section(lines, at + 1, numpy=False)
            _entries(section, _GOOGLE_ENTRY, parameters)
        elif _OTHER.match(line):
            _, at = _section(lines, at + 1, numpy=False)
        else:
            text.append(line)
            at += 1
    return Docstring("\n".join(text).strip(), parameters)


def _section(lines: list[str], start: int, *, numpy: bool) -> tuple[list[str], int]:
    """The lines of a section, and where it ends: Google's are indented, numpy's go on to the next underlined line."""
    at = start
    while at < len(lines):
        line = lines[at]
        if numpy and at + 1 < len(lines) and re.fullmatch(r"-{3,}\s*", lines[at + 1]):
            break
        if not numpy and line.strip() and not line[0].isspace():
            break
        at += 1
    return lines[start:at], at


def _entries(section: list[str], form: re.Pattern[str], parameters: dict[str, str]) -> None:
    """Entries stand at the section's own indentation, and what they say further on is indented more."""
    filled = [line for line in section if line.strip()]
    if not filled:
        return
    indent = len(filled[0]) - len(filled[0].lstrip())
    names: list[str] = []
    for line in filled:
        match = form.match(line.strip()) if len(line) - len(line.lstrip()) <= indent else None
        if match:
            names = [name.strip(" *") for name in match[1].split(",")]
            first = match[2] if form.groups > 1 else ""
            parameters.update(dict.fromkeys(names, first.strip()))
        else:
            for name in names:
                parameters[name] = f"{parameters[name]} {line.strip()}".strip()


def _sphinx(lines: list[str], start: int, parameters: dict[str, str]) -> int:
    """Reads one field and the lines that go on with it."""
    match = _SPHINX.match(lines[start])
    name, words = (match[1], [match[2].strip()]) if match else ("", [])
    at = start + 1
    while at < len(lines) and lines[at].strip() and lines[at][0].isspace() and not lines[at].lstrip().startswith(":"):
        words.append(lines[at].strip())
        at += 1
    if name:
        parameters[name] = " ".join(word for word in words if word)
    return at
