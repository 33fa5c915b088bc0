"""Forms of an answer beyond OpenAI's fields: ``guided_json``, ``guided_regex``, ``guided_choice`` and ``guided_grammar``."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

from modelbus_broker.errors import InvalidRequest
from modelbus_broker.messages import Chat, Completion

from .answer_form import AnswerForm, Schema, schema_text

#: Fields that travel in a task's ``extra``.
GUIDED = ("guided_json", "guided_regex", "guided_choice", "guided_grammar")


def guided_form(task: Chat | Completion) -> AnswerForm | None:
    """The form that a request asks for by one of these fields; None if it has none.

    Raises:
        InvalidRequest: a field has a value that it cannot have, or the request asks for two forms.
    """
    asked = [name for name in GUIDED if task.extra.get(name) is not None]
    if not asked:
        return None
    others = ["response_format", "tools"] if isinstance(task, Chat) else []
    both = asked + [name for name in others if getattr(task, name)]
    if len(both) > 1:
        raise InvalidRequest(f"{' and '.join(both)} cannot be set at once", param=both[0])
    return _READERS[asked[0]](task.extra[asked[0]])


def _json(value: Any) -> AnswerForm:
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError:
            value = None
    if not isinstance(value, dict):
        raise InvalidRequest("guided_json must be a JSON schema", param="guided_json")
    schema = Schema(rule="answer", param="guided_json", text=schema_text(value, lenient=False))
    return AnswerForm(rules="start: answer", schemas=(schema,), param="guided_json")


def _regex(value: Any) -> AnswerForm:
    if not isinstance(value, str) or not value:
        raise InvalidRequest("guided_regex must be a regular expression", param="guided_regex")
    from llguidance import LLMatcher

    return AnswerForm(rules=LLMatcher.grammar_from_regex(value), param="guided_regex")


def _choice(value: Any) -> AnswerForm:
    if not isinstance(value, list) or not value or not all(isinstance(text, str) and text for text in value):
        raise InvalidRequest("guided_choice must be a list of texts", param="guided_choice")
    return AnswerForm(rules="start: " + " | ".join(map(json.dumps, value)), param="guided_choice")


def _grammar(value: Any) -> AnswerForm:
    if not isinstance(value, str) or not value:
        raise InvalidRequest("guided_grammar must be a grammar in Lark's form or in GBNF", param="guided_grammar")
    from llguidance.gbnf_to_lark import any_to_lark

    try:
        return AnswerForm(rules=any_to_lark(value), param="guided_grammar")
    except Exception as error:  # the converter raises what it likes
        raise InvalidRequest(f"guided_grammar cannot be read: {error}", param="guided_grammar") from error


_READERS: Mapping[str, Callable[[Any], AnswerForm]] = {
    "guided_json": _json,
    "guided_regex": _regex,
    "guided_choice": _choice,
    "guided_grammar": _grammar,
}
