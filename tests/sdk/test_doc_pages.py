"""The Python examples of the pages on tools, conversations and testing run as they stand there."""

from __future__ import annotations

import asyncio
import json
import re
from pathlib import Path

import modelbus
import pytest
from modelbus.testing import read_script
from modelbus_broker.messages import Deployment

from tests.helpers.cluster import Cluster
from tests.helpers.doc_blocks import DOCS, python_blocks, run_page


def test_the_page_on_testing_is_right() -> None:
    run_page(DOCS / "testing.md")


async def test_the_page_on_tools_is_right(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    await scripted(cluster, monkeypatch)
    names = await asyncio.to_thread(run_page, DOCS / "tools.md")
    assert names["run"].values == [12, 21.5]


async def test_the_page_on_conversations_is_right(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    await scripted(cluster, monkeypatch)
    try:
        names = await asyncio.to_thread(run_page, DOCS / "chats.md")
    finally:
        await asyncio.to_thread(modelbus.disconnect)
    # Each turn is four messages: the model calls its tool once.
    assert (len(names["chat"].messages), len(names["later"].messages)) == (12, 8)


async def scripted(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    """The model ``chat`` on the engine ``scripted``, on the bus that pages connect to."""
    wish = Deployment(
        name="chat", model="chat", engine="scripted", revision="1", engine_params={"text": "a text of five words"}
    )
    await cluster.declare(wish)
    cluster.start_worker(wish)
    await cluster.wait_ready("chat", 1)
    monkeypatch.setenv("MODELBUS_ADDRESS", cluster.settings.url)


def test_the_script_on_the_page_is_one() -> None:
    (text,) = re.findall(r"^```json\n(.*?)^```$", (DOCS / "testing.md").read_text(), re.M | re.S)
    script = read_script(json.dumps(json.loads(text)))
    assert (len(script.rules), len(script.answers), script.otherwise) == (3, 2, "schema")


def test_a_page_that_is_wrong_fails(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("# P\n```python\nx = 1\nprint(x)\n```\n```text\n2\n```\n")
    assert [block.line for block in python_blocks(page)] == [3]
    with pytest.raises(AssertionError, match="line 3"):
        run_page(page)
    page.write_text(
        "```python\nimport asyncio\nawait asyncio.sleep(0)\ny = 1\n```\n<!-- not run -->\n```python\ny = 2\n```\n"
    )
    assert run_page(page)["y"] == 1
    page.write_text("```python\nx = 1 +\n```\n")
    with pytest.raises(SyntaxError):
        run_page(page)
    page.write_text("nothing")
    with pytest.raises(AssertionError, match="no Python example"):
        run_page(page)
