"""What must not get into a file of recordings is taken out: values of fields with such names, keys, tokens, passwords. Pure."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import msgspec
from modelbus_broker.calls import Answer
from modelbus_broker.messages import Delta, Task

from ..spec import is_secret

#: Takes what must not be written out of a text.
Redact = Callable[[str], str]
HIDDEN = "***"
_SECRETS = re.compile(
    r"""\bsk-[\w-]{12,} | \b(?:gh[pousr]|github_pat)_\w{16,} | \bAKIA[0-9A-Z]{12,} | \bxox[abp]-[\w-]{10,}
    | \bAIza[\w-]{20,} | \beyJ[\w-]{8,}\.[\w-]{8,}\.[\w-]{8,} | (?<=[Bb]earer\s)[\w.~+/-]{8,}=*
    | (?<=://)[^/@\s:"]+:[^/@\s"]+(?=@) | -----BEGIN[ ][A-Z ]*PRIVATE[ ]KEY-----.*?-----END[ ][A-Z ]*PRIVATE[ ]KEY-----
    | (?<=\w_key":\s")[^"]+ | (?<=\w_key":")[^"]+ | (?<=password":\s")[^"]+ | (?<=password":")[^"]+""",
    re.VERBOSE | re.DOTALL,
)


def cleaned_task(task: Task, redact: Redact | None = None) -> dict[str, Any]:
    """A task as it is written down: without what looks like a secret."""
    cleaned: dict[str, Any] = _without_secrets(msgspec.to_builtins(task), redact)
    return cleaned


def _without_secrets(value: Any, redact: Redact | None) -> Any:
    if isinstance(value, str):
        return cleaned(value, redact)
    if isinstance(value, list):
        return [_without_secrets(item, redact) for item in value]
    if isinstance(value, dict):
        return {
            name: HIDDEN if isinstance(inner, str) and is_secret(str(name), inner) else _without_secrets(inner, redact)
            for name, inner in value.items()
        }
    return value


def cleaned(text: str, redact: Redact | None) -> str:
    text = _SECRETS.sub(HIDDEN, text)
    return redact(text) if redact else text


def cleaned_frames(frames: Sequence[Answer], redact: Redact | None) -> list[Answer]:
    """A text that has a secret, which may lie across frames, is put whole into the first of them."""
    deltas = [frame for frame in frames if isinstance(frame, Delta)]
    for choice in {delta.choice for delta in deltas}:
        for field in ("text", "reasoning"):
            whole = "".join(getattr(delta, field) for delta in deltas if delta.choice == choice)
            if (clean := cleaned(whole, redact)) != whole:
                deltas = _replaced(deltas, choice, field, clean)
        deltas = _cleaned_calls(deltas, choice, redact)
    rest = iter(deltas)
    return [next(rest) if isinstance(frame, Delta) else frame for frame in frames]


def _replaced(deltas: list[Delta], choice: int, field: str, text: str) -> list[Delta]:
    found = []
    for delta in deltas:
        if delta.choice == choice:
            delta = msgspec.structs.replace(delta, **{field: text, "logprobs": []})
            text = ""
        found.append(delta)
    return found


def _cleaned_calls(deltas: list[Delta], choice: int, redact: Redact | None) -> list[Delta]:
    calls = [call for delta in deltas if delta.choice == choice for call in delta.tool_calls]
    clean = {}
    for index in {call.index for call in calls}:
        whole = "".join(call.arguments for call in calls if call.index == index)
        if cleaned(whole, redact) != whole:
            clean[index] = cleaned(whole, redact)
    if not clean:
        return deltas
    found = []
    for delta in deltas:
        if delta.choice == choice and delta.tool_calls:
            changed = [
                msgspec.structs.replace(call, arguments=clean[call.index]) if call.index in clean else call
                for call in delta.tool_calls
            ]
            clean.update({call.index: "" for call in delta.tool_calls if call.index in clean})
            delta = msgspec.structs.replace(delta, tool_calls=changed)
        found.append(delta)
    return found
