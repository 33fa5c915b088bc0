"""The commands of the document that this project is built from."""

from __future__ import annotations

import os
import re
import shlex
from pathlib import Path

#: Our copy of them.
COPY = Path(__file__).parents[1] / "system" / "seed_commands.md"
#: The commands that belong to this part; installing and the store are other parts.
_OURS = re.compile(r"byzerllm (deploy|query|stat|serve|undeploy)\b|ray start --head")


def document() -> Path:
    """The document itself where it is, else our copy of its commands."""
    named = os.environ.get("MODELBUS_SEED_DOCUMENT")
    beside = Path(__file__).resolve().parents[3] / "shared" / "seed-document.md"
    return Path(named) if named else beside if beside.exists() else COPY


def doc_command(name: str) -> list[str]:
    """The arguments of the document's ``auto-coder doc <name>``, which is ``modelbus doc <name>`` here."""
    found = re.search(rf"```bash\nauto-coder (doc {name} .*?)```", document().read_text(), re.DOTALL)
    assert found is not None
    return shlex.split(re.sub(r"\\\n", " ", found[1]))


def commands(text: str) -> list[str]:
    """The commands in its bash blocks, in order; a backslash goes on in the next line."""
    blocks = re.findall(r"```bash\n(.*?)```", text, re.DOTALL)
    joined = (line for block in blocks for line in re.sub(r"\\\n", " ", block).splitlines())
    return [line.strip() for line in joined if _OURS.match(line.strip())]
