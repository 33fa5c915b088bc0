"""Functions that models call: plain Python functions, with any model.

| for | use |
|---|---|
| a conversation in which the model may call functions | ``await run_tools(client, "chat", "...", [f, g])`` |
| the same, event by event | ``tool_events(...)`` |
| settings of a tool: name, time limit, approval | ``@tool(timeout_s=5, needs_approval=True)`` |
| what the model shall not give | ``db: Injected[Database]`` and ``inject={"db": ...}`` |
| several tools under their names | ``ToolSet(f, g)`` |
| the tools of an MCP server | ``mcp_stdio(...)``, ``mcp_http(...)`` |
"""

from __future__ import annotations

from modelbus_broker.errors import TooManyRounds

from ..structure.nodes.base import Retry
from .calling import Approve, Caller, PendingCall, ToolOutcome, as_text
from .events import CallsEvent, EndEvent, OutcomeEvent, RoundEvent, TextEvent, ToolEvent, ToolRun
from .functions import Injected, Tool, ToolContext, tool
from .mcp import mcp_http, mcp_stdio
from .running import Tools, run_tools, tool_events
from .toolset import ToolLike, ToolSet

__all__ = [
    "Approve", "Caller", "CallsEvent", "EndEvent", "Injected", "OutcomeEvent", "PendingCall", "Retry", "RoundEvent", "TextEvent",
    "TooManyRounds", "Tool", "ToolContext", "ToolEvent", "ToolLike", "ToolOutcome", "ToolRun", "ToolSet", "Tools", "as_text",
    "mcp_http", "mcp_stdio", "run_tools", "tool", "tool_events",
]  # fmt: skip
