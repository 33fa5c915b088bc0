"""What all prompt functions have in common: their settings, their copies, and what a call asks."""

from __future__ import annotations

import copy
import functools
import pickle
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Generic, ParamSpec, Self, TypeVar

import msgspec
from modelbus_broker.asking import CallOptions
from modelbus_broker.errors import PromptError
from modelbus_broker.messages import ChatMessage, Ladder, TextPart

from ..llm_config import request_fields
from ..model_client import Messages, ModelClient, chat_task
from ..structure import OutputType, Result, output_type
from ..versions import PromptVersion, version_of
from .caching import Caching
from .cuts import Cut, ItemsCut, PartialsCut, TextCut
from .declaration import Declaration
from .llm import Model, Target, Waiter, name_of, target_of
from .replies import Reply
from .running import RenderedCall, ToolUse, run
from .streaming import AsyncStream
from .templates import as_json

if TYPE_CHECKING:
    from ..cache import Cache
    from ..tools import Approve, ToolLike, ToolSet
    from ..tools.running import AtLimit

P = ParamSpec("P")
Q = ParamSpec("Q")
R = TypeVar("R")
T = TypeVar("T")

#: Fields of ``CallOptions`` that a caller may set; the others belong to the machinery.
_OPTIONS = frozenset(("adapter", "budget_ms", "idempotency_key", "lane", "revision", "tenant", "wait"))


class _Versioned:
    """What some settings make, made when it is first asked for: a version, and what requests on the bus say of it."""

    __slots__ = ("options", "version")

    def __init__(self) -> None:
        self.version: PromptVersion | None = None
        self.options: tuple[CallOptions, CallOptions] | None = None  #: those of the settings, and with the labels


#: Settings that are no part of the version.
_UNVERSIONED = frozenset(("caching", "llm", "model", "options"))


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """All that ``prompt(...)`` and the ``with_...`` methods say about a prompt function."""

    llm: Model | None = None
    model: str = ""
    reply: Reply | None = None  #: None: what the return annotation says
    sampling: Mapping[str, Any] = {}
    options: CallOptions = CallOptions()
    ladder: Ladder = Ladder()
    tools: tuple[Any, ...] = ()
    limits: Mapping[str, Any] = {}  #: of the use of tools
    conversation: tuple[ChatMessage, ...] = ()
    examples: tuple[tuple[str | Mapping[str, Any], Any], ...] = ()
    prefix: str = ""
    max_turns: int = 1
    caching: Caching | None = None
    versioned: _Versioned = msgspec.field(default_factory=_Versioned)


class Prompt(Generic[P]):
    """What all prompt functions have in common. Nothing changes one: every ``with_...`` gives a copy."""

    def __init__(self, declaration: Declaration, settings: Settings, owner: tuple[Any, ...] = ()) -> None:
        self._declaration = declaration
        self._settings = settings
        self._owner = owner  #: the object whose method this is, or nothing
        function = declaration.function
        self.__name__, self.__qualname__ = function.__name__, function.__qualname__
        self.__module__, self.__doc__, self.__wrapped__ = function.__module__, function.__doc__, function

    def __repr__(self) -> str:
        return f"<prompt function {self._declaration.name}>"

    def __copy__(self) -> Self:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """Itself, as of functions; a method goes with a copy of its object."""
        if not self._owner:
            return self
        return type(self)(self._declaration, self._settings, copy.deepcopy(self._owner, memo))

    def __reduce__(self) -> str | tuple[Any, ...]:
        """Pickled by its name, as functions are."""
        if not self._owner:
            found: Any = sys.modules.get(self.__module__)
            for name in self.__qualname__.split("."):
                found = getattr(found, name, None)
            if found is self:
                return str(self.__qualname__)
        elif getattr(getattr(self._owner[0], self.__name__, None), "_settings", None) is self._settings:
            return getattr, (self._owner[0], self.__name__)
        raise pickle.PicklingError(
            f"{self!r} cannot be pickled: it does not stand in a module under its name (a copy made by with_... does not); "
            "pickle one that does, and call with_... there"
        )

    # What it asks

    def prompt(self, *args: P.args, **kwargs: P.kwargs) -> str:
        """The text of the prompt; no model is asked. A prompt with several turns has a line with the role before each.

        Raises:
            PromptError: the template cannot be rendered.
        """
        return _text(self._messages(args, kwargs, self._declaration.body(self._owner + args, kwargs)))

    def messages(self, *args: P.args, **kwargs: P.kwargs) -> list[ChatMessage]:
        """The conversation that a call would send, examples and history included; no model is asked."""
        return self._messages(args, kwargs, self._declaration.body(self._owner + args, kwargs))

    def render(self, *args: P.args, **kwargs: P.kwargs) -> RenderedCall:
        """All that a call would ask; no model is asked.

        Raises:
            PromptError: the template cannot be rendered, or no model is named.
        """
        target = self._target(args)
        return self._rendered(target, self._messages(args, kwargs, self._declaration.body(self._owner + args, kwargs)))

    async def aio_render(self, *args: P.args, **kwargs: P.kwargs) -> RenderedCall:
        """As ``render``, for functions whose body awaits something."""
        return await self._aio_rendered(self._target(args), args, kwargs)

    # Copies

    def with_llm(self, llm: Model, *, model: str = "") -> Self:
        """Asks another model; see ``prompt``. A client alone asks the same model over another connection."""
        if isinstance(llm, ModelClient) and not model:
            model = name_of(self._settings.llm, self._settings.model)
        return self._with(llm=llm, model=model)

    def with_options(self, **fields: Any) -> Self:
        """With other sampling fields (``temperature``, ``max_tokens``, ...) or call options (``lane``, ``budget_ms``,
        ``tenant``, ``wait``, ``revision``, ``adapter``, ``idempotency_key``)."""
        options = {name: value for name, value in fields.items() if name in _OPTIONS}
        sampling = {name: value for name, value in fields.items() if name not in _OPTIONS}
        return self._with(
            sampling={**self._settings.sampling, **sampling},
            options=msgspec.structs.replace(self._settings.options, **options),
        )

    def options(self, options: Mapping[str, Any]) -> Self:
        """As ``with_options``, in byzerllm's words: ``{"model": "chat", "llm_config": {"gen.temperature": 0.1}}``."""
        fields = dict(options)
        model = fields.pop("model", "")
        fields = request_fields(fields.pop("llm_config", None), fields)
        copy = self._with(model=model) if model else self
        return copy.with_options(**fields)

    def with_stop(self, *stop: str) -> Self:
        """The answer ends before the first of these strings."""
        return self.with_options(stop=list(stop))

    def with_tools(
        self,
        *tools: ToolLike | ToolSet,
        max_rounds: int = 8,
        at_limit: AtLimit = "error",
        parallel: int = 4,
        choice: str | Mapping[str, Any] | None = None,
        approve: Approve | None = None,
        inject: Mapping[str, Any] | None = None,
    ) -> Self:
        """The model may call these functions before it answers; see :func:`modelbus.tools.run_tools`.

        Args:
            max_rounds: so many rounds of calls; then ``TooManyRounds``, or with ``at_limit="answer"`` it has to answer.
            parallel: so many calls at once.
            choice: of the first round: ``auto``, ``required`` or a tool's name.
            approve: is asked about each call; without it tools that need approval are refused.
            inject: values of the parameters that the model is not told of, by name.

        Raises:
            InvalidRequest: something is no tool, or two have the same name.
        """
        from ..tools import ToolSet

        limits = {
            "max_rounds": max_rounds, "at_limit": at_limit, "parallel": parallel, "choice": choice, "approve": approve,
            "inject": inject,
        }  # fmt: skip
        set_limits = {name: value for name, value in limits.items() if value is not None}
        return self._with(tools=tuple(ToolSet(*tools)), limits=set_limits)

    def with_conversation(self, messages: Messages) -> Self:
        """What was said before comes between the prompt's system turns and its others."""
        return self._with(conversation=tuple(chat_task(messages, {}).messages) if messages else ())

    def with_examples(self, *examples: tuple[str | Mapping[str, Any], Any]) -> Self:
        """Shows the model questions with their answers before the real question.

        Each is a pair: the function's arguments by name, or the text of a user's turn; and the answer.
        """
        return self._with(examples=examples)

    def with_return_prefix(self, prefix: str) -> Self:
        """The answer begins so; what the function gives begins so too.

        Calls raise ``UnsupportedField`` where the model's engine cannot go on from a beginning.
        """
        return self._with(prefix=prefix)

    def with_max_turns(self, max_turns: int) -> Self:
        """A text that was cut by the limit on its length is gone on with, until so many requests were made."""
        if max_turns < 1:
            raise PromptError(f"max_turns must be at least 1, not {max_turns}")
        return self._with(max_turns=max_turns)

    def with_cache(self, cache: Cache | None, *, always: bool = False) -> Self:
        """Answers that are in the cache are not asked for again; None: they are.

        Only where the same question gives the same answer: at temperature 0, or with a seed; calls raise ``PromptError``
        otherwise. ``always`` says that it does not matter.
        """
        return self._with(caching=Caching(cache, always=always) if cache is not None else None)

    def with_ladder(self, ladder: Ladder | None = None, **fields: Any) -> Self:
        """Says how far an answer of the wanted form is sought; ``fields`` are those of ``Ladder``."""
        return self._with(ladder=msgspec.structs.replace(ladder or self._settings.ladder, **fields))

    def _with(self, **changes: Any) -> Self:
        if not changes.keys() <= _UNVERSIONED:
            changes["versioned"] = _Versioned()
        return type(self)(self._declaration, msgspec.structs.replace(self._settings, **changes), self._owner)

    def _bound(self, owner: object) -> Self:
        return type(self)(self._declaration, self._settings, (owner,))

    # Parts of a call

    @property
    def _reply(self) -> Reply:
        return self._settings.reply or self._declaration.reply

    @property
    def version(self) -> PromptVersion:
        """A hash of all that decides what is asked, whatever the arguments; see ``modelbus.versions``."""
        versioned = self._settings.versioned
        if versioned.version is None:
            versioned.version = self._made_version()
        return versioned.version

    def _options(self) -> CallOptions:
        """Those of the settings; requests on the bus say which function asked."""
        options, versioned = self._settings.options, self._settings.versioned
        made = versioned.options
        if made is None or made[0] is not options:
            labels = {"prompt": self._declaration.name, "version": self.version.id}
            stream = self._reply.shape != "whole"
            made = versioned.options = options, msgspec.structs.replace(options, labels=labels, stream=stream)
        return made[1]

    def _made_version(self) -> PromptVersion:
        settings, specs = self._settings, None
        if settings.tools:
            from ..tools import ToolSet

            specs = ToolSet(*settings.tools).specs()
        options = {
            name: getattr(settings, name)
            for name in ("sampling", "ladder", "limits", "conversation", "examples", "prefix", "max_turns")
        }
        return version_of(
            self._declaration.function,
            name=self._declaration.name,
            schema=self._output.schema,
            options=options,
            tools=specs,
        )

    @functools.cached_property
    def _output(self) -> OutputType[Any]:
        """What the model shall write as a whole."""
        reply = self._reply
        annotation: Any = str if reply.calls else reply.annotation
        return output_type(list[annotation] if reply.shape == "items" else annotation)

    def _target(self, args: tuple[Any, ...]) -> Target:
        target = target_of(self._settings.llm, self._settings.model, self._owner + args)
        if target is None:
            raise PromptError(
                f"{self._declaration.name} names no model: prompt(llm='chat'), or .with_llm('chat') before the call"
            )
        return target

    def _messages(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], more: object) -> list[ChatMessage]:
        declaration, settings = self._declaration, self._settings
        context = declaration.context(self._owner + args, kwargs, more)
        messages = declaration.messages(context)
        if not settings.conversation and not settings.examples:
            return messages
        first = next((at for at, message in enumerate(messages) if not _is_system(message)), len(messages))
        shown: list[ChatMessage] = []
        for question, answer in settings.examples:
            if isinstance(question, str):
                shown.append(ChatMessage(role="user", content=question))
            else:
                shown += [one for one in declaration.messages({**context, **question}) if not _is_system(one)]
            said = answer if isinstance(answer, str) else as_json(answer)
            shown.append(ChatMessage(role="assistant", content=said))
        return [*messages[:first], *shown, *settings.conversation, *messages[first:]]

    def _rendered(self, target: Target, messages: list[ChatMessage]) -> RenderedCall:
        settings, only_calls = self._settings, self._reply.calls
        if only_calls and not settings.tools:
            raise PromptError(f"{self._declaration.name} returns calls and has no tools: prompt(tools=[...])")
        use = ToolUse(tools=settings.tools, only_calls=only_calls, limits=settings.limits) if settings.tools else None
        options = self._options()
        return RenderedCall(
            name=self._declaration.name, model=target.model, messages=messages, output=self._output,
            sampling=settings.sampling, options=options,
            ladder=settings.ladder, tools=use, prefix=settings.prefix, max_turns=settings.max_turns,
            version=options.labels["version"], caching=settings.caching,
        )  # fmt: skip

    async def _aio_rendered(self, target: Target, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> RenderedCall:
        more = self._declaration.function(*self._owner, *args, **kwargs)
        if self._declaration.asynchronous:
            more = await more
        return self._rendered(target, self._messages(args, kwargs, more))

    async def _call(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[RenderedCall, ModelClient]:
        """For the loop that runs now."""
        target = self._target(args)
        return await self._aio_rendered(target, args, kwargs), await target.here()

    async def _answer(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Result[Any]:
        return await run(*await self._call(args, kwargs))

    async def _value(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        reply = self._reply
        if reply.shape != "whole":
            return self._stream(args, kwargs)
        result = await run(*await self._call(args, kwargs))
        return result if reply.result else result.value

    def _wait(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Result[Any]:
        """The answer for a caller without an event loop. Template and body run in the caller's own thread."""
        target = self._target(args)
        waiter = Waiter(target, self._declaration.name)
        call = self._rendered(target, self._messages(args, kwargs, self._declaration.body(self._owner + args, kwargs)))
        return waiter.run(run(call, waiter.client))

    def _stream(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> AsyncStream[Any]:
        return AsyncStream(lambda: self._call(args, kwargs), self._cut())

    def _cut(self) -> Cut[Any]:
        match self._reply.shape:
            case "items":
                return ItemsCut(self._output)
            case "partials":
                return PartialsCut(self._output)
            case _:
                return TextCut()


def _is_system(message: ChatMessage) -> bool:
    return message.role in ("system", "developer")


def _text(messages: list[ChatMessage]) -> str:
    """A conversation for people to read; a single turn of the user is its text alone."""
    said = [(message.role, _shown(message)) for message in messages]
    if len(said) == 1 and said[0][0] == "user":
        return said[0][1]
    return "\n\n".join(f"[{role}]\n{text}" for role, text in said)


def _shown(message: ChatMessage) -> str:
    if isinstance(message.content, str):
        return message.content
    return "".join(
        part.text if isinstance(part, TextPart) else f"[{part.__struct_config__.tag}]" for part in message.content or ()
    )
