"""Plain functions as tools: what a model is told of them, and how its arguments become theirs."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import re
import sys
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Generic, ParamSpec, TypeAlias, TypeVar, get_args, get_origin, overload

import msgspec
from modelbus_broker.errors import InvalidRequest
from modelbus_broker.messages import ChatMessage, ToolCall

from ..structure.annotations import understand
from ..structure.nodes.base import Definitions, Node, Reading
from ..structure.nodes.scalars import AnyNode
from .docstrings import read_docstring

if TYPE_CHECKING:
    from ..model_client import ModelClient

P = ParamSpec("P")
R = TypeVar("R")
T = TypeVar("T")

_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")
#: Keywords of a JSON schema that byzerllm's tools gave in a dict.
_DICT_KEYWORDS = ("description", "enum", "examples", "pattern", "minimum", "maximum", "format")


class _Injected:
    def __repr__(self) -> str:
        return "Injected"


#: ``db: Injected[Database]``: the model is not told of this parameter; who runs the tools gives it.
Injected: TypeAlias = Annotated[T, _Injected()]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ToolContext:
    """What a tool may know of the conversation in which it is called: a parameter with ``Injected[ToolContext]`` gets it."""

    client: ModelClient
    model: str
    messages: Sequence[ChatMessage]  #: up to the call
    call: ToolCall
    round: int  #: of calls, from 1


class Parameter(msgspec.Struct, frozen=True):
    """One parameter that the model gives."""

    name: str
    node: Node
    required: bool


class Tool(Generic[P, R]):
    """A function that models can call. Made by :func:`tool`; calling it calls the function.

    Attributes:
        name: the model calls it so.
        description: what the model is told of it.
        parameters: the JSON schema of its arguments.
        timeout_s: a call that takes longer is given up; None is no limit.
        needs_approval: it is never called without somebody's consent.
        injected: the parameters that the model is not told of: their types, by name.
        injected_optional: those of them that have a default, or are the context.
    """

    def __init__(
        self,
        function: Callable[P, R],
        *,
        name: str = "",
        description: str = "",
        timeout_s: float | None = None,
        needs_approval: bool = False,
    ) -> None:
        """See :func:`tool`."""
        self.function = function
        self.name = name or _name_of(function)
        if not _NAME.fullmatch(self.name):
            raise InvalidRequest(
                f"{self.name!r} is no name for a tool: give one of letters, digits, _ and - with tool(name=...)",
                param="tools",
            )
        doc = read_docstring(inspect.getdoc(_documented(function)))
        self.description = description or doc.text
        self.timeout_s = timeout_s
        self.needs_approval = needs_approval
        self.is_async = _is_async(function)
        definitions = Definitions()
        self._given: list[Parameter] = []
        self.injected: dict[str, Any] = {}
        self.injected_optional: set[str] = set()
        properties: dict[str, Any] = {}
        self._positional: list[str] = []
        for parameter, annotation in self._annotated():
            if parameter.kind is parameter.POSITIONAL_ONLY:
                self._positional.append(parameter.name)
            if _is_injected(annotation):
                wanted = self.injected[parameter.name] = get_args(annotation)[0]
                if parameter.default is not parameter.empty or wanted is ToolContext:
                    self.injected_optional.add(parameter.name)
                continue
            node, schema = _understood(self.name, parameter, annotation, definitions)
            if "description" not in schema and doc.parameters.get(parameter.name):
                schema = {**schema, "description": doc.parameters[parameter.name]}
            properties[parameter.name] = schema
            self._given.append(Parameter(parameter.name, node, parameter.default is parameter.empty))
        self.parameters: dict[str, Any] = {
            "type": "object",
            "properties": properties,
            "required": [parameter.name for parameter in self._given if parameter.required],
            "additionalProperties": False,
            **({"$defs": dict(definitions)} if definitions else {}),
        }
        functools.update_wrapper(self, _documented(function), assigned=("__module__", "__doc__"), updated=())

    def __repr__(self) -> str:
        return f"<tool {self.name}>"

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        return self.function(*args, **kwargs)

    def __get__(self, owner: object, cls: type[Any] | None = None) -> Tool[..., R]:
        """A tool that is a method, of its object."""
        if owner is None:
            return self
        bound = typing.cast("Callable[..., R]", functools.partial(self.function, owner))  # type: ignore[arg-type]
        return Tool(
            bound, name=self.name, description=self.description, timeout_s=self.timeout_s, needs_approval=self.needs_approval
        )  # fmt: skip

    def with_settings(self, **changes: Any) -> Tool[P, R]:
        """A copy with another ``name``, ``description``, ``timeout_s`` or ``needs_approval``."""
        own: dict[str, Any] = {
            "name": self.name, "description": self.description, "timeout_s": self.timeout_s,
            "needs_approval": self.needs_approval,
        }  # fmt: skip
        return Tool(self.function, **{**own, **changes})

    def spec(self) -> dict[str, Any]:
        """The tool in the form of the OpenAI API."""
        function = {"name": self.name, "description": self.description, "parameters": self.parameters}
        return {"type": "function", "function": function}

    def read(self, arguments: Any) -> tuple[dict[str, Any], list[str]]:
        """A model's arguments as the function takes them, and what is wrong with them; nothing is called.

        Args:
            arguments: decoded JSON.
        """
        if not isinstance(arguments, dict):
            return {}, ["the arguments are no JSON object"]
        reading = Reading()
        values = {}
        for parameter in self._given:
            if parameter.name in arguments:
                values[parameter.name] = parameter.node.read(arguments[parameter.name], parameter.name, reading)
            elif parameter.required:
                reading.wrong(parameter.name, "it is missing")
        known = [parameter.name for parameter in self._given]
        for name in arguments:
            if name not in known:
                reading.wrong(name, f"there is no such argument; the arguments are: {', '.join(known) or 'none'}")
        return values, reading.problems

    def bound(self, values: Mapping[str, Any]) -> Callable[[], R]:
        """The call with these arguments, injected ones included."""
        rest = dict(values)
        positional = [rest.pop(name) for name in self._positional if name in rest]
        return functools.partial(typing.cast("Callable[..., R]", self.function), *positional, **rest)

    def _annotated(self) -> Iterator[tuple[inspect.Parameter, Any]]:
        """The parameters, with their annotations as types.

        Raises:
            InvalidRequest: an annotation cannot be resolved, a parameter takes any number of arguments, or it is a generator.
        """
        try:
            signature = inspect.signature(self.function)
        except (ValueError, TypeError) as error:
            raise InvalidRequest(f"tool {self.name}: its parameters cannot be read: {error}", param="tools") from None
        hinted = _hinted(self.function)
        if inspect.isgeneratorfunction(hinted) or inspect.isasyncgenfunction(hinted):
            raise InvalidRequest(
                f"tool {self.name}: it is a generator; give a function that returns a list", param="tools"
            )
        try:
            try:
                hints = typing.get_type_hints(hinted, include_extras=True)
            except NameError:
                hints = typing.get_type_hints(hinted, localns=_enclosing_names(hinted), include_extras=True)
        except (NameError, TypeError) as error:
            raise InvalidRequest(
                f"tool {self.name}: an annotation means nothing here: {error}", param="tools"
            ) from None
        for parameter in signature.parameters.values():
            if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
                raise InvalidRequest(
                    f"tool {self.name}: a model cannot give *{parameter.name}: name each parameter", param="tools"
                )
            yield parameter, hints.get(parameter.name, Any)


@overload
def tool(function: Callable[P, R], /) -> Tool[P, R]: ...
@overload
def tool(
    *, name: str = "", description: str = "", timeout_s: float | None = None, needs_approval: bool = False
) -> Callable[[Callable[P, R]], Tool[P, R]]: ...
def tool(
    function: Callable[P, R] | None = None,
    /,
    *,
    name: str = "",
    description: str = "",
    timeout_s: float | None = None,
    needs_approval: bool = False,
) -> Tool[P, R] | Callable[[Callable[P, R]], Tool[P, R]]:
    """Makes a tool of a function, a coroutine function, a method or a callable object: ``@tool``, or ``@tool(timeout_s=5)``.

    The schema comes from the hints (all that a prompt function may return, pydantic models and dataclasses included) and
    the docstring (Google, numpy or Sphinx style); ``Annotated[int, "how many"]`` describes a parameter as well. Parameters
    with ``Injected[...]`` are not shown to the model.

    Args:
        name: of the function, if it is not given.
        description: the docstring's text, if it is not given.
        timeout_s: a call that takes longer is given up, and the model told so. A thread cannot be stopped: a function that
            is no coroutine runs on, and its result is not used.
        needs_approval: it is called only where an approval hook agrees.

    Raises:
        InvalidRequest: a model could not be told how to call it; the message says why.
    """

    def make(function: Callable[P, R]) -> Tool[P, R]:
        if isinstance(function, Tool):
            raise InvalidRequest(f"{function.name} is a tool already: change a copy of it with with_settings")
        return Tool(
            function, name=name, description=description, timeout_s=timeout_s, needs_approval=needs_approval
        )  # fmt: skip

    return make if function is None else make(function)


def _understood(
    tool: str, parameter: inspect.Parameter, annotation: Any, definitions: Definitions
) -> tuple[Node, dict[str, Any]]:
    default = parameter.default
    try:
        node: Node = AnyNode() if annotation is Any else understand(annotation)
        if default is None:
            reading = Reading()
            node.read(None, parameter.name, reading)
            if reading.problems:
                node = understand(annotation | None)
        schema = node.schema(definitions)
    except InvalidRequest as error:
        raise InvalidRequest(
            f"tool {tool}, parameter {parameter.name}: {error.message}; what the model shall not give is Injected[...]",
            param="tools",
        ) from None
    for extra in get_args(annotation)[1:] if get_origin(annotation) is Annotated else ():
        if isinstance(extra, Mapping):
            schema = {**schema, **{key: extra[key] for key in _DICT_KEYWORDS if key in extra}}
    if default is not parameter.empty:
        try:
            schema = {**schema, "default": msgspec.to_builtins(default, enc_hook=_as_json)}
        except (TypeError, NotImplementedError):
            pass  # a default that JSON cannot say is left to the function
    return node, schema


def _as_json(value: Any) -> Any:
    if hasattr(value, "model_dump"):
        return value.model_dump(mode="json")
    raise NotImplementedError


def _is_injected(annotation: Any) -> bool:
    return get_origin(annotation) is Annotated and any(isinstance(a, _Injected) for a in get_args(annotation)[1:])


def _unwrapped(function: Any) -> Any:
    while isinstance(function, functools.partial):
        function = function.func
    return function


def _hinted(function: Any) -> Any:
    function = _unwrapped(function)
    return function if inspect.isroutine(function) or inspect.isclass(function) else type(function).__call__


def _documented(function: Any) -> Any:
    """What has the docstring: a callable object's class, or its method."""
    function = _unwrapped(function)
    return function if inspect.getdoc(function) else _hinted(function)


def _enclosing_names(function: Any) -> dict[str, Any]:
    """The names around a function that was defined in another one, as long as that one still runs."""
    enclosing, nested, _ = getattr(function, "__qualname__", "").rpartition(".<locals>.")
    frame = sys._getframe(1) if nested else None
    while frame is not None:
        if frame.f_code.co_qualname == enclosing and frame.f_globals is getattr(function, "__globals__", None):
            return dict(frame.f_locals)
        frame = frame.f_back
    return {}


def _is_async(function: Any) -> bool:
    function = _unwrapped(function)
    return inspect.iscoroutinefunction(function) or (
        not inspect.isroutine(function) and inspect.iscoroutinefunction(type(function).__call__)
    )


def _name_of(function: Any) -> str:
    function = _unwrapped(function)
    return str(getattr(function, "__name__", "") or type(function).__name__)
