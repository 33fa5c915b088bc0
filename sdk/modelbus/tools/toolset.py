"""Several tools under their names."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from modelbus_broker.errors import InvalidRequest

from .functions import Tool

#: What is taken for a tool.
ToolLike = Tool[..., Any] | Callable[..., Any]


class ToolSet:
    """Tools, each under its name. Functions are made tools, tool sets are taken apart."""

    def __init__(self, *tools: ToolLike | ToolSet | Iterable[ToolLike | ToolSet]) -> None:
        """
        Raises:
            InvalidRequest: two have the same name, or one is nothing that can be called.
        """
        self._tools: dict[str, Tool[..., Any]] = {}
        for tool in _each(tools):
            if tool.name in self._tools and self._tools[tool.name] is not tool:
                raise InvalidRequest(
                    f"two tools have the name {tool.name!r}: give one another with tool(name=...) or prefixed(...)",
                    param="tools",
                )
            self._tools[tool.name] = tool

    def __repr__(self) -> str:
        return f"ToolSet({', '.join(self._tools)})"

    def __iter__(self) -> Iterator[Tool[..., Any]]:
        return iter(self._tools.values())

    def __len__(self) -> int:
        return len(self._tools)

    def __getitem__(self, name: str) -> Tool[..., Any]:
        return self._tools[name]

    def __contains__(self, name: object) -> bool:
        return name in self._tools

    def get(self, name: str) -> Tool[..., Any] | None:
        return self._tools.get(name)

    @property
    def names(self) -> list[str]:
        return list(self._tools)

    def specs(self) -> list[dict[str, Any]]:
        """The tools in the form of the OpenAI API."""
        return [tool.spec() for tool in self]

    def only(self, *names: str) -> ToolSet:
        """Those with these names.

        Raises:
            InvalidRequest: there is none of that name.
        """
        missing = [name for name in names if name not in self]
        if missing:
            raise InvalidRequest(
                f"there is no tool {', '.join(missing)}; there are: {', '.join(self._tools) or 'none'}"
            )
        return ToolSet(*(self._tools[name] for name in names))

    def prefixed(self, prefix: str) -> ToolSet:
        """Copies whose names begin with this, so that sets of different origin can be put together."""
        return ToolSet(*(tool.with_settings(name=prefix + tool.name) for tool in self))

    def with_settings(self, **changes: Any) -> ToolSet:
        """Copies with another ``timeout_s`` or ``needs_approval``."""
        return ToolSet(*(tool.with_settings(**changes) for tool in self))

    def check_injection(self, inject: Mapping[str, Any]) -> None:
        """
        Raises:
            InvalidRequest: a parameter of a tool is to be injected and is not there.
        """
        for tool in self:
            missing = [name for name in tool.injected if name not in inject and name not in tool.injected_optional]
            if missing:
                raise InvalidRequest(
                    f"tool {tool.name} needs {', '.join(missing)}: give it with inject={{{missing[0]!r}: ...}}",
                    param="inject",
                )


def _each(tools: Iterable[Any]) -> Iterator[Tool[..., Any]]:
    for tool in tools:
        if isinstance(tool, Tool):
            yield tool
        elif callable(tool):
            yield Tool(tool)
        elif isinstance(tool, Iterable) and not isinstance(tool, (str, bytes, Mapping)):
            yield from _each(tool)
        else:
            raise InvalidRequest(f"{tool!r} is no tool: give functions, tools or tool sets", param="tools")
