"""Hooks: your own functions around the calls of models in this program, to change a question, to answer it, or to look.

A hook sees each single request that this program makes of a model, of whatever kind: retries and rounds of tools are
requests of their own.

| call | made by | answer |
|---|---|---|
| ``ChatCall`` | ``client.chat``, ``client.stream`` and what is built on them: prompt functions, ``chat_oai``, chats, agents | ``ChatAnswer`` |
| ``EmbeddingCall`` | ``client.embed``, ``emb`` | ``EmbeddingAnswer`` |
| ``ScoreCall`` | ``client.rerank``, ``emb_rerank`` | ``Ranking``, of all documents |
| ``ClassificationCall`` | ``client.classify`` | ``ClassificationAnswer`` |
| ``DecisionCall`` | ``client.decide``, prompt functions that return ``Decision`` | ``Decision`` |
| ``JobCall`` | ``client.submit``, each row of a batch or a map, ``f.submit`` and the like | ``JobRecord``: it is in its queue |

| for | use |
|---|---|
| something before, after or instead | ``hooks.add(hook)``: an ``async def hook(call, following)``, which answers ``await following(call)`` |
| before only | ``hooks.before(f)``: ``f(call)`` returns the call as it shall be, an answer in its place, or None |
| after only | ``hooks.after(f)``: ``f(call, answer)`` returns the answer as it shall be, or None |

Kinds of calls after the function limit it to these: ``hooks.add(hook, ChatCall, JobCall)``.

Of a stream that is read as it comes (``call.options.stream``) what comes before is run before it is asked, and what comes
after is given the whole answer when the last piece has been read: it can change what ``stream.answer`` says then, and not
what was shown. An answer in its place is shown as one piece.
"""

from __future__ import annotations

import inspect
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar, overload

import msgspec
from modelbus_broker.asking import CallOptions
from modelbus_broker.errors import InvalidRequest
from modelbus_broker.jobs import KEPT_S
from modelbus_broker.messages import Chat, Classification, Decision, Embedding, Score, Task


class Call(msgspec.Struct, frozen=True, kw_only=True):
    """One request to a model. ``msgspec.structs.replace`` makes a changed one."""

    model: str
    task: Task
    options: CallOptions


class ChatCall(Call, frozen=True, kw_only=True):
    """For an answer to a conversation."""

    task: Chat


class EmbeddingCall(Call, frozen=True, kw_only=True):
    """For the vectors of texts."""

    task: Embedding


class ScoreCall(Call, frozen=True, kw_only=True):
    """For how well documents answer a query."""

    task: Score


class ClassificationCall(Call, frozen=True, kw_only=True):
    """For the classes of texts."""

    task: Classification


class DecisionCall(Call, frozen=True, kw_only=True):
    """For how likely each of some labels is."""

    task: Decision


class JobCall(Call, frozen=True, kw_only=True):
    """For an answer that is kept; what comes after sees that it is in its queue, and not what it will say."""

    kept_s: int = KEPT_S
    name: str = ""
    batch: str = ""  #: it is a row of this batch
    index: int = 0  #: which row
    labels: dict[str, str] = {}


C = TypeVar("C", bound=Call)
A = TypeVar("A")
Following = Callable[[Any], Awaitable[Any]]
#: What it is given is one of the calls above and answers the like; which, its kinds say.
Hook = Callable[[Any, Following], Awaitable[Any]]

_hooks: list[tuple[Hook, tuple[type[Call], ...]]] = []


def add(hook: Hook, *kinds: type[Call]) -> Callable[[], None]:
    """Lays a hook around the calls of this program from now on, inside of those that are there; returns what removes it.

    Args:
        kinds: the calls that it is for; none: all.
    """
    entry = (hook, kinds or (Call,))
    _hooks.append(entry)

    def remove() -> None:
        if entry in _hooks:
            _hooks.remove(entry)

    return remove


@overload
def before(function: Callable[[Call], Any]) -> Callable[[], None]: ...
@overload
def before(function: Callable[[C], Any], *kinds: type[C]) -> Callable[[], None]: ...
def before(function: Callable[[Any], Any], *kinds: type[Call]) -> Callable[[], None]:
    """Calls a function, or a coroutine function, before each call of a model; returns what removes it.

    It returns the call as it shall be, an answer (no model is asked then), or None: the call stays as it is. What it
    raises reaches the caller.

    Args:
        kinds: the calls that it is for; none: all.
    """

    async def hook(call: Call, following: Following) -> Any:
        said = function(call)
        changed = await said if inspect.isawaitable(said) else said
        if changed is None or isinstance(changed, Call):
            return await following(changed or call)
        return changed

    return add(hook, *kinds)


@overload
def after(function: Callable[[Call, Any], Any]) -> Callable[[], None]: ...
@overload
def after(function: Callable[[C, Any], Any], *kinds: type[C]) -> Callable[[], None]: ...
def after(function: Callable[[Any, Any], Any], *kinds: type[Call]) -> Callable[[], None]:
    """Calls a function, or a coroutine function, with each call and its answer; it returns the answer as it shall be, or None.

    Args:
        kinds: the calls that it is for; none: all.
    """

    async def hook(call: Call, following: Following) -> Any:
        answer = await following(call)
        said = function(call, answer)
        changed = await said if inspect.isawaitable(said) else said
        return answer if changed is None else changed

    return add(hook, *kinds)


def hooked(kind: type[Call]) -> bool:
    """Whether any hook is for this kind of calls."""
    return any(issubclass(kind, kinds) for _, kinds in _hooks)


async def around(call: C, ask: Callable[[C], Awaitable[A]], answer: type[A]) -> A:
    """Asks, with all hooks around it that are for this kind of calls, the first one outermost.

    Args:
        answer: what the caller expects.

    Raises:
        InvalidRequest: a hook passed on another kind of call, or gave another kind of answer.
    """
    kind = type(call)
    if not hooked(kind):
        return await ask(call)

    async def innermost(asked: C) -> A:
        if not isinstance(asked, kind):
            raise InvalidRequest(f"a hook made a {type(asked).__name__} of a {kind.__name__}")
        return await ask(asked)

    following: Following = innermost
    for hook, kinds in reversed(_hooks):
        if isinstance(call, kinds):
            following = _step(hook, following)
    given = await following(call)
    if not isinstance(given, answer):
        raise InvalidRequest(f"a hook answered a {kind.__name__} with {type(given).__name__}, not {answer.__name__}")
    return given


def _step(hook: Hook, following: Following) -> Following:
    async def step(call: Call) -> Any:
        return await hook(call, following)

    return step
