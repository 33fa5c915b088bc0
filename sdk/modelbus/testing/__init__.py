"""Models for the tests of those who build on modelbus: no weights, no provider, the same answer every time.

| for | use |
|---|---|
| a model that says what you say | ``ScriptedModel("answer", ...)``, with ``rules=`` or ``respond=`` |
| a model that satisfies any schema and calls each tool once | ``ScriptedModel()`` |
| the same on a real bus | the engine ``scripted`` |
| real answers, once more | ``Recorder`` and ``Replay`` |
| all that a process asks, answered by one of these | ``with stand_in(model):``, ``with record(path):``, ``with replay(path):`` |

Names are imported on first use: the engine ``echo`` needs little of this.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .echo import EchoAnswer, count_tokens, echo_answer, echo_logprob, echo_vector, pieces, token_id
    from .model import Asked, ScriptedModel
    from .programs import record, replay, stand_in
    from .recording import Recorder, Replay
    from .script import Behaviour, Rule, Script, ScriptedAnswer, ScriptedCall, read_script

_HOMES = {
    "echo": ("EchoAnswer", "count_tokens", "echo_answer", "echo_logprob", "echo_vector", "pieces", "token_id"),
    "model": ("Asked", "ScriptedModel"),
    "programs": ("record", "replay", "stand_in"),
    "recording": ("Recorder", "Replay"),
    "script": ("Behaviour", "Rule", "Script", "ScriptedAnswer", "ScriptedCall", "read_script"),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    "Asked", "Behaviour", "EchoAnswer", "Recorder", "Replay", "Rule", "Script", "ScriptedAnswer", "ScriptedCall",
    "ScriptedModel", "count_tokens", "echo_answer", "echo_logprob", "echo_vector", "pieces", "read_script", "record", "replay",
    "stand_in", "token_id",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    home = _HOME_OF.get(name)
    if home is None:
        raise AttributeError(f"module 'modelbus.testing' has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f"modelbus.testing.{home}"), name)
    return value
