"""Writes docs/cli.md from the command line's own help; a test compares the two."""

from __future__ import annotations

import os
from pathlib import Path

import click
from modelbus.cli import cli

TARGET = Path(__file__).resolve().parent.parent / "docs" / "cli.md"

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
| 4 | no model of that name |
| 130 | interrupted by Ctrl-C |
"""


def command_line_page() -> str:
    """docs/cli.md as it should be."""
    # The width of the help would be the terminal's.
    os.environ["COLUMNS"] = "100"
    context = click.Context(cli, info_name="modelbus")
    parts = [_HEAD]
    for name in cli.list_commands(context):
        command = cli.get_command(context, name)
        assert command is not None
        help_text = command.get_help(click.Context(command, parent=context, info_name=name, max_content_width=100))
        parts.append(f"## modelbus {name}\n\n```text\n{help_text.rstrip()}\n```\n")
    return "\n".join(parts)


if __name__ == "__main__":
    TARGET.write_text(command_line_page())
