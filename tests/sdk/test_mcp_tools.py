"""The tools of real MCP servers, a process on its standard streams and one over HTTP, called by models."""

from __future__ import annotations

import asyncio
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from modelbus.errors import UpstreamFailed
from modelbus.testing import ScriptedAnswer, ScriptedCall, ScriptedModel
from modelbus.tools import PendingCall, ToolSet, mcp_http, mcp_stdio, run_tools

SERVER = '''
import asyncio, os, sys
from mcp.server.mcpserver import MCPServer
from mcp.server.mcpserver.exceptions import ToolError
from pydantic import BaseModel

server = MCPServer("shop")

class Item(BaseModel):
    name: str
    price: float

@server.tool()
def add(a: int, b: int) -> int:
    """Adds two numbers."""
    return a + b

@server.tool()
def cheapest(items: list[Item]) -> Item:
    return min(items, key=lambda item: item.price)

@server.tool()
def broken(why: str) -> str:
    raise ToolError(why)

@server.tool()
async def slow() -> str:
    await asyncio.sleep(60)
    return "late"

@server.tool()
def variable(name: str) -> str:
    return os.environ.get(name, "unset")

if sys.argv[1:]:
    server.run("streamable-http", host="127.0.0.1", port=int(sys.argv[1]))
else:
    server.run()
'''


@pytest.fixture(scope="module")
def script(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("mcp") / "shop.py"
    path.write_text(SERVER)
    return path


def model(*calls: tuple[str, dict[str, object]]) -> ScriptedModel:
    return ScriptedModel(
        ScriptedAnswer(tool_calls=[ScriptedCall(name=name, arguments=arguments) for name, arguments in calls]), "done"
    )


async def check(tools: ToolSet) -> None:
    """What both kinds of server owe."""
    assert tools.names == ["add", "cheapest", "broken", "slow", "variable"]
    assert tools["add"].description == "Adds two numbers."
    assert tools["add"].parameters["required"] == ["a", "b"]
    items = [{"name": "x", "price": 2}, {"name": "y", "price": 1.5}]
    asks = model(
        ("add", {"a": 2, "b": 3}), ("cheapest", {"items": items}), ("broken", {"why": "no stock"}), ("slow", {}), ("add", {"a": "two", "b": 1}),
    )  # fmt: skip
    quick = ToolSet(tools["slow"].with_settings(timeout_s=0.3), tools.only("add", "cheapest", "broken"))

    run = await run_tools(asks, "m", "go", quick)

    assert run.values == [5, {"name": "y", "price": 1.5}] and run.answer == "done"
    assert [outcome.failure for outcome in run.calls] == ["", "", "failed", "timeout", "bad_arguments"]
    assert "no stock" in run.calls[2].text and "integer" in run.calls[4].text

    def refuse(pending: PendingCall) -> str:
        return f"never {pending.tool.name}"

    refused = await run_tools(model(("s_add", {"a": 1, "b": 1})), "m", "go", tools.prefixed("s_"), approve=refuse)
    assert refused.calls[0].text == "Error: never s_add"


async def test_a_server_that_is_a_process(script: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHOP_SECRET", "hidden")
    async with mcp_stdio(sys.executable, str(script), env={"SHOP_NAME": "corner"}) as tools:
        await check(tools)
        run = await run_tools(
            model(("variable", {"name": "SHOP_SECRET"}), ("variable", {"name": "SHOP_NAME"})), "m", "go", tools
        )

    assert run.values == ["unset", "corner"], "it sees the variables that it is given, and no others"


@pytest.fixture
async def url(script: Path, unused_tcp_port: int) -> AsyncIterator[str]:
    process = subprocess.Popen([sys.executable, script, str(unused_tcp_port)], stderr=subprocess.DEVNULL)
    end = time.monotonic() + 60
    try:
        while True:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", unused_tcp_port)) == 0:
                    break
            assert process.poll() is None and time.monotonic() < end
            await asyncio.sleep(0.05)
        yield f"http://127.0.0.1:{unused_tcp_port}/mcp"
    finally:
        process.terminate()
        process.wait(20)


async def test_a_server_over_http(url: str) -> None:
    async with mcp_http(url, headers={"Authorization": "Bearer x"}) as tools:
        await check(tools)


async def test_what_is_no_server_is_an_error_with_words(unused_tcp_port: int) -> None:
    with pytest.raises(UpstreamFailed, match="the MCP server 'no-such-program' cannot be used"):
        async with mcp_stdio("no-such-program"):
            pass
    with pytest.raises(UpstreamFailed, match="cannot be used") as error:
        async with mcp_http(f"http://me:secret@127.0.0.1:{unused_tcp_port}/mcp?key=hidden", timeout_s=5):
            pass
    assert "secret" not in str(error.value) and "hidden" not in str(error.value)
    with pytest.raises(UpstreamFailed, match="cannot be used"):
        async with mcp_stdio(sys.executable, "-c", "raise SystemExit(3)", timeout_s=5):
            pass
