from __future__ import annotations

import importlib.util
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_the_page_on_the_command_line_is_what_the_commands_say() -> None:
    spec = importlib.util.spec_from_file_location("modelbus_docs_script", ROOT / "scripts" / "docs.py")
    assert spec is not None and spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)

    assert (ROOT / "docs" / "cli.md").read_text() == script.command_line_page(), "run `make docs`"
