"""Versions of prompt functions: a hash of all that decides what a model is asked, and what has changed between two.

A version is made of the template, the signature, the schema of the answer, the options and examples, and the source of the
body with every function of the same package that it uses. It says nothing of the arguments of one call.
"""

from __future__ import annotations

import builtins
import difflib
import hashlib
import inspect
import textwrap
from collections.abc import Callable, Mapping, Sequence
from types import CodeType, FunctionType
from typing import Any
from weakref import WeakKeyDictionary

import msgspec


class PromptVersion(msgspec.Struct, frozen=True, kw_only=True):
    """What a prompt function is, in texts that can be kept and compared. ``str(version)`` is its id."""

    name: str
    template: str
    signature: str
    schema: str = ""  #: of the answer, as JSON
    options: str = ""  #: sampling, ladder, examples and what else a call always has, as JSON
    tools: str = ""  #: schemas of the tools, as JSON
    helpers: dict[str, str] = {}  #: sources of the body and of the functions that it uses, by name

    @property
    def id(self) -> str:
        """16 hex digits; the same in every process that has the same function."""
        return hashlib.sha256(msgspec.json.encode(self, order="sorted")).hexdigest()[:16]

    def __str__(self) -> str:
        return self.id


def version_of(
    function: Callable[..., Any],
    *,
    name: str,
    schema: Mapping[str, Any],
    options: Mapping[str, Any],
    tools: Sequence[Mapping[str, Any]] | None = None,
) -> PromptVersion:
    """The version of a function with a docstring as it is called now.

    Args:
        options: anything that msgspec can write as JSON; what it cannot, by its repr.
    """
    return PromptVersion(
        name=name,
        template=inspect.cleandoc(function.__doc__ or ""),
        signature=str(inspect.signature(function)),
        schema=_json(schema),
        options=_json(options),
        tools=_json(tools) if tools else "",
        helpers=helpers_of(function),
    )


def diff(old: PromptVersion, new: PromptVersion) -> str:
    """What has changed from one version to the other, as a unified diff of its parts; "" if nothing has."""
    lines: list[str] = []
    for part in ("name", "template", "signature", "schema", "options", "tools"):
        lines += _changed(part, getattr(old, part), getattr(new, part))
    for helper in sorted({*old.helpers, *new.helpers}):
        lines += _changed(f"helper {helper}", old.helpers.get(helper, ""), new.helpers.get(helper, ""))
    return "\n".join(lines)


#: Looking for them for each copy of a prompt function would cost more than all the rest of a call.
_helpers: WeakKeyDictionary[Callable[..., Any], dict[str, str]] = WeakKeyDictionary()


def helpers_of(function: Callable[..., Any]) -> dict[str, str]:
    """The sources of a function's body, and of the functions of the same top-level package that it uses, and so on.

    Variables that the body reads are not followed: they are arguments of the template once they are in the prompt.
    """
    if (known := _helpers.get(function)) is not None:
        return known
    found = _helpers[function] = {}
    package = (getattr(function, "__module__", "") or "").partition(".")[0]
    waiting = [inspect.unwrap(function)]
    while waiting:
        one = waiting.pop()
        if not isinstance(one, FunctionType):
            continue
        name = f"{one.__module__}.{one.__qualname__}"
        if name in found:
            continue
        found[name] = _source(one)
        closure = inspect.getclosurevars(one)
        for used in (*closure.globals.values(), *closure.nonlocals.values()):
            mine = isinstance(used, FunctionType) and (used.__module__ or "").partition(".")[0] == package
            if mine and used is not getattr(builtins, getattr(used, "__name__", ""), None):
                waiting.append(used)
    return found


def _source(function: FunctionType) -> str:
    try:
        return textwrap.dedent(inspect.getsource(function))
    except (OSError, TypeError):  # written where there is no file: its code says as much
        return _code(function.__code__)


def _code(code: CodeType) -> str:
    nested = [constant for constant in code.co_consts if isinstance(constant, CodeType)]
    constants = [constant for constant in code.co_consts if not isinstance(constant, CodeType)]
    own = hashlib.sha256(code.co_code + repr((constants, code.co_names)).encode()).hexdigest()
    return "\n".join([f"{code.co_name}: {own}", *map(_code, nested)])


def _json(value: Any) -> str:
    return msgspec.json.format(msgspec.json.encode(value, enc_hook=repr, order="sorted"), indent=2).decode()


def _changed(part: str, old: str, new: str) -> list[str]:
    lines = difflib.unified_diff(old.splitlines(), new.splitlines(), f"{part} (old)", f"{part} (new)", lineterm="", n=1)
    return [line for line in lines if not line.startswith("@@")]  # positions in JSON say nothing to anybody
