from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import click
import pytest
from modelbus.cli.main import cli

ROOT = Path(__file__).resolve().parents[2]


def test_the_page_on_the_command_line_is_what_the_commands_say(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "scripts")
    spec = importlib.util.spec_from_file_location("modelbus_docs_script", ROOT / "scripts" / "docs.py")
    assert spec is not None and spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)

    assert (ROOT / "docs" / "cli.md").read_text() == script.command_line_page(), "run `make docs`"


def test_every_command_line_in_the_pages_has_flags_that_there_are() -> None:
    seen, wrong = 0, list[str]()
    for page in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]:
        for block in re.findall(r"^```(?:bash|sh|text|console)?\n(.*?)^```$", page.read_text(), re.M | re.S):
            for line in block.replace("\\\n", " ").splitlines():
                command: click.Command = cli
                words = line.split("#")[0].split()
                if "modelbus" not in words:
                    continue
                words = words[words.index("modelbus") + 1 :]
                while words and isinstance(command, click.Group):
                    name = words.pop(0)
                    found = command.get_command(click.Context(command), name)
                    if found is None:
                        break
                    command = found
                if page.name == "cli.md" or isinstance(command, click.Group):
                    continue  # that page is made of the commands; a group alone is prose
                known = {name.replace("_", "-") for option in command.params for name in option.opts} | {"--help"}
                given = {word.partition("=")[0].replace("_", "-") for word in words if word.startswith("--")}
                seen += bool(given)
                wrong += [f"{page.name}: {line.strip()}: {flag}" for flag in sorted(given - known)]
    assert wrong == [] and seen > 30
