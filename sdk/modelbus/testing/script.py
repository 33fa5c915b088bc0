"""What a scripted model says and does, as data: written in Python, in a JSON file, or as a deployment's parameters."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Literal

import msgspec
from modelbus_broker.errors import ConfigurationError
from modelbus_broker.messages import FinishReason

from .faults import Turns, error_named

Malformation = Literal["cut", "fenced", "prose", "wrong"]


class ScriptedCall(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A call of a tool."""

    name: str
    arguments: dict[str, Any] | str = {}  #: a text goes out as it is, however wrong


class ScriptedAnswer(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One answer: text, calls, or an error."""

    text: str = ""
    tool_calls: list[ScriptedCall] = []
    reasoning: str = ""
    refusal: str = ""
    finish_reason: FinishReason = ""  #: "": tool_calls, length or stop, as it comes
    delay_ms: float = 0.0  #: before the first token
    error: str = ""  #: a code of modelbus.errors: it fails with this
    error_text: str = "the script says so"
    after_tokens: int = 0  #: so many of its tokens still come before the error
    probabilities: dict[str, float] = {}  #: of the first token, for who asks for logprobs


class Rule(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What is answered whenever the last message has something that matches."""

    pattern: str  #: a regular expression, found anywhere in the text
    answer: str | ScriptedAnswer


class Behaviour(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How answers come, and what goes wrong. ``fail``, ``cut`` and ``malform`` say to which requests:
    never, always, first:N, every:N."""

    text: str = ""  #: what is answered where nothing else is asked for; "": the last message
    chunks: int = 4  #: in how many pieces an answer comes; 0: one for each token
    delay_ms: float = 0.0  #: before the first token
    interval_ms: float = 0.0  #: between the pieces
    fail: str = "never"  #: requests that fail
    fail_after: int = 0  #: tokens that still come
    fail_code: str = "engine_failed"  #: a code of modelbus.errors
    fail_text: str = "the scripted model was told to fail"
    cut: str = "never"  #: answers that end with the reason length
    cut_after: int = 1  #: after so many tokens
    malform: str = "never"  #: answers whose JSON, of an answer or of a call's arguments, is spoilt
    #: cut: half of it is missing; fenced: words and a code fence around it; prose: no JSON at all; wrong: other JSON.
    malform_as: Malformation = "cut"
    tools: bool = True  #: takes tools
    json_schema: bool = True  #: takes response_format
    dimensions: int = 64  #: of embeddings


class Script(Behaviour, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A model's part. A request is answered by the first rule that matches, else by the next of the answers, else
    by the schema: with an instance of its ``response_format``, a call of each of its tools, once, or ``text``."""

    rules: list[Rule] = []
    answers: list[str | ScriptedAnswer] = []
    #: What comes when no rule matches and all answers are given; "": ``schema`` where there are none from the start.
    otherwise: Literal["", "schema", "fail"] = ""


def read_script(source: str | Path) -> Script:
    """The script in a JSON file, or in a JSON text (which begins with ``{``).

    Raises:
        ConfigurationError: the file cannot be read, or it is no script; the message says where.
    """
    text = str(source)
    if not text.lstrip().startswith("{"):
        try:
            text = Path(source).read_text()
        except OSError as error:
            raise ConfigurationError(f"the script {str(source)!r} cannot be read: {error.strerror}") from error
    try:
        script = msgspec.json.decode(text, type=Script)
    except msgspec.DecodeError as error:
        raise ConfigurationError(f"this is no script of a model: {error}") from None
    check_script(script)
    return script


def check_script(script: Script) -> None:
    """
    Raises:
        ConfigurationError: a value makes no sense; the message names it.
    """
    for rule in script.rules:
        try:
            re.compile(rule.pattern)
        except re.error as error:
            raise ConfigurationError(f"{rule.pattern!r} is no regular expression: {error}") from None
    answers = [*script.answers, *(rule.answer for rule in script.rules)]
    for answer in answers:
        if isinstance(answer, ScriptedAnswer) and answer.error:
            error_named(answer.error, "")
    error_named(script.fail_code, script.fail_text)
    for name in ("fail", "cut", "malform"):
        Turns(name, getattr(script, name))
    for name in ("chunks", "delay_ms", "interval_ms", "fail_after"):
        if getattr(script, name) < 0:
            raise ConfigurationError(f"parameter {name} must not be negative")
    for name in ("cut_after", "dimensions"):
        if getattr(script, name) < 1:
            raise ConfigurationError(f"parameter {name} must be at least 1")
