"""Tables for people, JSON for programs."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from typing import Any

import click
import msgspec


def wants_json(as_json: bool) -> bool:
    """JSON was asked for, or nobody reads this on a terminal."""
    return as_json or not sys.stdout.isatty()


def print_json(value: Any) -> None:
    click.echo(msgspec.json.format(msgspec.json.encode(value), indent=4).decode())


def print_table(title: str, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(*columns, title=title, title_justify="left")
    for row in rows:
        table.add_row(*(str(cell) for cell in row))
    Console().print(table)


def progress(line: str) -> None:
    """One line about what is going on, on stderr, so that stdout stays the result."""
    click.echo(click.style(f"  {line}", dim=True), err=True)
