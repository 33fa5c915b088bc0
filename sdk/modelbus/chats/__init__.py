"""Conversations that remember, and agents that share one.

| for | use |
|---|---|
| a conversation with a model | ``Chat("chat", system="...", tools=[f]).ask("Hello").answer`` |
| agents that hand a conversation over to each other | ``Team(first, second, llm="chat").run("...")`` |
| agents and people who talk in turns | ``Group(one, other, llm="chat").run("...")`` |
| an agent as a tool of another one | ``agent.as_tool()`` |
"""

from __future__ import annotations

from .agents import Agent, AgentEvent, AgentRun, AgentsEndEvent, HandOffEvent, Respond, Team, TeamEvent
from .chat import Chat, SavedChat
from .group import Choose, Group, GroupRun, Until
from .history import exchanges, fitted

__all__ = [
    "Agent", "AgentEvent", "AgentRun", "AgentsEndEvent", "Chat", "Choose", "Group", "GroupRun", "HandOffEvent", "Respond",
    "SavedChat", "Team", "TeamEvent", "Until", "exchanges", "fitted",
]  # fmt: skip
