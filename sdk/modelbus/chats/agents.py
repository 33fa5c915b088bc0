"""Agents: a model with instructions and tools under a name. They hand a conversation over to each other, or use each other as tools."""

from __future__ import annotations

import inspect
import re
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from contextlib import aclosing
from typing import Any

import msgspec
from modelbus_broker.errors import ConfigurationError, InvalidRequest, TooManyRounds
from modelbus_broker.messages import ChatMessage, Usage

from ..model_client import Messages, ModelClient, chat_task
from ..prompts.llm import Model, refuse_in_loop, target_of
from ..shared import background
from ..structure import OutputType, output_type
from ..structure.replies import summed
from ..tools import (
    Approve,
    EndEvent,
    Injected,
    OutcomeEvent,
    RoundEvent,
    TextEvent,
    Tool,
    ToolContext,
    ToolEvent,
    ToolOutcome,
    ToolRun,
    ToolSet,
    tool_events,
)
from ..tools.toolset import ToolLike

#: Answers in place of a model: a person at a console, a program, another library. It gets the conversation.
Respond = Callable[[Sequence[ChatMessage]], str | Awaitable[str]]

_NAME = re.compile(r"[A-Za-z0-9_-]{1,48}")


class Agent:
    """Who takes part in a conversation. It has no state, so one agent may take part in many at once.

    Attributes:
        name: others know it by this.
        description: what others are told of it; the beginning of its instructions if it is not given.
    """

    def __init__(
        self,
        name: str,
        instructions: str = "",
        *,
        llm: Model | None = None,
        model: str = "",
        description: str = "",
        tools: Sequence[ToolLike | ToolSet] = (),
        handoffs: Sequence[Agent] = (),
        output: Any = None,
        respond: Respond | None = None,
        **sampling: Any,
    ) -> None:
        """
        Args:
            instructions: its system turn.
            llm: whom it asks; None: whom the others of its team ask.
            tools: functions that it may call.
            handoffs: agents that it may hand the conversation over to; more can be added with :meth:`may_hand_over_to`.
            output: the form of its answer: any type that a prompt function may return.
            respond: answers in place of a model.
            sampling: of its requests.

        Raises:
            InvalidRequest: the name cannot be part of a tool's name, or a tool makes no sense.
        """
        if not _NAME.fullmatch(name):
            raise InvalidRequest(f"{name!r} is no name for an agent: at most 48 letters, digits, _ and -", param="name")
        self.name = name
        self.instructions = instructions
        self.description = description or instructions.strip().partition("\n")[0]
        self.tools = ToolSet(tools)
        self.handoffs = list(handoffs)
        self.output: OutputType[Any] | None = output
        if output is not None and not isinstance(output, OutputType):
            self.output = output_type(output)
        self.respond = respond
        self.sampling: Mapping[str, Any] = sampling
        self._llm, self._model = llm, model

    def __repr__(self) -> str:
        return f"<agent {self.name}>"

    def may_hand_over_to(self, *agents: Agent) -> Agent:
        """Adds agents, for those that know each other; returns itself."""
        self.handoffs += [agent for agent in agents if agent not in self.handoffs]
        return self

    async def client(self, llm: Model | None, model: str = "") -> tuple[ModelClient, str]:
        """Whom it asks: its own ``llm``, else this one.

        Raises:
            ConfigurationError: neither is there.
        """
        own = self._llm is not None or bool(self._model)
        target = target_of(self._llm, self._model, ()) if own else target_of(llm, model, ())
        if target is None:
            raise ConfigurationError(f"agent {self.name} has no model: give it llm='chat', or its team")
        return await target.here(), target.model

    def opening(self) -> list[ChatMessage]:
        """Its instructions as the first turn."""
        return [ChatMessage(role="system", content=self.instructions)] if self.instructions else []

    def as_tool(self, *, name: str = "", description: str = "") -> Tool[..., Any]:
        """A tool that asks this agent a question, in a conversation of its own, and gives its answer."""

        async def ask(question: str, context: Injected[ToolContext]) -> Any:
            run = await Team(self, llm=context.client, model=context.model).aio_run(question)
            return run.value

        return Tool(
            ask, name=name or f"ask_{self.name}", description=description or f"Asks {self.name}: {self.description}"
        )  # fmt: skip


class AgentRun(msgspec.Struct, frozen=True, kw_only=True):
    """A conversation that agents have had."""

    agent: Agent  #: who gave the answer
    answer: str = ""
    value: Any = None  #: in the form of the agent's ``output``; else the text
    messages: list[ChatMessage] = []  #: the whole conversation, without instructions; ``name`` says which agent spoke
    path: list[str] = []  #: names of the agents that had it, in order
    calls: list[ToolOutcome] = []
    usage: Usage = Usage()


class HandOffEvent(msgspec.Struct, frozen=True, kw_only=True):
    """Another agent has the conversation now."""

    agent: Agent
    by: Agent
    reason: str


class AgentEvent(msgspec.Struct, frozen=True, kw_only=True):
    """What happens while an agent has the conversation."""

    agent: Agent
    event: ToolEvent


class AgentsEndEvent(msgspec.Struct, frozen=True, kw_only=True):
    """The last event."""

    run: AgentRun


TeamEvent = AgentEvent | HandOffEvent | AgentsEndEvent


class Team:
    """Agents of which one has the conversation at a time. The first one begins; an agent hands over by calling a tool that it
    gets for each of its ``handoffs``. All of them see all that was said, and each is told its own instructions only."""

    def __init__(
        self,
        *agents: Agent,
        llm: Model | None = None,
        model: str = "",
        max_handoffs: int = 8,
        max_rounds: int = 8,
        approve: Approve | None = None,
        inject: Mapping[str, Any] | None = None,
    ) -> None:
        """
        Args:
            llm: whom the agents ask that name nobody.
            max_handoffs: one more ends the run with ``TooManyRounds``.
            max_rounds: rounds of calls that each agent may have, each time it has the conversation.
            approve, inject: see :func:`modelbus.tools.run_tools`.

        Raises:
            InvalidRequest: there is no agent, or two have the same name.
        """
        if not agents:
            raise InvalidRequest("a team has at least one agent", param="agents")
        self.first = agents[0]
        _check_names(agents)
        self._llm, self._model = llm, model
        self._max_handoffs, self._max_rounds = max_handoffs, max_rounds
        self._approve, self._inject = approve, inject

    def run(self, messages: Messages, *, first: Agent | None = None) -> AgentRun:
        """The agents' answer to a conversation; ``first`` begins, such as the one that answered last.

        Raises:
            PromptError: an event loop runs in this thread: use ``aio_run``.
            TooManyRounds: they hand over, or call tools, without end.
            ModelBusError: what asking raises.
        """
        refuse_in_loop("Team.run")
        return background.run(self.aio_run(messages, first=first))

    async def aio_run(self, messages: Messages, *, first: Agent | None = None) -> AgentRun:
        """As :meth:`run`, for asyncio programs."""
        events = self.aio_events(messages, first=first, stream=False)
        async with aclosing(events):
            async for event in events:
                if isinstance(event, AgentsEndEvent):
                    return event.run
        raise AssertionError("the last event is the end")

    async def aio_events(
        self, messages: Messages, *, first: Agent | None = None, stream: bool = True
    ) -> AsyncGenerator[TeamEvent, None]:
        """The same, event by event; the last is ``AgentsEndEvent``. Close it (``aclosing``) if you leave early."""
        agent = first or self.first
        said = chat_task(messages, {}).messages
        path, usages, calls = [agent.name], list[Usage](), list[ToolOutcome]()
        while True:
            taken: list[tuple[Agent, str]] = []
            tools = ToolSet(agent.tools, [_handoff(agent, to, taken) for to in agent.handoffs])
            client, model = (None, "") if agent.respond else await agent.client(self._llm, self._model)
            asking = self._turn(agent, client, model, said, tools, stream)
            opening = len(agent.opening())
            run = None
            async with aclosing(asking):
                async for event in asking:
                    yield AgentEvent(agent=agent, event=event)
                    match event:
                        case OutcomeEvent():
                            calls.append(event.outcome)
                        case RoundEvent() if taken:
                            # Before the model is asked again: it has no more to say.
                            said = _named(event.messages[opening:], said, agent)
                            usages.append(event.usage)
                            break
                        case EndEvent():
                            run = event.run
            if run is not None:
                usages.append(run.usage)
                yield AgentsEndEvent(
                    run=AgentRun(
                        agent=agent, answer=run.answer, value=run.value, messages=_named(run.messages[opening:], said, agent),
                        path=path, calls=calls, usage=summed(usages),
                    )
                )  # fmt: skip
                return
            to, reason = taken[0]
            if len(path) > self._max_handoffs:
                raise TooManyRounds(
                    f"the agents have handed over {self._max_handoffs} times ({' -> '.join(path)}) and want to go on",
                    rounds=self._max_handoffs,
                )
            yield HandOffEvent(agent=to, by=agent, reason=reason)
            agent = to
            path.append(agent.name)

    async def _turn(
        self,
        agent: Agent,
        client: ModelClient | None,
        model: str,
        said: list[ChatMessage],
        tools: ToolSet,
        stream: bool,
    ) -> AsyncGenerator[ToolEvent, None]:
        if client is None:
            async for event in _responded(agent, said):
                yield event
            return
        events = tool_events(
            client, model, [*agent.opening(), *said], tools, stream=stream, max_rounds=self._max_rounds,
            approve=self._approve, inject=self._inject, output=agent.output, **agent.sampling,
        )  # fmt: skip
        async with aclosing(events):
            async for event in events:
                yield event


async def _responded(agent: Agent, said: list[ChatMessage]) -> AsyncGenerator[ToolEvent, None]:
    """The turn of an agent that is no model."""
    assert agent.respond is not None
    answer = agent.respond(said)
    text = await answer if inspect.isawaitable(answer) else answer
    yield TextEvent(text=text)
    messages = [*agent.opening(), *said, ChatMessage(role="assistant", content=text)]
    yield EndEvent(run=ToolRun(answer=text, value=text, messages=messages))


def _handoff(agent: Agent, to: Agent, taken: list[tuple[Agent, str]]) -> Tool[..., Any]:
    """The tool with which an agent hands over."""

    def hand_over(reason: str = "") -> str:
        if taken and taken[0][0] is not to:
            raise ValueError(f"the conversation goes to {taken[0][0].name} already")
        taken.append((to, reason))
        return f"{to.name} has the conversation now."

    about = f": {to.description}" if to.description else ""
    return Tool(
        hand_over, name=f"hand_over_to_{to.name}", description=f"Hands the conversation over to {to.name}{about}"
    )  # fmt: skip


def _named(messages: list[ChatMessage], before: list[ChatMessage], agent: Agent) -> list[ChatMessage]:
    """The conversation; what is new in it, the agent has said."""
    new = [
        msgspec.structs.replace(message, name=agent.name) if message.role == "assistant" else message
        for message in messages[len(before) :]
    ]
    return [*before, *new]


def _check_names(agents: Sequence[Agent]) -> None:
    """Of all agents that can be reached."""
    seen: dict[str, Agent] = {}
    waiting = list(agents)
    while waiting:
        agent = waiting.pop()
        if agent.name in seen:
            if seen[agent.name] is not agent:
                raise InvalidRequest(f"two agents have the name {agent.name!r}", param="agents")
            continue
        seen[agent.name] = agent
        waiting += agent.handoffs
