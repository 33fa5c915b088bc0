"""Several agents, and people, who talk in turns about the same thing."""

from __future__ import annotations

import inspect
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import aclosing
from typing import Any, Literal

import msgspec
from modelbus_broker.errors import InvalidRequest
from modelbus_broker.messages import ChatMessage, Usage

from ..model_client import Messages, chat_task
from ..prompts.llm import Model, refuse_in_loop
from ..shared import background
from ..structure import answer, output_type
from ..structure.replies import summed
from .agents import Agent, AgentEvent, AgentsEndEvent, HandOffEvent, Team

#: Who speaks next, given all that was said; None ends the conversation.
Choose = Callable[[Sequence[ChatMessage], Sequence[Agent]], Agent | None | Awaitable[Agent | None]]
#: Whether the conversation has come to its end, given the last message.
Until = Callable[[ChatMessage], bool]


class GroupRun(msgspec.Struct, frozen=True, kw_only=True):
    """A conversation of a group."""

    messages: list[ChatMessage]  #: ``name`` says who spoke
    speakers: list[str]
    ended: Literal["until", "nobody", "max_turns"]  #: why it is over
    usage: Usage = Usage()

    @property
    def answer(self) -> str:
        """The last that was said."""
        return self.messages[-1].text() if self.messages else ""


class Group:
    """Agents that talk in turns. Each sees its own turns as its own, and those of the others as turns of users, with their
    names; calls of tools stay with the agent that made them.

    A person is an agent with ``respond=``, who is asked each time it is their turn: ``Agent("me", respond=lambda said: input())``.
    """

    def __init__(
        self,
        *agents: Agent,
        llm: Model | None = None,
        model: str = "",
        choose: Choose | Literal["in_turn", "model"] = "in_turn",
        max_turns: int = 12,
        until: Until | str | None = None,
    ) -> None:
        """
        Args:
            llm: whom the agents ask that name nobody; also who chooses, with ``choose="model"``.
            choose: who speaks next: in turn, by the model's choice among the names, or what a function says.
            max_turns: of all agents together.
            until: the conversation ends with a message of which this is true, or which has this text in it.

        Raises:
            InvalidRequest: there are fewer than two agents, or two have the same name.
        """
        if len({agent.name for agent in agents}) != len(agents) or len(agents) < 2:
            raise InvalidRequest("a group has at least two agents, with different names", param="agents")
        if max_turns < 1:
            raise InvalidRequest(f"max_turns must be at least 1, not {max_turns}", param="max_turns")
        self.agents = list(agents)
        self._llm, self._model = llm, model
        self._choose, self._max_turns = choose, max_turns
        self._until: Until | None = (lambda message: until in message.text()) if isinstance(until, str) else until

    def run(self, messages: Messages) -> GroupRun:
        """Talks until it is over.

        Raises:
            PromptError: an event loop runs in this thread: use ``aio_run``.
            ModelBusError: what asking raises.
        """
        refuse_in_loop("Group.run")
        return background.run(self.aio_run(messages))

    async def aio_run(self, messages: Messages) -> GroupRun:
        """As :meth:`run`, for asyncio programs."""
        events = self.aio_events(messages, stream=False)
        async with aclosing(events):
            async for event in events:
                if isinstance(event, GroupRun):
                    return event
        raise AssertionError("the last event is the end")

    async def aio_events(
        self, messages: Messages, *, stream: bool = True
    ) -> AsyncGenerator[AgentEvent | HandOffEvent | GroupRun, None]:
        """The same, event by event; the last is the ``GroupRun``. Close it (``aclosing``) if you leave early."""
        log = chat_task(messages, {}).messages
        speakers: list[str] = []
        usages: list[Usage] = []
        ended: Literal["until", "nobody", "max_turns"] = "max_turns"
        while len(speakers) < self._max_turns:
            agent = await self._next(log, speakers, usages)
            if agent is None:
                ended = "nobody"
                break
            speakers.append(agent.name)
            team = Team(agent, llm=self._llm, model=self._model)
            turn = team.aio_events(seen_by(agent, log), stream=stream)
            async with aclosing(turn):
                async for event in turn:
                    if isinstance(event, AgentsEndEvent):
                        usages.append(event.run.usage)
                        log.append(ChatMessage(role="assistant", name=agent.name, content=event.run.answer))
                    else:
                        yield event
            if self._until is not None and self._until(log[-1]):
                ended = "until"
                break
        yield GroupRun(messages=log, speakers=speakers, ended=ended, usage=summed(usages))

    async def _next(self, log: list[ChatMessage], speakers: list[str], usages: list[Usage]) -> Agent | None:
        if self._choose == "in_turn":
            return self.agents[len(speakers) % len(self.agents)]
        if self._choose == "model":
            return await self._chosen_by_model(log, usages)
        assert callable(self._choose)
        agent = self._choose(log, self.agents)
        return await agent if inspect.isawaitable(agent) else agent

    async def _chosen_by_model(self, log: list[ChatMessage], usages: list[Usage]) -> Agent:
        chooser = Agent("chooser")
        client, model = await chooser.client(self._llm, self._model)
        names = [agent.name for agent in self.agents]
        about = "\n".join(f"- {agent.name}: {agent.description}" for agent in self.agents)
        question = f"These take part in the conversation:\n{about}\n\nWhose turn is it now? Give the name."
        form: Any = output_type(Literal[tuple(names)])
        asked = [*seen_by(chooser, log), ChatMessage(role="user", content=question)]
        result = await answer(client, model, asked, form, sampling={"temperature": 0.0})
        usages.append(result.usage)
        return next(agent for agent in self.agents if agent.name == result.value)


def seen_by(agent: Agent, log: Sequence[ChatMessage]) -> list[ChatMessage]:
    """The conversation as one of the group sees it: turns of the user and of others one after the other are one turn, for
    models that want the roles to alternate."""
    seen: list[ChatMessage] = []
    for message in log:
        own = message.role == "assistant" and message.name == agent.name
        if message.role != "assistant" or own:
            turn = message
        else:
            turn = ChatMessage(role="user", content=f"{message.name or 'assistant'}: {message.text()}")
        last = seen[-1] if seen else None
        both = last is not None and last.role == turn.role == "user"
        if both and last is not None and isinstance(last.content, str) and isinstance(turn.content, str):
            seen[-1] = ChatMessage(role="user", content=f"{last.content}\n\n{turn.content}")
        else:
            seen.append(turn)
    return seen
