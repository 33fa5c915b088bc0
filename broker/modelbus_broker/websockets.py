"""nats-py imported without aiohttp, which it wants for WebSockets only: a third of the time in which a command or a worker starts.

Whoever opens a connection over WebSockets in this process gets aiohttp then. Imported for that effect, before nats-py.
"""

from __future__ import annotations

import builtins
import importlib
import sys
from collections.abc import Mapping, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

_TRANSPORT = "nats.aio.transport"


class _Later:
    """Stands for a module until something of it is asked for."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, attribute: str) -> Any:
        return getattr(importlib.import_module(self._name), attribute)


def _import(
    name: str, globals: Mapping[str, Any] | None = None, locals: Mapping[str, Any] | None = None,
    fromlist: Sequence[str] = (), level: int = 0,
) -> Any:  # fmt: skip
    if name == "aiohttp" and not fromlist:
        return _Later(name)
    return builtins.__import__(name, globals, locals, fromlist, level)


class _Loading(Loader):
    """Runs the module with an ``import`` of its own: nothing outside it changes, not even for other threads."""

    def __init__(self, loader: Loader) -> None:
        self._loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        vars(module)["__builtins__"] = vars(builtins) | {"__import__": _import}
        self._loader.exec_module(module)


class _Finding(MetaPathFinder):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        spec = PathFinder.find_spec(fullname, path, target) if fullname == _TRANSPORT else None
        if spec is not None and spec.loader is not None:
            spec.loader = _Loading(spec.loader)
        return spec


def _import_nats() -> None:
    if "aiohttp" in sys.modules or _TRANSPORT in sys.modules:
        return
    finding = _Finding()
    sys.meta_path.insert(0, finding)
    try:
        importlib.import_module(_TRANSPORT)
    finally:
        sys.meta_path.remove(finding)


_import_nats()
