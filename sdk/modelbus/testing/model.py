"""The scripted model in this process: a client without a bus, for the tests of programs that ask models."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Collection, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import msgspec
from modelbus_broker import names
from modelbus_broker.asking import CallOptions
from modelbus_broker.calls import Answer
from modelbus_broker.errors import ConfigurationError, DeadlineExceeded, ModelBusError, ModelNotFound, RequestCancelled
from modelbus_broker.messages import Capabilities, Chat, ChatMessage, Done, Task

from ..model_client import ModelClient
from .script import Behaviour, Rule, Script, ScriptedAnswer, read_script
from .scripted import Scripted, as_answer

#: What an answer may be written as: a text, an answer, an error, or any value that JSON can say.
Said = Any
_BEHAVIOUR = frozenset(Behaviour.__struct_fields__)


class Asked(msgspec.Struct, frozen=True, kw_only=True):
    """A request as the model got it."""

    model: str
    task: Task
    options: CallOptions

    @property
    def chat(self) -> Chat:
        """The task of a chat, for assertions on its fields.

        Raises:
            TypeError: something else was asked.
        """
        if not isinstance(self.task, Chat):
            raise TypeError(f"this was no chat but {self.task!r}")
        return self.task

    @property
    def messages(self) -> list[ChatMessage]:
        """Of a chat."""
        return self.chat.messages


class ScriptedModel(ModelClient):
    """A client whose models follow a script: ``chat``, ``stream``, ``embed`` and the others as of :class:`modelbus.Client`.

    | made with | it answers |
    |---|---|
    | ``ScriptedModel("one", "two")`` | these, in order, and then fails: the test asked more than it said |
    | ``ScriptedModel(rules={r"weather": "It rains."})`` | by the first regular expression found in the last message |
    | ``ScriptedModel(respond=f)`` | what ``f(chat)``, a function or a coroutine function, returns |
    | ``ScriptedModel()`` | by the schema: an instance of ``response_format``, each tool called once, else the last message |

    An answer is a text, a :class:`ScriptedAnswer`, an error of ``modelbus.errors`` (its class and text), or a value (a dict,
    a pydantic model, a dataclass ...) that is written as JSON. All else (``chunks=2``, ``fail="first:1"``,
    ``fail_code="upstream_failed"`` ...) is a field of :class:`Behaviour`.

    ``requests`` has all that was asked, for assertions.
    """

    def __init__(
        self,
        *answers: Said,
        rules: Mapping[str, Said] | None = None,
        respond: Callable[[Chat], Said | Awaitable[Said]] | None = None,
        script: Script | str | Path | None = None,
        models: Collection[str] = (),
        **behaviour: Any,
    ) -> None:
        """
        Args:
            script: instead of answers and rules; a :class:`Script`, or the path of a JSON file.
            models: the names that are served; none: every name.

        Raises:
            ConfigurationError: a value makes no sense; the message names it.
        """
        unknown = sorted(behaviour.keys() - _BEHAVIOUR - {"otherwise"})
        if unknown:
            known = ", ".join(sorted(_BEHAVIOUR))
            raise ConfigurationError(f"a scripted model has no parameter {', '.join(unknown)}; known are: {known}")
        if script is not None and (answers or rules or respond):
            raise ConfigurationError("give a script, or answers, rules and respond, not both")
        if script is None:
            script = Script()
        elif not isinstance(script, Script):
            script = read_script(script)
        written = {
            **({"answers": [_written(answer) for answer in answers]} if answers else {}),
            **(
                {"rules": [Rule(pattern=pattern, answer=_written(said)) for pattern, said in rules.items()]}
                if rules
                else {}
            ),
        }
        self.script = msgspec.structs.replace(script, **written, **behaviour)
        self.requests: list[Asked] = []
        self._models = frozenset(models)
        self._scripted = Scripted(self.script, None if respond is None else _responding(respond))
        self.publisher = _LocalPublisher(self)

    def capabilities(self, model: str) -> Capabilities:
        """What the script lets it do.

        Raises:
            ModelNotFound: ``models`` was given without this one.
        """
        self._check(model)
        return self._scripted.capabilities()

    @property
    def last(self) -> Asked:
        """The last request.

        Raises:
            IndexError: there was none.
        """
        return self.requests[-1]

    async def answer(self, asked: Asked, id: str) -> AsyncGenerator[Answer, None]:
        """The frames of an answer; used by the publisher.

        Raises:
            ModelBusError: what the script says.
        """
        self.requests.append(asked)
        async for frame in self._scripted.frames(asked.task, id):
            yield frame

    def _check(self, model: str) -> None:
        if self._models and model not in self._models:
            known = ", ".join(sorted(self._models))
            raise ModelNotFound(f"the model {model!r} is not deployed (deployed: {known})", param="model")


def _responding(respond: Callable[[Chat], Said | Awaitable[Said]]) -> Callable[[Chat], Awaitable[ScriptedAnswer]]:
    async def responding(task: Chat) -> ScriptedAnswer:
        said = respond(task)
        return as_answer(_written(await said if inspect.isawaitable(said) else said))

    return responding


def _written(said: Said) -> str | ScriptedAnswer:
    if isinstance(said, (str, ScriptedAnswer)):
        return said
    if isinstance(said, ModelBusError):
        return ScriptedAnswer(error=said.code, error_text=said.message)
    if hasattr(said, "model_dump_json"):
        return str(said.model_dump_json())
    return msgspec.json.encode(said).decode()


class _LocalPublisher:
    """Brings questions to a model in this process."""

    def __init__(self, model: ScriptedModel) -> None:
        self._model = model
        self._id = names.new_publisher_id("sdk")

    async def publish(self, model: str, task: Task, options: CallOptions | None = None) -> LocalCall:
        options = options or CallOptions()
        self._model._check(model)
        id = options.id or names.new_request_id(self._id)
        asked = Asked(model=model, task=task, options=options)
        return LocalCall(id, self._model.answer(asked, id), options.budget_ms / 1000)

    submit = publish


class LocalCall:
    """A question to a model in this process, with the reader's side of ``modelbus_broker.calls.Call``."""

    def __init__(self, id: str, frames: AsyncGenerator[Answer, None], budget_s: float = 0.0) -> None:
        """``budget_s``: 0 is no limit."""
        self.id = id
        self._frames = frames
        self._budget_s = budget_s
        self._deadline = asyncio.get_running_loop().time() + budget_s if budget_s else None
        self._over = False
        self._error: ModelBusError | None = None

    async def batch(self) -> list[Answer]:
        """See ``modelbus.port.Answering``."""
        if self._error is not None:
            raise self._error
        timeout = asyncio.timeout_at(self._deadline)
        try:
            async with timeout:
                frame = await anext(self._frames)
        except TimeoutError:
            if not timeout.expired():
                raise
            self._error = DeadlineExceeded(f"no complete answer within {self._budget_s:g} s")
            raise self._error from None
        except ModelBusError as error:
            self._error = error
            raise
        self._over = isinstance(frame, Done)
        return [frame]

    async def batches(self) -> AsyncIterator[list[Answer]]:
        """See ``modelbus.port.Answering``."""
        while not self._over:
            yield await self.batch()

    async def cancel(self) -> None:
        """See ``modelbus.port.Answering``."""
        if not self._over and self._error is None:
            self._error = RequestCancelled("the request was cancelled")
        await self._frames.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.cancel()
