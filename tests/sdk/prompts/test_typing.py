"""Type checkers see the declared types: right code passes, and each wrong line is refused, by both of them."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from mypy import api

ROOT = Path(__file__).resolve().parents[3]
TYPED = Path(__file__).with_name("typed")
RIGHT, WRONG = TYPED / "right.py", TYPED / "wrong.py"


def refused(path: Path) -> set[int]:
    """The lines that say so."""
    return {number for number, line in enumerate(path.read_text().splitlines(), 1) if "# refused" in line}


@pytest.mark.timeout(300)
def test_mypy_accepts_the_right_and_refuses_the_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    # Strict as the project is, and what follows from a body without a statement is not the point.
    said, errors, _ = api.run([str(RIGHT), str(WRONG), "--disable-error-code", "empty-body"])

    assert errors == ""
    found = [re.match(r"(.+?):(\d+): error: ", line) for line in said.splitlines()]
    lines = {(Path(match[1]).name, int(match[2])) for match in found if match}
    assert lines == {("wrong.py", line) for line in refused(WRONG)}, said


@pytest.mark.timeout(300)
def test_pyright_accepts_the_right_and_refuses_the_wrong(tmp_path: Path) -> None:
    pytest.importorskip("basedpyright")
    settings = {
        "include": [str(RIGHT), str(WRONG)],
        "extraPaths": [str(ROOT / part) for part in ("broker", "sdk", "workers", "gateway")],
        "typeCheckingMode": "standard",
    }
    (tmp_path / "pyrightconfig.json").write_text(json.dumps(settings))

    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "basedpyright",
            "--outputjson",
            "--project",
            str(tmp_path),
            "--pythonpath",
            sys.executable,
        ],
        capture_output=True,
        text=True,
        timeout=250,
    )

    report = json.loads(done.stdout)
    assert report["summary"]["filesAnalyzed"] == 2, done.stderr
    wrong = [one for one in report["generalDiagnostics"] if one["severity"] == "error"]
    lines = {(Path(one["file"]).name, one["range"]["start"]["line"] + 1) for one in wrong}
    assert lines == {("wrong.py", line) for line in refused(WRONG)}, wrong
