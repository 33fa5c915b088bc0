"""Checks that the routes share: each raises ``InvalidRequest`` with the field in ``param``, in the words of the OpenAI API. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from modelbus_broker.errors import InvalidRequest

MAX_INPUTS = 2048


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


def not_one_of(param: str, value: object, choices: Sequence[str]) -> InvalidRequest:
    return InvalidRequest(
        f"Invalid value: {value!r}. Supported values are: {', '.join(repr(choice) for choice in choices)}.",
        param=param,
    )
