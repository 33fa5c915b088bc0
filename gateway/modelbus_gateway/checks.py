"""Checks that the routes share: each raises ``InvalidRequest`` with the field in ``param``, in the words of the OpenAI API. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple, TypeVar

from modelbus_broker.errors import InvalidRequest

V = TypeVar("V")

MAX_INPUTS = 2048
#: OpenAI's bounds of metadata and attributes, and of how long a file may live after it was made.
MAX_PAIRS, MAX_KEY_CHARS, MAX_VALUE_CHARS = 16, 64, 512
LEAST_LIFE_S, MOST_LIFE_S = 3600, 30 * 24 * 3600


class Need(NamedTuple):
    """A field that asks for a capability of the engine."""

    param: str
    capability: str


def timeout(timeout_s: float | None) -> float:
    if timeout_s is None:
        return 0.0
    if not 0 < timeout_s <= 7 * 86400:
        raise InvalidRequest(
            f"Invalid 'timeout': expected seconds > 0 and <= 604800, but got {timeout_s:g} instead.", param="timeout"
        )
    return timeout_s


def texts(given: str | list[str | int | list[int]], param: str, needs: list[Need]) -> list[str | list[int]]:
    """One text, one list of token ids, or a list of either, as a list."""
    if isinstance(given, str):
        if not given and param == "input":
            raise InvalidRequest("Invalid 'input': empty string.", param=param)
        return [given]
    if not given:
        raise InvalidRequest(f"Invalid '{param}': empty array. Expected at least one element.", param=param)
    if isinstance(given[0], int):
        given = [token_ids(given, param)]
    if len(given) > MAX_INPUTS:
        raise InvalidRequest(
            f"Invalid '{param}': array too long. Expected an array with maximum length {MAX_INPUTS}, "
            f"but got an array with length {len(given)} instead.",
            param=param,
        )
    result: list[str | list[int]] = []
    tokens = False
    for index, item in enumerate(given):
        if isinstance(item, int):
            raise InvalidRequest(
                f"Invalid type for '{param}[{index}]': texts and tokens are mixed.", param=f"{param}[{index}]"
            )
        if not item and (param == "input" or not isinstance(item, str)):
            raise InvalidRequest(f"Invalid '{param}[{index}]': it is empty.", param=f"{param}[{index}]")
        if not isinstance(item, str):
            tokens = True
            token_ids(item, param)
        result.append(item)
    if tokens:
        needs.append(Need(param, "token_prompts"))
    return result


def token_ids(given: Sequence[object], param: str) -> list[int]:
    for index, token in enumerate(given):
        if not isinstance(token, int) or not 0 <= token < 2**31:
            raise InvalidRequest(f"Invalid '{param}[{index}]': {token!r} is no token id.", param=f"{param}[{index}]")
    return list(given)  # type: ignore[arg-type]  # all are ints: just seen


def integer(param: str, value: int, least: int, most: int | None = None) -> None:
    if value < least:
        raise InvalidRequest(
            f"Invalid '{param}': integer below minimum value. Expected a value >= {least}, but got {value} instead.",
            param=param,
        )
    if most is not None and value > most:
        raise InvalidRequest(
            f"Invalid '{param}': integer above maximum value. Expected a value <= {most}, but got {value} instead.",
            param=param,
        )


def decimal(param: str, value: float, least: float, most: float) -> None:
    if value < least:
        raise InvalidRequest(
            f"Invalid '{param}': decimal below minimum value. Expected a value >= {least:g}, but got {value:g} instead.",
            param=param,
        )
    if value > most:
        raise InvalidRequest(
            f"Invalid '{param}': decimal above maximum value. Expected a value <= {most:g}, but got {value:g} instead.",
            param=param,
        )


def life_s(param: str, anchor: str | None, seconds: int) -> int:
    """How long something lives after it was made. ``param`` has a place for the name of the field: ``expires_after.{}``."""
    if anchor != "created_at":
        raise not_one_of(param.format("anchor"), anchor, ("created_at",))
    integer(param.format("seconds"), seconds, LEAST_LIFE_S, MOST_LIFE_S)
    return seconds


def pairs(param: str, given: Mapping[str, V] | None, reserved: tuple[str, ...] = ()) -> dict[str, V]:
    """Metadata or attributes; no key begins with what is reserved."""
    given = given or {}
    if len(given) > MAX_PAIRS:
        raise InvalidRequest(f"Invalid '{param}': at most {MAX_PAIRS} pairs, not {len(given)}.", param=param)
    for key, value in given.items():
        if not 1 <= len(key) <= MAX_KEY_CHARS or key.startswith(reserved):
            but = f" and does not begin with {' or '.join(reserved)}" if reserved else ""
            raise InvalidRequest(f"Invalid '{param}': a key has 1 to {MAX_KEY_CHARS} characters{but}.", param=param)
        if isinstance(value, str) and len(value) > MAX_VALUE_CHARS:
            raise InvalidRequest(f"Invalid '{param}.{key}': at most {MAX_VALUE_CHARS} characters.", param=param)
    return dict(given)


def not_one_of(param: str, value: object, choices: Sequence[str]) -> InvalidRequest:
    return InvalidRequest(
        f"Invalid value: {value!r}. Supported values are: {', '.join(repr(choice) for choice in choices)}.",
        param=param,
    )
