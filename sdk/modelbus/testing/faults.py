"""Faults on demand: which requests they come to (``never``, ``always``, ``first:N``, ``every:N``), and errors by code."""

from __future__ import annotations

import re

from modelbus_broker.errors import ConfigurationError, ModelBusError, error_of
from modelbus_broker.messages import Failed

_WHEN = re.compile(r"never|always|(?P<how>first|every):(?P<count>[1-9][0-9]*)")


class Turns:
    """Counts requests, and says of each whether its turn has come."""

    def __init__(self, name: str, when: str) -> None:
        """
        Args:
            name: of the parameter, for the error text.

        Raises:
            ConfigurationError: ``when`` is none of the four forms.
        """
        match = _WHEN.fullmatch(when)
        if match is None:
            raise ConfigurationError(f"parameter {name} is never, always, first:N or every:N, not {when!r}")
        self._requests = 0
        self._always = when == "always"
        self._how = match["how"]
        self._count = int(match["count"] or 0)

    def next(self) -> bool:
        """Whether it happens to the next request."""
        self._requests += 1
        if self._how is None:
            return self._always
        return self._requests <= self._count if self._how == "first" else self._requests % self._count == 0


def error_named(code: str, text: str) -> ModelBusError:
    """The error that a worker's ``Failed`` frame with this code becomes.

    Raises:
        ConfigurationError: there is no such code.
    """
    error = error_of(Failed(id="", run="", seq=0, code=code, message=text, status=0))
    if error.code != code:
        raise ConfigurationError(f"parameter fail_code: there is no error code {code!r}")
    return error
