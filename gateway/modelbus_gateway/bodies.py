"""Decodes the JSON bodies of requests. What is wrong with one is told with the place of it."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any, Generic, TypeVar

import msgspec
from modelbus_broker.errors import InvalidRequest

T = TypeVar("T")


class Body(Generic[T]):
    """Decodes the bodies of one route."""

    def __init__(self, kind: type[T]) -> None:
        self._kind = kind
        self._decode = msgspec.json.Decoder(kind).decode

    def read(self, body: bytes) -> T:
        """Raises InvalidRequest, with ``param`` when a field is at fault."""
        try:
            return self._decode(body)
        except msgspec.ValidationError as error:
            raise self._wrong_type(body, str(error)) from error
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise InvalidRequest(f"We could not parse the JSON body of your request: {error}") from error
        except RecursionError as error:
            raise InvalidRequest("We could not parse the JSON body of your request: it is nested too deeply") from error

    def _wrong_type(self, body: bytes, words: str) -> InvalidRequest:
        reason, _, path = words.partition(" - at `$")
        path = path.rstrip("`")
        if "[...]" in path:
            path = _with_indices(msgspec.json.decode(body), self._kind, words, path)
        missing = re.fullmatch(r"Object missing required field `(\w+)`", reason)
        if missing:
            param = f"{path}.{missing[1]}".lstrip(".")
            return InvalidRequest(f"Missing required parameter: '{param}'.", param=param)
        param = path.lstrip(".")
        if not param:
            return InvalidRequest(f"Invalid request body: {reason[0].lower()}{reason[1:]}.")
        return InvalidRequest(f"Invalid type for '{param}': {reason[0].lower()}{reason[1:]}.", param=param)


def _with_indices(value: Any, kind: type[Any], words: str, path: str) -> str:
    """The path with the ``[...]`` of the decoder replaced by the first place that is wrong.

    Each list on the way is cut down to one element at a time until the same complaint comes back.
    """
    found, parent = "", value
    *steps, last = path.split("[...]")
    for step in steps:
        found += step
        for index, name in re.findall(r"\[(\d+)\]|([^.\[\]]+)", step):
            parent = parent[name or int(index)]
        keys: Iterable[Any] = list(parent) if isinstance(parent, dict) else range(len(parent))
        whole = parent.copy()
        for key in keys:
            parent.clear()
            if isinstance(parent, dict):
                parent[key] = whole[key]
            else:
                parent.append(whole[key])
            try:
                msgspec.convert(value, kind)
            except msgspec.ValidationError as error:
                if str(error) == words:
                    found += f".{key}" if isinstance(parent, dict) else f"[{key}]"
                    parent = whole[key]
                    break
        else:  # the place depends on more than one element
            return path.replace("[...]", "[]")
    return found + last
