"""docs/api.md: the public names of the SDK with their signatures and docstrings, read from the sources."""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

_HEAD = """# API reference

Written by `make docs` from the docstrings of `sdk/modelbus`: change it there. What is for what stands in the guides:
[the SDK](sdk.md), [prompt functions](prompts.md).
"""
#: The packages whose names come first; a name stands where it is found first.
_FIRST = ("modelbus", "modelbus.prompts", "modelbus.structure", "modelbus.tools", "modelbus.chats", "modelbus.jobs")
_SECTION = re.compile(r"^(Args|Raises|Returns|Yields|Attributes):$")
_ENTRY = re.compile(r"^([\w., *`()]+?):(?: |$)(.*)$")


class _Source(NamedTuple):
    """A definition, and the lines of the file that it stands in."""

    node: ast.stmt
    lines: list[str]


def api_page(root: Path) -> str:
    """docs/api.md as it should be.

    Args:
        root: of the repository.
    """
    written: set[tuple[str, str]] = set()
    parts = [_HEAD]
    found = {f"modelbus.{path.parent.name}" for path in (root / "sdk" / "modelbus").glob("*/__init__.py")}
    for package in [*_FIRST, *sorted(found - set(_FIRST) - {"modelbus.cli"})]:
        module = import_module(package)
        sections = []
        for name in sorted(getattr(module, "__all__", ()), key=lambda name: (name[0].islower(), name.lower())):
            value = getattr(module, name)
            home = getattr(value, "__module__", "") if not inspect.ismodule(value) else ""
            own = getattr(value, "__qualname__", name)
            if not home.startswith("modelbus") or own != name or (home, own) in written:
                continue
            source = _find(home, own)
            if source is None:
                continue
            written.add((home, own))
            sections.append("\n".join(_definition(name, home, source)))
        if sections:
            parts.append(f"## {package}\n\n{_prose(inspect.getdoc(module) or '').split(chr(10))[0]}\n")
            parts += sections
    return "\n".join(parts).rstrip() + "\n"


def _find(module: str, name: str) -> _Source | None:
    """A class or function at the top of a module."""
    text = Path(str(import_module(module).__file__)).read_text()
    for node in ast.parse(text).body:
        if isinstance(node, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)) and node.name == name:
            if not _is_overload(node):
                return _Source(node, text.splitlines())
    return None


def _definition(name: str, home: str, source: _Source) -> Iterator[str]:
    node = source.node
    assert isinstance(node, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef))
    if not isinstance(node, ast.ClassDef):
        yield f"### {name}\n\n```text\n{_signature(node, name)}\n```\n"
        yield _prose(ast.get_docstring(node) or "") + "\n"
        return
    bases = ", ".join(ast.unparse(base) for base in node.bases)
    yield f"### {name}\n\n```text\nclass {name}{f'({bases})' if bases else ''}\n```\n"
    yield _prose(ast.get_docstring(node) or "") + "\n"
    fields = list(_fields(node, source.lines))
    if fields:
        yield "| field | type | |\n|---|---|---|"
        yield from (f"| `{field}` | `{kind}` | {remark} |" for field, kind, remark in fields)
        yield ""
    for member in node.body:
        if isinstance(member, (ast.FunctionDef, ast.AsyncFunctionDef)) and _is_shown(member):
            yield _member(member)


def _member(node: ast.FunctionDef | ast.AsyncFunctionDef) -> str:
    doc = _prose(ast.get_docstring(node) or "")
    if any(ast.unparse(one) in ("property", "functools.cached_property") for one in node.decorator_list):
        shown = f"{node.name}: {ast.unparse(node.returns)}" if node.returns else node.name
        return f"**`{shown}`**\n\n{doc}\n" if doc else f"**`{shown}`**\n"
    return (
        f"```text\n{_signature(node, node.name)}\n```\n\n{doc}\n"
        if doc
        else f"```text\n{_signature(node, node.name)}\n```\n"
    )


def _is_shown(node: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    public = not node.name.startswith("_") or node.name in ("__call__", "__init__")
    documented = bool(ast.get_docstring(node)) or node.name != "__init__"
    return public and documented and not _is_overload(node)


def _is_overload(node: ast.stmt) -> bool:
    decorators = getattr(node, "decorator_list", [])
    return any(ast.unparse(one).split(".")[-1] == "overload" for one in decorators)


def _signature(node: ast.FunctionDef | ast.AsyncFunctionDef, name: str) -> str:
    """On one line, or with a line for each parameter where that would be too long."""
    arguments = node.args
    first = [*arguments.posonlyargs, *arguments.args][:1]
    if first and first[0].arg in ("self", "cls"):
        (arguments.posonlyargs or arguments.args).pop(0)
    made = [ast.unparse(one) for one in node.decorator_list]
    word = "classmethod " if "classmethod" in made else "async " if isinstance(node, ast.AsyncFunctionDef) else ""
    returns = f" -> {ast.unparse(node.returns)}" if node.returns else ""
    shown = f"{word}{name}({ast.unparse(arguments)}){returns}"
    if len(shown) <= 110:
        return shown
    parts = re.split(r", (?=\*{0,2}\w+(?::|=|,|$)|\*,|/)", ast.unparse(arguments))
    return f"{word}{name}(\n" + "".join(f"    {part},\n" for part in parts) + f"){returns}"


def _fields(node: ast.ClassDef, lines: list[str]) -> Iterator[tuple[str, str, str]]:
    """Annotated attributes that the class gives values or remarks (``#:``): those of structs and dataclasses."""
    for member in node.body:
        if not isinstance(member, ast.AnnAssign) or not isinstance(member.target, ast.Name):
            continue
        name = member.target.id
        if name.startswith("_") or ast.unparse(member.annotation).startswith("ClassVar"):
            continue
        remark = lines[(member.end_lineno or member.lineno) - 1].partition("#:")[2].strip()
        above = member.lineno - 2
        while not remark.startswith(" ") and above >= 0 and lines[above].lstrip().startswith("#:"):
            remark = f"{lines[above].lstrip()[2:].strip()} {remark}".strip()
            above -= 1
        kind = ast.unparse(member.annotation)
        if member.value is not None:
            kind += f" = {ast.unparse(member.value)}"
        yield name, kind.replace("|", "\\|"), _inline(remark).replace("|", "\\|")


def _prose(docstring: str) -> str:
    """A docstring as Markdown: sections become lists, roles and double backticks code."""
    lines: list[str] = []
    listing = False
    for line in docstring.splitlines():
        if section := _SECTION.match(line):
            lines += [f"**{section[1]}**", ""]
            listing = True
        elif listing and line.strip():
            indent = len(line) - len(line.lstrip())
            entry = _ENTRY.match(line.strip()) if indent == 4 else None
            if entry:
                lines.append(f"- `{entry[1].strip('`')}`: {_inline(entry[2])}".rstrip())
            else:
                lines.append(f"{'- ' if indent == 4 else '  '}{_inline(line.strip())}")
        else:
            listing = listing and not line.strip()
            lines.append("" if line.strip() == "::" else _inline(line))
    return "\n".join(lines).strip()


def _inline(text: str) -> str:
    text = re.sub(r":\w+:`~?([^`]+)`", r"`\1`", text)
    return text.replace("``", "`")
