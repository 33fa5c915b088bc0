"""Runs the Python blocks of a page of docs/, as a reader would: one after the other, in one namespace.

A block may use ``await`` at its top level. What it prints is compared with a ``text`` block that directly follows it.
A block after the line ``<!-- not run -->`` is only compiled.
"""

from __future__ import annotations

import ast
import asyncio
import contextlib
import inspect
import io
import linecache
import re
import sys
import types
from pathlib import Path
from typing import Any, NamedTuple

DOCS = Path(__file__).resolve().parents[2] / "docs"
_FENCED = re.compile(
    r"(?P<skip><!-- not run -->\n+)?^```python\n(?P<code>.*?)^```$(?:\n+^```text\n(?P<output>.*?)^```$)?", re.M | re.S
)


class Block(NamedTuple):
    """One example of a page."""

    line: int  #: of its first line of code in the page, from 1
    code: str
    output: str | None  #: what it must print; None: anything
    run: bool


def python_blocks(page: Path) -> list[Block]:
    """The examples of a page, in order."""
    text = page.read_text()
    return [
        Block(
            line=text.count("\n", 0, match.start("code")) + 1,
            code=match["code"],
            output=match["output"],
            run=match["skip"] is None,
        )
        for match in _FENCED.finditer(text)
    ]


def run_page(page: Path, **names: Any) -> dict[str, Any]:
    """Runs all blocks of a page; call it where no event loop runs (``await asyncio.to_thread(run_page, page)``).

    Args:
        names: what the page takes for granted, such as ``client``.

    Returns:
        The names that the page has made, for assertions.

    Raises:
        AssertionError: a block printed something else than the page says, or there is no block at all.
        Exception: what a block raises; its traceback shows the lines of the page.
    """
    blocks = python_blocks(page)
    assert blocks, f"{page.name} has no Python example"
    # A module of its own, because annotations and pickles look their names up there, and sources by its file.
    module = types.ModuleType(f"docs_{re.sub(r'[^a-zA-Z0-9]', '_', page.stem)}")
    module.__dict__.update(names)
    module.__file__ = f"<{page.name}>"
    sys.modules[module.__name__] = module
    with asyncio.Runner() as runner:
        try:
            for block in blocks:
                _run(block, module, runner)
        finally:
            sys.modules.pop(module.__name__, None)
    return module.__dict__


def _run(block: Block, module: types.ModuleType, runner: asyncio.Runner) -> None:
    filename = f"{module.__file__}:{block.line}"
    source = "\n" * (block.line - 1) + block.code
    linecache.cache[filename] = (len(source), None, source.splitlines(keepends=True), filename)
    flags = ast.PyCF_ALLOW_TOP_LEVEL_AWAIT
    compiled = compile(source, filename, "exec", flags=flags, dont_inherit=True)
    if not block.run:
        return
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        if compiled.co_flags & inspect.CO_COROUTINE:
            runner.run(_awaited(compiled, module))
        else:
            exec(compiled, module.__dict__)  # these are examples of our own documents
    if block.output is not None:
        assert printed.getvalue().strip() == block.output.strip(), f"line {block.line} of {module.__file__}"


async def _awaited(compiled: types.CodeType, module: types.ModuleType) -> None:
    await eval(compiled, module.__dict__)
