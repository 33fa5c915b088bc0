"""Writes what is generated in docs/ again: `make docs`. With --check it only says whether all of it is up to date.

docs/cli.md comes from the command line's own help, docs/api.md and the tables in docs/structure.md from docstrings.
"""

from __future__ import annotations

import ast
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import click
from api_page import api_page
from modelbus.cli import cli

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("broker/modelbus_broker", "sdk/modelbus", "workers/modelbus_workers", "gateway/modelbus_gateway")

_HEAD = """# The command line

Written by `make docs` from the commands' own help: change it there.

Flags may be written with `-` or `_` (`--num_workers`, `--num-workers`); one that takes several values takes them up to
the next flag (`--infer_params saas.api_key=env:KEY saas.model=NAME`). Output is for people on a terminal and JSON when
piped or with `--json`; progress and errors go to standard error.

| exit code | meaning |
|---|---|
| 0 | done |
| 1 | failed |
| 2 | wrong usage, or a value that cannot be |
| 3 | no bus, or nothing runs on this host |
| 4 | no model, request or dead letter of that name |
| 5 | done but for parts of what was given, such as files that cannot be read; they are named |
| 130 | interrupted by Ctrl-C |
"""


def main() -> int:
    check = "--check" in sys.argv[1:]
    stale = [(path, text) for path, text in generated() if path.read_text() != text]
    for path, text in stale:
        if not check:
            path.write_text(text)
        print(f"{path.relative_to(ROOT)} {'is out of date: make docs' if check else 'is written again'}")
    return 1 if stale and check else 0


def generated() -> Iterator[tuple[Path, str]]:
    """The documents with generated parts, as they should be."""
    yield ROOT / "docs" / "cli.md", command_line_page()
    yield ROOT / "docs" / "api.md", api_page(ROOT)
    structure = ROOT / "docs" / "structure.md"
    yield structure, replace(structure.read_text(), "modules", "\n\n".join(module_table(root) for root in PACKAGES))


def command_line_page() -> str:
    """docs/cli.md as it should be."""
    # The width of the help would be the terminal's.
    os.environ["COLUMNS"] = "100"
    return "\n".join([_HEAD, *command_help(cli, click.Context(cli, info_name="modelbus"))])


def command_help(group: click.Group, context: click.Context) -> Iterator[str]:
    """A section for each command, those of a group after the group's own."""
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        assert command is not None
        own = click.Context(command, parent=context, info_name=name, max_content_width=100)
        yield f"## {own.command_path}\n\n```text\n{command.get_help(own).rstrip()}\n```\n"
        if isinstance(command, click.Group):
            yield from command_help(command, own)


def replace(text: str, name: str, part: str) -> str:
    """The text with another part between the comments of that name."""
    begin, end = f"<!-- begin {name} -->", f"<!-- end {name} -->"
    if text.count(begin) != 1 or text.count(end) != 1:
        raise SystemExit(f"the comments {begin} and {end} must be there once each")
    return text[: text.index(begin) + len(begin)] + f"\n{part}\n" + text[text.index(end) :]


def module_table(root: str) -> str:
    """One line per module: the first sentence of its docstring."""
    folder = ROOT / root
    lines = [f"### {root}", "", "| module | what it is for |", "|---|---|"]
    for path in sorted(folder.rglob("*.py"), key=lambda path: (path.parent, path.name)):
        name = path.relative_to(folder).as_posix()
        docstring = ast.get_docstring(ast.parse(path.read_text())) or ""
        if name == "__init__.py" or (not docstring and path.name == "__init__.py"):
            continue
        lines.append(f"| {name} | {remark(docstring)} |")
    return "\n".join(lines)


def remark(docstring: str) -> str:
    """The first sentence."""
    sentence = " ".join(docstring.split("\n\n")[0].split())
    sentence = re.split(r"(?<=[.!?])\s(?=[A-Z`])", sentence)[0]
    return sentence.replace("``", "`").replace("|", "\\|").rstrip(".")


if __name__ == "__main__":
    sys.exit(main())
