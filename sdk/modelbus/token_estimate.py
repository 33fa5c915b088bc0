"""Counts tokens where nobody says how many there are: a provider without usage, a conversation that must fit a budget.

The estimate is made for byte-pair vocabularies of 100,000 tokens and more: a character of a script without blanks
is a token, a run of letters or digits is one token per started six characters, any other visible character is one.
It is 10 to 20 % off for prose and worse for rare scripts; usage made of it says ``estimated``.
"""

from __future__ import annotations

import re

from modelbus_broker.messages import Chat, ChatMessage, Completion, Embedding

_WIDE = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af\uf900-\ufaff"
_TOKEN = re.compile(rf"[{_WIDE}]|[^\W{_WIDE}]{{1,6}}|[^\w\s]")
#: Characters from which on a text is counted by samples, so that one of megabytes holds nobody up; how many, how long.
_LONG, _SAMPLES, _SAMPLE = 1 << 19, 64, 1 << 12
#: What a chat template adds to each message, and to the answer's beginning.
_PER_MESSAGE, _PER_ANSWER = 4, 3


def estimate_text(text: str) -> int:
    """About how many tokens the text has; at least 1 if it has any character. Of a long one parts are counted, from all over
    it: at most 262,144 characters."""
    if len(text) < _LONG:
        return sum(1 for _ in _TOKEN.finditer(text)) or int(bool(text))
    last = len(text) - _SAMPLE
    starts = [last * number // (_SAMPLES - 1) for number in range(_SAMPLES)]
    found = sum(1 for start in starts for _ in _TOKEN.finditer(text, start, start + _SAMPLE))
    return max(1, round(found * len(text) / (_SAMPLES * _SAMPLE)))


def estimate_message(message: ChatMessage) -> int:
    """About how many tokens a turn of a conversation has, its calls of tools included; images count nothing."""
    calls = sum(estimate_text(call.function.name + call.function.arguments) for call in message.tool_calls or ())
    return _PER_MESSAGE + estimate_text(message.text()) + calls


def estimate_prompt(task: Chat | Completion | Embedding) -> int:
    """About how many tokens a task's prompt has; images and other parts count nothing."""
    match task:
        case Chat():
            return _PER_ANSWER + sum(map(estimate_message, task.messages))
        case Completion():
            return sum(estimate_text(p) if isinstance(p, str) else len(p) for p in task.prompt)
        case Embedding():
            return sum(estimate_text(p) if isinstance(p, str) else len(p) for p in task.input)
