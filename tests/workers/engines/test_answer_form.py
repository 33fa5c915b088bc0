"""What response_format, tools and tool_choice ask for becomes a grammar that holds real tokens."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from modelbus_broker.errors import InvalidRequest, UnsupportedField
from modelbus_broker.messages import Chat, ChatMessage
from modelbus_workers.engines.torch_model.answer_form import AnswerForm, answer_form
from modelbus_workers.engines.torch_model.call_formats import (
    HERMES,
    LLAMA3_JSON,
    MISTRAL_ARGS,
    MISTRAL_LIST,
    CallFormat,
)
from modelbus_workers.engines.torch_model.grammar import Constraint, Grammars

from tests.helpers.smollm2 import smollm2_with

pytest.importorskip("llguidance")
transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}, "unit": {"$ref": "#/$defs/unit"}},
            "required": ["city", "unit"],
            "additionalProperties": False,
            "$defs": {"unit": {"enum": ["celsius", "kelvin"]}},
        },
    },
}
TIME = {"type": "function", "function": {"name": "get_time"}}
PARIS = ("get_weather", '{"city": "Paris", "unit": "kelvin"}')
NOON = ("get_time", '{"zone": 0}')
#: In one vocabulary the marks are ordinary text, in another tokens of their own, special or not.
VOCABULARIES: dict[str, dict[str, bool]] = {
    "text": {},
    "special": dict.fromkeys(("<tool_call>", "</tool_call>", "<|python_tag|>", "[TOOL_CALLS]", "[ARGS]"), True),
    "added": dict.fromkeys(("<tool_call>", "</tool_call>", "<|python_tag|>", "[TOOL_CALLS]", "[ARGS]"), False),
}


def chat(**fields: Any) -> Chat:
    return Chat(messages=[ChatMessage(role="user", content="?")], **fields)


def schema(schema: dict[str, Any]) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}


class Vocabulary:
    def __init__(self, folder: Path) -> None:
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
        self.grammars = Grammars.of_tokenizer(self.tokenizer, 49152, frozenset({2}))
        self.tokens = {token.content: number for number, token in self.tokenizer.added_tokens_decoder.items()}

    def constraint(self, form: AnswerForm) -> Constraint:
        grammar = self.grammars.compile(form)
        assert grammar is not None
        return grammar.constraint()

    def takes(self, form: AnswerForm, text: str) -> bool:
        """Whether the grammar allows exactly these tokens and then the end."""
        import torch

        constraint = self.constraint(form)
        for token in [*self.tokenizer(text)["input_ids"], 2]:
            if constraint.complete:
                return bool(token == 2)
            if constraint.held(torch.zeros(49152))[token] == float("-inf"):
                return False
            constraint.take(token)
        return True


@pytest.fixture(scope="module", params=list(VOCABULARIES))
def vocabulary(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Vocabulary:
    folder = tmp_path_factory.mktemp("vocabulary") / request.param
    return Vocabulary(smollm2_with(folder, template="{{ messages }}", words=VOCABULARIES[request.param]))


def calls(format: CallFormat, *written: tuple[str, str]) -> str:
    return format.opening + format.joint.join(format.written(*call) for call in written) + format.closing


@pytest.mark.parametrize("format", [HERMES, LLAMA3_JSON, MISTRAL_LIST, MISTRAL_ARGS], ids=lambda f: str(f.name))
def test_a_forced_call_can_be_written_and_nothing_else(vocabulary: Vocabulary, format: CallFormat) -> None:
    tokens = {word: token for word, token in vocabulary.tokens.items() if word in format.markers}

    def form(choice: object, **fields: Any) -> AnswerForm:
        return answer_form(chat(tools=[WEATHER, TIME], tool_choice=choice, **fields), format, tokens)

    required, named = form("required"), form({"type": "function", "function": {"name": "get_weather"}})
    single = form("required", parallel_tool_calls=False)
    one, two = calls(format, PARIS), calls(format, PARIS, NOON)

    assert vocabulary.takes(required, one) and vocabulary.takes(required, two)
    assert vocabulary.takes(single, one) and not vocabulary.takes(single, two)
    assert vocabulary.takes(named, one) and not vocabulary.takes(named, calls(format, NOON))
    assert not vocabulary.takes(required, calls(format, ("dance", "{}")))
    assert not vocabulary.takes(required, calls(format, ("get_weather", '{"city": "Paris", "unit": "rankine"}')))
    assert not vocabulary.takes(required, "It is raining.")
    assert (required.one_call, named.one_call, single.one_call) == (False, True, True)


def test_a_schema_holds_the_answer(vocabulary: Vocabulary) -> None:
    form = answer_form(
        chat(response_format=schema({"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]})), None, {}
    )  # fmt: skip
    assert vocabulary.takes(form, '{"a": 12}') and vocabulary.takes(form, '{\n  "a": 1,\n  "b": "日本 😀"\n}')
    assert not vocabulary.takes(form, '{"b": 1}') and not vocabulary.takes(form, '{"a": "x"}')
    anything = answer_form(chat(response_format={"type": "json_object"}), None, {})
    assert vocabulary.takes(anything, '{"b": [1, {"c": null}]}') and not vocabulary.takes(anything, "[1]")


def test_with_tools_and_a_schema_the_model_may_call_or_answer(vocabulary: Vocabulary) -> None:
    tokens = {word: token for word, token in vocabulary.tokens.items() if word in HERMES.markers}
    form = answer_form(chat(tools=[TIME], response_format={"type": "json_object"}), HERMES, tokens)
    assert vocabulary.takes(form, '{"a": 1}') and vocabulary.takes(form, calls(HERMES, NOON))
    assert not vocabulary.takes(form, "Hello")


def test_blanks_in_json_come_to_an_end(vocabulary: Vocabulary) -> None:
    form = answer_form(chat(response_format={"type": "json_object"}), None, {})
    assert vocabulary.takes(form, '{"a":' + 40 * "\n" + "1}") and not vocabulary.takes(form, '{"a":' + 60 * "\n" + "1}")


def test_what_asks_for_no_form_has_no_grammar() -> None:
    assert answer_form(chat(), HERMES, {}) == AnswerForm()
    assert answer_form(chat(response_format={"type": "text"}), None, {}) == AnswerForm()
    assert answer_form(chat(tools=[TIME], tool_choice="none"), None, {}) == AnswerForm()
    free = answer_form(chat(tools=[TIME]), HERMES, {})
    assert (free.calls, free.tools, free.grammar) == (HERMES, frozenset({"get_time"}), "")


def with_parameters(parameters: object, **function: Any) -> list[dict[str, Any]]:
    return [TIME, {"type": "function", "function": {"name": "f", "parameters": parameters, **function}}]


@pytest.mark.parametrize(
    ("fields", "error", "param", "words"),
    [
        ({"response_format": {"type": "json_schema"}}, InvalidRequest, "response_format", "json_schema.schema"),
        ({"response_format": {"type": "poem"}}, UnsupportedField, "response_format", "poem"),
        ({"response_format": schema({"type": "objekt"})}, InvalidRequest, "response_format", "objekt"),
        ({"response_format": schema({"$ref": "#/nowhere"})}, InvalidRequest, "response_format", "nowhere"),
        ({"response_format": schema({"not": {}})}, InvalidRequest, "response_format", "not"),
        ({"response_format": schema({"pattern": "(", "type": "string"})}, InvalidRequest, "response_format", "regex"),
        ({"tools": [{"type": "function"}]}, InvalidRequest, "tools[0].function", "name"),
        ({"tools": [TIME], "tool_choice": "dance"}, InvalidRequest, "tool_choice", "required"),
        ({"tools": [TIME], "tool_choice": {"type": "function", "function": {"name": "g"}}}, InvalidRequest, "tool_choice", "one of the tools"),
        ({"tool_choice": "required"}, InvalidRequest, "tool_choice", "only allowed when"),
        ({"tools": with_parameters([]), "tool_choice": "required"}, InvalidRequest, "tools[1].function.parameters", "JSON schema"),
        ({"tools": with_parameters({"properties": {"a": {"type": "objekt"}}}), "tool_choice": "required"}, InvalidRequest,
         "tools[1].function.parameters", "objekt"),
        ({"tools": with_parameters({"not": {}}, strict=True), "tool_choice": "required"}, InvalidRequest,
         "tools[1].function.parameters", "not"),
    ],
)  # fmt: skip
def test_what_makes_no_grammar_is_refused_by_name(
    plain: Vocabulary, fields: dict[str, Any], error: type[Exception], param: str, words: str
) -> None:
    with pytest.raises(error, match=words) as caught:
        plain.grammars.compile(answer_form(chat(**fields), HERMES, {}))
    assert getattr(caught.value, "param", "") == param


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Vocabulary:
    return Vocabulary(smollm2_with(tmp_path_factory.mktemp("v") / "plain", template="{{ messages }}", words={}))


def test_tools_of_a_model_that_cannot_call_are_refused() -> None:
    with pytest.raises(UnsupportedField, match="tool_parser") as caught:
        answer_form(chat(tools=[TIME]), None, {})
    assert caught.value.param == "tools"


def test_arguments_whose_schema_says_more_than_a_grammar_can_are_held_to_the_rest(plain: Vocabulary) -> None:
    parameters = {"properties": {"a": {"type": "integer"}}, "required": ["a"], "not": {"required": ["b"]}}
    form = answer_form(chat(tools=with_parameters(parameters), tool_choice="required"), HERMES, {})
    assert plain.takes(form, calls(HERMES, ("f", '{"a": 1}')))
    assert not plain.takes(form, calls(HERMES, ("f", '{"a": "x"}')))


def test_the_same_form_is_compiled_once_and_choices_do_not_share_their_place(plain: Vocabulary) -> None:
    def form() -> AnswerForm:
        return answer_form(chat(response_format={"type": "json_object"}), None, {})

    assert plain.grammars.compile(form()) is plain.grammars.compile(form())
    first, second = plain.constraint(form()), plain.constraint(form())
    brace = plain.tokenizer('{"')["input_ids"][0]
    first.take(brace)
    second.take(brace)
    assert not first.complete


def test_names_of_tools_cannot_break_out_of_the_grammar(plain: Vocabulary) -> None:
    name = 'say "hi" \\ { | %json'
    tool = {"type": "function", "function": {"name": name}}
    form = answer_form(chat(tools=[tool], tool_choice="required"), HERMES, {})
    assert plain.takes(form, calls(HERMES, (json.dumps(name)[1:-1], "{}")))
