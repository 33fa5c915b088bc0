"""Tool calls told from text: every format, cut into pieces anywhere."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from modelbus_broker.errors import ConfigurationError
from modelbus_workers.engines.torch_model.call_formats import (
    HERMES,
    LLAMA3_JSON,
    MISTRAL_ARGS,
    MISTRAL_LIST,
    CallFormat,
    choose_format,
)
from modelbus_workers.engines.torch_model.call_parser import CallParser

FORMATS = [HERMES, LLAMA3_JSON, MISTRAL_LIST, MISTRAL_ARGS]
TOOLS = {"get_weather", "get_time"}
ARGUMENTS = ['{"city": "Paris", "days": [1, 2], "note": "a } \\" </tool_call> ] {"}', "{}", '{\n "a": {"b": null}\n}']


def read(format: CallFormat, pieces: list[str], *, cut: bool = False) -> tuple[str, list[tuple[str, str]]]:
    """The content, and name and arguments of each call."""
    parser = CallParser(format, TOOLS, lambda number: f"id{number}")
    text, calls = "", list[tuple[str, str]]()
    for piece in [*map(parser.add, pieces), parser.finish(cut=cut)]:
        text += piece.text
        for call in piece.calls:
            if call.name:
                assert (call.index, call.id, call.arguments) == (len(calls), f"id{len(calls)}", "")
                calls.append((call.name, ""))
            else:
                assert call.index == len(calls) - 1 and call.arguments
                calls[-1] = (calls[-1][0], calls[-1][1] + call.arguments)
    assert parser.calls == len(calls)
    return text, calls


def written(format: CallFormat, calls: list[tuple[str, str]]) -> str:
    return format.opening + format.joint.join(format.written(*call) for call in calls) + format.closing


@pytest.mark.parametrize("format", FORMATS, ids=lambda format: f"{format.name} {format.before_name!r}")
@given(
    calls=st.lists(st.tuples(st.sampled_from(sorted(TOOLS)), st.sampled_from(ARGUMENTS)), min_size=1, max_size=3),
    cuts=st.lists(st.integers(0, 400), max_size=12),
)
def test_calls_are_read_however_the_text_comes(
    format: CallFormat, calls: list[tuple[str, str]], cuts: list[int]
) -> None:
    text = written(format, calls)
    places = sorted({0, len(text), *(cut for cut in cuts if cut < len(text))})

    assert read(format, [text[a:b] for a, b in zip(places, places[1:], strict=False)]) == ("", calls)


@pytest.mark.parametrize("format", FORMATS, ids=lambda format: f"{format.name} {format.before_name!r}")
def test_a_call_cut_at_any_place_shows_no_piece_of_itself_as_content(format: CallFormat) -> None:
    text = written(format, [("get_weather", ARGUMENTS[0]), ("get_time", "{}")])
    for length in range(len(text)):
        content, calls = read(format, list(text[:length]), cut=True)
        # What may be ordinary text is shown: half a mark, and an object whose name is not known yet.
        assert content == "" or (not calls and (format.begin.startswith(content) or format.bare))
        assert '"parameters": {' not in content
        assert [name for name, _ in calls] == ["get_weather", "get_time"][: len(calls)]
        if calls:
            assert ARGUMENTS[0].startswith(calls[0][1])


@pytest.mark.parametrize("format", FORMATS, ids=lambda format: f"{format.name} {format.before_name!r}")
@given(text=st.text(st.sampled_from('ab <{"[\n]}tool_call>:'), max_size=30), cuts=st.lists(st.integers(0, 30)))
def test_text_without_calls_is_shown_whole(format: CallFormat, text: str, cuts: list[int]) -> None:
    places = sorted({0, len(text), *(cut for cut in cuts if cut < len(text))})

    assert read(format, [text[a:b] for a, b in zip(places, places[1:], strict=False)]) == (text, [])


@pytest.mark.parametrize(
    ("format", "text", "content", "calls"),
    [
        # Text before and after, blanks left out.
        (HERMES, 'Let me see.\n\n<tool_call>{"name": "get_time", "arguments": {"z": 1}}</tool_call>\nDone.',
         "Let me see.Done.", [("get_time", '{"z": 1}')]),
        # Other orders, arguments as a text, none at all.
        (HERMES, '<tool_call>{"arguments": {"z": 1}, "name": "get_time"}</tool_call>', "", [("get_time", '{"z": 1}')]),
        (HERMES, '<tool_call>{"name": "get_time", "arguments": "{\\"z\\": 1}"}</tool_call>', "", [("get_time", '{"z": 1}')]),
        (HERMES, '<tool_call>{"name": "get_time"}</tool_call>', "", [("get_time", "{}")]),
        # A tool that nobody offered is the client's business; the mark says that it is a call.
        (HERMES, '<tool_call>{"name": "dance", "arguments": {}}</tool_call>', "", [("dance", "{}")]),
        # The end mark is missing.
        (HERMES, '<tool_call>\n{"name": "get_time", "arguments": {}}', "", [("get_time", "{}")]),
        # No JSON: ordinary text, unless it was known to be a call.
        (HERMES, "<tool_call>\nnothing</tool_call>", "<tool_call>\nnothing</tool_call>", []),
        (HERMES, '<tool_call>{"name": oops}</tool_call> x', '<tool_call>{"name": oops}</tool_call> x', []),
        (HERMES, '<tool_call>{"name": "get_time", "arguments": {"a": oops}}</tool_call>yes', "yes", [("get_time", '{"a": ')]),
        (HERMES, "a <tool_ b <tool_call", "a <tool_ b <tool_call", []),
        # An object that is none of the tools is an answer.
        (LLAMA3_JSON, '{"name": "Bob", "age": 3}', '{"name": "Bob", "age": 3}', []),
        (LLAMA3_JSON, '{"name": "get_time", "age": 3}', '{"name": "get_time", "age": 3}', []),
        (LLAMA3_JSON, '\n{"colour": "red"} ', '\n{"colour": "red"} ', []),
        (LLAMA3_JSON, '{"name": "dance", "parameters": {}}', '{"name": "dance", "parameters": {}}', []),
        (LLAMA3_JSON, 'Well: {"name": "get_time", "parameters": {}}', 'Well: {"name": "get_time", "parameters": {}}', []),
        (LLAMA3_JSON, '<|python_tag|>{"type": "function", "name": "get_time", "parameters": {}}', "", [("get_time", "{}")]),
        (LLAMA3_JSON, '{"name": "get_time", "parameters": {}};{"name": "get_time", "parameters": {"z": 2}}', "",
         [("get_time", "{}"), ("get_time", '{"z": 2}')]),
        # Mistral's two spellings, both read.
        (MISTRAL_LIST, 'Hm. [TOOL_CALLS] [ {"name": "get_time", "arguments": {}, "id": "abc"} ]', "Hm.", [("get_time", "{}")]),
        (MISTRAL_LIST, '[TOOL_CALLS]get_time[CALL_ID]abc123[ARGS]{"z": 1}', "", [("get_time", '{"z": 1}')]),
        (MISTRAL_ARGS, '[TOOL_CALLS]get_time{"z": 1}[TOOL_CALLS]get_weather[ARGS]{}', "",
         [("get_time", '{"z": 1}'), ("get_weather", "{}")]),
        (MISTRAL_ARGS, "[TOOL_CALLS] of course, dear", "[TOOL_CALLS] of course, dear", []),
    ],
)  # fmt: skip
def test_what_models_really_write(format: CallFormat, text: str, content: str, calls: list[tuple[str, str]]) -> None:
    assert read(format, [text]) == (content, calls)
    assert read(format, list(text)) == (content, calls)


def test_arguments_are_passed_on_as_they_come() -> None:
    parser = CallParser(HERMES, TOOLS, str)
    begun = parser.add('<tool_call>\n{"name": "get_weather", "arguments": {"ci')
    more = parser.add('ty": "Par')
    assert [(call.name, call.arguments) for call in begun.calls] == [("get_weather", ""), ("", '{"ci')]
    assert [call.arguments for call in more.calls] == ['ty": "Par']
    assert parser.ended == 0
    parser.add('is"}}')
    assert parser.ended == 1


@pytest.mark.parametrize(
    ("template", "wanted", "format"),
    [
        ("{{ messages }}", "auto", HERMES),
        ("{{ messages }}", "none", None),
        ("", "auto", None),
        ("{{ tools }} <tool_call>", "auto", HERMES),
        ("{{ tools }} <tool_call><function=x>", "auto", None),
        ("{{ tools }} <tool_call>x<arg_key>", "auto", None),
        ("{{ tools }} <tool_call><function=x>", "hermes", HERMES),
        ("{{ tools }} <|python_tag|>", "auto", LLAMA3_JSON),
        ('{{ tools }} {"name": function name, "parameters": dictionary of argument name and its value}', "auto", LLAMA3_JSON),
        ("{{ tools }} [TOOL_CALLS]", "auto", MISTRAL_LIST),
        ("{{ tools }} [TOOL_CALLS] [ARGS]", "auto", MISTRAL_ARGS),
        ("{{ tools }} [ARGS]", "mistral", MISTRAL_ARGS),
        ("{{ tools }} <|tool_call|>", "auto", None),
    ],
)  # fmt: skip
def test_the_format_is_told_from_the_template(template: str, wanted: str, format: CallFormat | None) -> None:
    assert choose_format(template, wanted) == format  # type: ignore[arg-type]


def test_a_format_that_the_prompt_would_not_ask_for_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="knows no tools: it can be hermes or none"):
        choose_format("{{ messages }}", "mistral")


def test_written_calls_are_json_where_the_format_says_so() -> None:
    call = LLAMA3_JSON.written("get_time", '{"z": 1}')
    assert json.loads(call) == {"name": "get_time", "parameters": {"z": 1}}
