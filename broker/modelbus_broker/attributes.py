"""What may be an attribute of a chunk. Search services refuse everything else; who sends attributes can see before. Pure."""

from __future__ import annotations

import math
import re

from .messages.search import Value

MAX_NAME_CHARS = 64
MAX_STRING_CHARS = 4096
#: Integers beyond this are not exact as doubles, which is what filters compare.
MAX_INTEGER = 2**53

_BAD_IN_NAME = re.compile(r'["\\.*\x00-\x1f\x7f]')


def name_problem(name: str) -> str:
    """Why this can be no attribute's name; "" if it can."""
    if (
        not name
        or len(name) > MAX_NAME_CHARS
        or name.startswith("$")
        or _BAD_IN_NAME.search(name)
        or name != name.strip()
    ):
        return (
            f"{name!r} is no name for an attribute: 1 to {MAX_NAME_CHARS} characters, no dots, stars, quotes, backslashes "
            "or control characters, no $ at the beginning, no blanks around it"
        )
    return ""


def value_problem(name: str, value: Value) -> str:
    """Why an attribute cannot have this value; "" if it can."""
    if isinstance(value, str):
        if "\0" in value or len(value) > MAX_STRING_CHARS:
            return f"{name!r} has a NUL byte or more than {MAX_STRING_CHARS} characters: what is searched belongs into the text"
    elif isinstance(value, float) and not math.isfinite(value) or isinstance(value, int) and abs(value) > MAX_INTEGER:
        return f"{name!r} is {value}: numbers are finite, integers at most 2**53"
    return ""
