from __future__ import annotations

from modelbus.answers import AnswerBuilder
from modelbus_broker.messages import Delta, Done, Started, TokenLogprob, ToolCallDelta, Usage, Vectors


def delta(choice: int = 0, **fields: object) -> Delta:
    return Delta(id="s-0-0", run="1.1.w", seq=0, choice=choice, **fields)  # type: ignore[arg-type]


def test_the_pieces_of_a_choice_become_one_answer() -> None:
    builder = AnswerBuilder()
    for piece in (
        delta(reasoning="hm"),
        delta(text="Par"),
        delta(text="is", logprobs=[TokenLogprob(token="is", logprob=-0.5)]),
        delta(finish_reason="stop"),
    ):
        builder.add(piece)

    (choice,) = builder.choices

    assert (choice.text, choice.reasoning, choice.finish_reason) == ("Paris", "hm", "stop")
    assert [logprob.token for logprob in choice.logprobs] == ["is"]


def test_choices_stand_in_the_order_of_their_index() -> None:
    builder = AnswerBuilder()
    builder.add(delta(choice=1, text="b"))
    builder.add(delta(choice=0, text="a"))

    assert [(choice.index, choice.text) for choice in builder.choices] == [(0, "a"), (1, "b")]


def test_arguments_of_a_tool_call_are_joined_and_its_first_name_counts() -> None:
    builder = AnswerBuilder()
    builder.add(delta(tool_calls=[ToolCallDelta(index=0, id="c1", name="now", arguments='{"zone":')]))
    builder.add(delta(tool_calls=[ToolCallDelta(index=0, name="now", arguments='"utc"}')]))
    builder.add(delta(tool_calls=[ToolCallDelta(index=1, id="c2", name="add")], finish_reason="tool_calls"))

    first, second = builder.choices[0].tool_calls

    assert (first.id, first.function.name, first.function.arguments) == ("c1", "now", '{"zone":"utc"}')
    assert (second.id, second.function.name, second.function.arguments) == ("c2", "add", "")


def test_vectors_that_come_out_of_order_stand_in_the_order_of_the_inputs() -> None:
    builder = AnswerBuilder()
    builder.add(Vectors(id="i", run="r", seq=1, start=1, dimensions=1, data=[b"1", b"2"]))
    builder.add(Vectors(id="i", run="r", seq=0, start=0, dimensions=1, data=[b"0"]))

    assert builder.vectors == [b"0", b"1", b"2"]
    assert builder.dimensions == 1


def test_usage_is_that_of_the_last_frame() -> None:
    builder = AnswerBuilder()
    builder.add(Started(id="i", run="r", seq=0, prompt_tokens=7))
    assert builder.usage == Usage(prompt_tokens=7)

    builder.add(Done(id="i", run="r", seq=1, usage=Usage(prompt_tokens=7, completion_tokens=2)))

    assert builder.usage.completion_tokens == 2
    assert builder.done is not None
