"""MCP servers as tool sets: processes that are spoken to over their standard streams, and servers over HTTP."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from modelbus_broker.errors import MissingExtra, UpstreamFailed

from ..structure.nodes.base import Retry
from ..structure.schemas import schema_reader
from .functions import Tool
from .toolset import ToolSet

if TYPE_CHECKING:
    from mcp import Client
    from mcp.types import CallToolResult

log = logging.getLogger(__name__)


@asynccontextmanager
async def mcp_stdio(
    command: str,
    *args: str,
    env: Mapping[str, str] | None = None,
    cwd: str | Path | None = None,
    timeout_s: float = 60.0,
) -> AsyncIterator[ToolSet]:
    """The tools of an MCP server that is a program: ``async with mcp_stdio("uvx", "mcp-server-time") as tools``.

    The process is started here and ends with the block. Its standard error is dropped.

    Args:
        env: variables that it gets beyond the harmless ones (PATH, HOME, LANG ...); it does not see the others of this process.
        timeout_s: of the start, and of each call.

    Raises:
        UpstreamFailed: it cannot be started, or is no MCP server.
        MissingExtra: the library ``mcp`` is not installed.
    """
    _library()
    from mcp.client.stdio import StdioServerParameters, stdio_client

    words = f"the MCP server {command!r}"
    parameters = StdioServerParameters(command=command, args=list(args), env=dict(env or {}), cwd=cwd)
    with open(os.devnull, "w") as nothing:  # noqa: ASYNC230  # a device: nothing waits
        async with _tools(stdio_client(parameters, errlog=nothing), words, timeout_s) as tools:
            yield tools


@asynccontextmanager
async def mcp_http(
    url: str, *, headers: Mapping[str, str] | None = None, timeout_s: float = 60.0
) -> AsyncIterator[ToolSet]:
    """The tools of an MCP server at a URL (streamable HTTP): ``async with mcp_http("https://example.com/mcp") as tools``.

    Args:
        headers: of all requests, such as ``Authorization``; they appear in no log and no error.
        timeout_s: of connecting, and of each call.

    Raises:
        UpstreamFailed: it cannot be reached, or is no MCP server.
        MissingExtra: the library ``mcp`` is not installed.
    """
    _library()
    import httpx2
    from mcp.client.streamable_http import streamable_http_client

    # A stream of the server may be silent for long: calls have their own limit.
    timeout = httpx2.Timeout(timeout_s, read=max(timeout_s, 300.0))
    async with httpx2.AsyncClient(headers=dict(headers or {}), timeout=timeout, follow_redirects=False) as http:
        transport = streamable_http_client(url, http_client=http)
        # Without what may be secret in an address.
        parts = urlsplit(url)
        words = f"the MCP server at {parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"
        async with _tools(transport, words, timeout_s) as tools:
            yield tools


@asynccontextmanager
async def _tools(transport: Any, words: str, timeout_s: float) -> AsyncIterator[ToolSet]:
    """The connection belongs to a task of its own: what is raised in the block stays what it is, and the block may end in
    another task than it began in, which the library's own contexts do not allow."""
    connected: asyncio.Future[ToolSet] = asyncio.get_running_loop().create_future()
    ending = asyncio.Event()
    task = asyncio.create_task(_keep(transport, timeout_s, connected, ending), name="mcp-connection")
    try:
        try:
            tools = await connected
        except (Exception, BaseExceptionGroup) as error:
            raise UpstreamFailed(f"{words} cannot be used: {_innermost(error)}") from error
        yield tools
    finally:
        ending.set()
        if not connected.done() or connected.cancelled():
            task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def _keep(transport: Any, timeout_s: float, connected: asyncio.Future[ToolSet], ending: asyncio.Event) -> None:
    """Connects, says what there is, and keeps the connection until it is to end."""
    from mcp import Client

    try:
        async with Client(transport, read_timeout_seconds=timeout_s) as client:
            tools = ToolSet(*(_RemoteTool(client, tool, timeout_s) for tool in await _listed(client)))
            if not connected.done():
                connected.set_result(tools)
            await ending.wait()
    except (Exception, BaseExceptionGroup) as error:
        if not connected.done():
            connected.set_exception(error)
        elif not ending.is_set():
            log.warning("the connection to an MCP server broke: %s", _innermost(error))


async def _listed(client: Client) -> list[Any]:
    """All tools, page by page."""
    page = await client.list_tools()
    found = list(page.tools)
    while page.next_cursor:
        page = await client.list_tools(cursor=page.next_cursor)
        found += page.tools
    return found


class _RemoteTool(Tool[..., Any]):
    """A tool of a server: the server says what it takes, and checks it again."""

    def __init__(self, client: Client, tool: Any, limit_s: float, **changes: Any) -> None:
        self._client, self._remote, self._limit_s, self._changes = client, tool, limit_s, changes
        self.name = changes.get("name") or tool.name
        self.description = changes.get("description") or tool.description or tool.title or ""
        self.timeout_s = changes.get("timeout_s", limit_s)
        self.needs_approval = changes.get("needs_approval", False)
        self.parameters = {"type": "object", "properties": {}, **tool.input_schema}
        self._reader = schema_reader(self.parameters, f"tool {tool.name}")
        self.injected, self.injected_optional = {}, set()
        self.is_async = True
        self.function = self._call

    def with_settings(self, **changes: Any) -> _RemoteTool:
        return _RemoteTool(self._client, self._remote, self._limit_s, **{**self._changes, **changes})

    def read(self, arguments: Any) -> tuple[dict[str, Any], list[str]]:
        problems = self._reader.problems(arguments)
        return ({}, problems) if problems else (dict(arguments), [])

    def bound(self, values: Mapping[str, Any]) -> Callable[[], Any]:
        async def call() -> Any:
            return await self._call(**values)

        return call

    async def _call(self, **arguments: Any) -> Any:
        limit = self.timeout_s or self._limit_s
        result = await self._client.call_tool(self._remote.name, arguments, read_timeout_seconds=limit)
        text = _text(result)
        if result.is_error:
            raise Retry(text or "the tool failed and did not say why")
        said = result.structured_content
        if said is None:
            return text
        # Servers wrap what is no object, because older versions of the protocol know nothing else.
        return said["result"] if isinstance(said, dict) and said.keys() == {"result"} else said


def _text(result: CallToolResult) -> str:
    """What the model can read of a result; of the rest, that it is there."""
    parts = []
    for block in result.content:
        match block.type:
            case "text":
                parts.append(block.text)
            case "resource":
                parts.append(getattr(block.resource, "text", f"[resource {block.resource.uri}]"))
            case "resource_link":
                parts.append(f"[resource {block.uri}]")
            case kind:
                parts.append(f"[{kind}]")
    return "\n".join(parts)


def _innermost(error: BaseException) -> str:
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__


def _library() -> None:
    try:
        import mcp  # noqa: F401
    except ImportError:
        raise MissingExtra("MCP servers need the library mcp: pip install 'modelbus[mcp]'") from None
