"""What every engine owes to the worker, as checks that each engine's tests run on a started engine.

``GREEDY`` makes answers repeatable where the model has a choice. A check whose capability the engine lacks
does nothing, so that a test can run the whole list.
"""

from __future__ import annotations

import asyncio
import socket
import struct
from collections import Counter
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable
from math import inf, nan
from typing import Any, cast

import msgspec
import pytest
from modelbus_broker.errors import AdapterUnavailable, ContextLengthExceeded, InvalidRequest, UnsupportedField
from modelbus_broker.messages import (
    Adapter,
    Chat,
    ChatMessage,
    Classification,
    Completion,
    Embedding,
    Sampling,
    Score,
    Task,
    ToolCallDelta,
    Usage,
)
from modelbus_workers.engines.base import Engine, EngineOutput, Finished, Output, Prompt, Run, VectorBatch

GREEDY: dict[str, Any] = {"temperature": 0.0}
QUESTION = "Name three colours, please."


class Answer(msgspec.Struct):
    """All outputs of one request, put together."""

    prompt_tokens: int | None = None
    texts: dict[int, str] = {}
    reasons: dict[int, str] = {}
    token_ids: dict[int, list[int]] = {}
    outputs: list[Output] = []
    vectors: list[bytes] = []
    labels: list[str] = []
    finished: Finished | None = None

    @property
    def usage(self) -> Usage:
        assert self.finished is not None
        return self.finished.usage


def chat(text: str, **sampling: Any) -> Chat:
    return Chat(messages=[ChatMessage(role="user", content=text)], sampling=Sampling(**(GREEDY | sampling)))


async def ask(engine: Engine, task: Task, **run: Any) -> Answer:
    """The whole answer; asserts that its outputs come in the order that the port promises."""
    answer = Answer()
    async for output in outputs_of(engine, task, **run):
        assert answer.finished is None, "nothing comes after Finished"
        match output:
            case Prompt():
                assert not answer.outputs and not answer.vectors, "Prompt comes first"
                answer.prompt_tokens = output.tokens
            case Output():
                assert not answer.reasons.get(output.choice), "nothing comes after the finish reason of a choice"
                answer.texts[output.choice] = answer.texts.get(output.choice, "") + output.text
                answer.reasons[output.choice] = output.finish_reason
                answer.token_ids.setdefault(output.choice, []).extend(output.token_ids)
                answer.outputs.append(output)
            case VectorBatch():
                assert output.start == len(answer.vectors), "vectors come in the order of the inputs"
                assert all(len(vector) == 4 * output.dimensions for vector in output.data)
                answer.vectors.extend(output.data)
                answer.labels = output.labels
            case Finished():
                answer.finished = output
    assert answer.finished is not None, "every answer ends with Finished"
    assert all(answer.reasons.values()), "every choice has a finish reason"
    return answer


def outputs_of(engine: Engine, task: Task, **run: Any) -> AsyncGenerator[EngineOutput, None]:
    return cast(AsyncGenerator[EngineOutput, None], engine.answer(task, Run(id="test", **run)))


class Said(msgspec.Struct):
    """What the client of one choice has got: one answer, however many runs it came from."""

    text: str = ""
    token_ids: list[int] = []
    reasons: list[str] = []
    calls: list[ToolCallDelta] = []  #: as they came
    scored: list[str] = []  #: the tokens that have log probabilities


def said(outputs: Iterable[Output]) -> dict[int, Said]:
    choices: dict[int, Said] = {}
    for output in outputs:
        choice = choices.setdefault(output.choice, Said())
        choice.text += output.text
        choice.token_ids += output.token_ids
        choice.reasons += [output.finish_reason] if output.finish_reason else []
        choice.calls += output.tool_calls
        choice.scored += [score.token for score in output.logprobs]
    return choices


def logprobs(outputs: Iterable[Output]) -> dict[tuple[int, int], list[float]]:
    """By choice and position: of the token and of its alternatives."""
    found: dict[tuple[int, int], list[float]] = {}
    places: Counter[int] = Counter()
    for output in outputs:
        for score in output.logprobs:
            found[output.choice, places[output.choice]] = [score.logprob, *(top.logprob for top in score.top)]
            places[output.choice] += 1
    return found


async def goes_on_anywhere(
    engine: Engine,
    task: Chat | Completion,
    cuts: Iterable[int] | Callable[[int], Iterable[int]] | None = None,
    *,
    adapter: Adapter | None = None,
    at_once: int = 1,
) -> list[Output]:
    """Asserts that the answer is the same whether one run gives it, or a second one goes on after any output of the first.

    The second run knows what a publisher does: the tokens and the number of characters of each choice.

    Args:
        cuts: how many outputs come from the first run, each time, or what tells that from the number of all outputs;
            all numbers if None.
        at_once: so many second runs go side by side: an engine that reads them together takes little longer than for one.

    Returns:
        What the undisturbed run gave.
    """
    whole = [output async for output in outputs_of(engine, task, adapter=adapter)]
    prompt, finished = whole[0], whole[-1]
    assert isinstance(prompt, Prompt) and isinstance(finished, Finished)
    outputs = [output for output in whole if isinstance(output, Output)]
    choices = sorted(said(outputs))
    turns = asyncio.Semaphore(at_once)

    async def go_on(cut: int) -> None:
        first = outputs[:cut]
        so_far = said(first)
        async with turns:
            rest = [
                output
                async for output in outputs_of(
                    engine, task, prompt_tokens=prompt.tokens, adapter=adapter,
                    output_token_ids=[so_far[choice].token_ids if choice in so_far else [] for choice in choices],
                    emitted_chars=[len(so_far[choice].text) if choice in so_far else 0 for choice in choices],
                )
            ]  # fmt: skip
        both = [*first, *(output for output in rest if isinstance(output, Output))]
        assert said(both) == said(outputs), f"after {cut} of {len(outputs)} outputs"
        again, expected = logprobs(both), logprobs(outputs)
        # Tokens that are read at once and one after the other give sums that differ in their last digits.
        assert all(again[at] == pytest.approx(values, abs=1e-2) for at, values in expected.items())
        assert rest[-1] == finished

    async with asyncio.TaskGroup() as group:
        for cut in cuts(len(outputs)) if callable(cuts) else range(len(outputs) + 1) if cuts is None else cuts:
            group.create_task(go_on(cut))
    return outputs


async def check_capabilities_tell_what_is_served(engine: Engine) -> None:
    capabilities = engine.capabilities()
    assert capabilities.tasks and set(capabilities.tasks) <= {
        "chat",
        "completion",
        "embedding",
        "score",
        "classification",
        "decision",
    }
    assert engine.slots >= 1
    assert bool(engine.compat()) >= capabilities.can_continue, "who goes on from tokens says whose"


async def check_the_self_test_passes(engine: Engine) -> None:
    await engine.self_test()


async def check_streaming_gives_the_same_as_plain(engine: Engine) -> None:
    if "chat" not in engine.capabilities().tasks:
        return
    streamed = await ask(engine, chat(QUESTION, max_tokens=12), stream=True)
    plain = await ask(engine, chat(QUESTION, max_tokens=12), stream=False)
    assert streamed.texts == plain.texts
    assert streamed.reasons == plain.reasons
    assert streamed.usage == plain.usage


async def check_the_limit_of_tokens_ends_with_length(engine: Engine) -> None:
    if "chat" not in engine.capabilities().tasks:
        return
    answer = await ask(engine, chat(QUESTION, max_tokens=2))
    assert answer.reasons == {0: "length"}
    assert answer.usage.completion_tokens == 2
    assert answer.usage.prompt_tokens > 0


async def check_a_stop_string_ends_the_text_before_it(engine: Engine) -> None:
    if "chat" not in engine.capabilities().tasks:
        return
    whole = (await ask(engine, chat(QUESTION, max_tokens=12))).texts[0]
    stop = whole[5:8]
    answer = await ask(engine, chat(QUESTION, max_tokens=12, stop=[stop]))
    assert answer.texts[0] == whole[: whole.index(stop)]
    assert answer.reasons == {0: "stop"}


async def check_leaving_early_stops_the_work_and_frees_the_slot(engine: Engine) -> None:
    if "chat" not in engine.capabilities().tasks:
        return
    outputs = outputs_of(engine, chat("Tell me a very long story.", max_tokens=400))
    await anext(outputs)
    await asyncio.wait_for(outputs.aclose(), 20)
    answer = await ask(engine, chat(QUESTION, max_tokens=2))
    assert answer.reasons == {0: "length"}


async def check_cancelling_the_task_stops_the_work(engine: Engine) -> None:
    if "chat" not in engine.capabilities().tasks:
        return
    task = asyncio.create_task(ask(engine, chat("Tell me a very long story.", max_tokens=400)))
    await asyncio.sleep(0)
    task.cancel()
    done, _ = await asyncio.wait([task], timeout=20)
    assert done
    assert (await ask(engine, chat(QUESTION, max_tokens=2))).finished is not None


async def check_text_of_any_script_arrives_whole(engine: Engine) -> None:
    if "chat" not in engine.capabilities().tasks:
        return
    task = chat("Repeat: 你好，世界 😀 naïve Ω", max_tokens=12)
    answer = await ask(engine, task)
    for output in answer.outputs:
        output.text.encode()  # no half of a surrogate pair
    assert answer.texts[0] == (await ask(engine, task, stream=False)).texts[0]
    # A character that was cut in the middle shows as this; only a token limit may leave one, at the very end.
    assert "\ufffd" not in answer.texts[0][:-1]


async def check_concurrent_requests_do_not_mix(engine: Engine) -> None:
    if "chat" not in engine.capabilities().tasks:
        return
    tasks = [chat(f"Say the number {number}.", max_tokens=6) for number in range(4)]
    alone = [await ask(engine, task) for task in tasks]
    together = await asyncio.gather(*(ask(engine, task) for task in tasks))
    assert [answer.texts for answer in together] == [answer.texts for answer in alone]
    assert [answer.usage for answer in together] == [answer.usage for answer in alone]


async def check_several_choices_are_told_apart(engine: Engine) -> None:
    capabilities = engine.capabilities()
    if "chat" not in capabilities.tasks or not capabilities.n:
        return
    answer = await ask(engine, chat(QUESTION, max_tokens=3, n=3))
    assert sorted(answer.texts) == [0, 1, 2]
    assert answer.usage.completion_tokens == 9


async def check_log_probabilities_are_probabilities(engine: Engine) -> None:
    capabilities = engine.capabilities()
    if "chat" not in capabilities.tasks or not capabilities.logprobs:
        return
    answer = await ask(engine, chat(QUESTION, max_tokens=4, logprobs=3))
    scores = [score for output in answer.outputs for score in output.logprobs]
    assert len(scores) == answer.usage.completion_tokens
    assert all(score.logprob <= 0 and len(score.top) == 3 for score in scores)


async def check_completion_goes_on_from_the_prompt(engine: Engine) -> None:
    if "completion" not in engine.capabilities().tasks:
        return
    answer = await ask(engine, Completion(prompt=["One, two, three, four"], sampling=Sampling(max_tokens=3, **GREEDY)))
    assert answer.reasons == {0: "length"}
    assert answer.texts[0]
    assert answer.usage.completion_tokens == 3


async def check_each_input_has_its_vector(engine: Engine) -> None:
    if "embedding" not in engine.capabilities().tasks:
        return
    both = await ask(engine, Embedding(input=["a cat", "a dog"]))
    alone = await ask(engine, Embedding(input=["a dog"]))
    assert len(both.vectors) == 2
    assert both.vectors[0] != both.vectors[1]
    assert len(alone.vectors[0]) == len(both.vectors[1])
    assert both.usage.prompt_tokens > 0


async def check_each_document_has_its_score(engine: Engine) -> None:
    if "score" not in engine.capabilities().tasks:
        return
    query, good, bad = "What does a cat eat?", "Cats eat mice and fish.", "The train leaves at nine."
    one = await ask(engine, Score(queries=[query], documents=[bad, good]))
    bad_score, good_score = (struct.unpack("<f", vector)[0] for vector in one.vectors)
    assert good_score > bad_score
    pairs = await ask(engine, Score(queries=[query, query], documents=[good, bad]))
    assert [struct.unpack("<f", vector)[0] for vector in pairs.vectors] == pytest.approx(
        [good_score, bad_score], abs=1e-3
    )
    # Who reads a query on its own reads one query once.
    assert pairs.usage.prompt_tokens >= one.usage.prompt_tokens > 0


async def check_each_text_has_its_probabilities(engine: Engine) -> None:
    if "classification" not in engine.capabilities().tasks:
        return
    answer = await ask(engine, Classification(input=["I love it.", "I hate it."]))
    assert len(answer.vectors) == 2 and len(answer.labels) >= 2
    for vector in answer.vectors:
        probabilities = struct.unpack(f"<{len(answer.labels)}f", vector)
        assert sum(probabilities) == pytest.approx(1, abs=1e-3)
    assert answer.usage.prompt_tokens > 0


async def check_what_does_not_fit_is_refused_with_the_numbers(engine: Engine) -> None:
    capabilities = engine.capabilities()
    if "chat" not in capabilities.tasks or not capabilities.context_length:
        return
    limit = capabilities.context_length
    with pytest.raises(ContextLengthExceeded, match=str(limit)):
        await ask(engine, chat(QUESTION, max_tokens=limit))
    with pytest.raises(ContextLengthExceeded, match=str(limit)) as refused:
        await ask(engine, chat("many words " * limit, max_tokens=1))
    assert refused.value.status == 400
    assert (await ask(engine, chat(QUESTION, max_tokens=2))).reasons == {0: "length"}


async def check_a_field_that_the_engine_does_not_know_is_refused_by_its_name(engine: Engine) -> None:
    capabilities = engine.capabilities()
    if "chat" not in capabilities.tasks or "*" in capabilities.extra_fields:
        return
    task = chat(QUESTION, max_tokens=2)
    with pytest.raises(UnsupportedField, match=r"the field 'temprature'; did you mean 'temperature'\?") as refused:
        await ask(engine, msgspec.structs.replace(task, extra={"temprature": 0}))
    assert refused.value.param == "temprature"
    assert (await ask(engine, msgspec.structs.replace(task, extra={"temprature": None}))).reasons == {0: "length"}


async def check_sampling_that_cannot_be_is_refused(engine: Engine) -> None:
    if "chat" not in engine.capabilities().tasks:
        return
    for fields in ({"n": 0}, {"n": 129}, {"max_tokens": -1}, {"min_tokens": 3}, {"logprobs": -1}, {"temperature": nan},
                   {"top_p": inf}, {"presence_penalty": -inf}, {"logit_bias": {"5": nan}}):  # fmt: skip
        with pytest.raises(InvalidRequest) as refused:
            await ask(engine, chat(QUESTION, **{"max_tokens": 2, **fields}))
        assert refused.value.param == next(iter(fields))


async def check_an_adapter_is_refused_where_there_are_none(engine: Engine) -> None:
    capabilities = engine.capabilities()
    if "chat" not in capabilities.tasks or capabilities.adapters:
        return
    with pytest.raises(UnsupportedField, match="adapter"):
        await ask(engine, chat(QUESTION, max_tokens=2), adapter=Adapter(name="a", path="/nowhere"))


async def check_an_adapter_that_is_not_here_is_told_of_with_the_host(engine: Engine) -> None:
    if not engine.capabilities().adapters:
        return
    adapter = Adapter(name="pirate", path="/no/such/folder")
    with pytest.raises(
        AdapterUnavailable, match=f"'pirate'.*on host {socket.gethostname()}: there is no folder /no/such"
    ):
        await ask(engine, chat(QUESTION, max_tokens=2), adapter=adapter)
    with pytest.raises(AdapterUnavailable, match="there is no folder"):
        await engine.check_adapter(adapter)


async def check_an_answer_cut_anywhere_goes_on(engine: Engine) -> None:
    capabilities = engine.capabilities()
    if "chat" not in capabilities.tasks or not capabilities.can_continue:
        return
    alternatives = 2 if capabilities.logprobs else None
    task = chat("Repeat: 你好 😀 naïve", max_tokens=8, logprobs=alternatives, stop=["never said"])
    await goes_on_anywhere(engine, task)
    if capabilities.n:
        await goes_on_anywhere(engine, chat(QUESTION, max_tokens=3, n=2))


Check = Callable[[Engine], Awaitable[None]]

#: Checks that need nothing of the model but repeatable answers of some length.
CHECKS: list[Check] = [
    check_capabilities_tell_what_is_served,
    check_the_self_test_passes,
    check_streaming_gives_the_same_as_plain,
    check_the_limit_of_tokens_ends_with_length,
    check_a_stop_string_ends_the_text_before_it,
    check_leaving_early_stops_the_work_and_frees_the_slot,
    check_cancelling_the_task_stops_the_work,
    check_text_of_any_script_arrives_whole,
    check_concurrent_requests_do_not_mix,
    check_several_choices_are_told_apart,
    check_log_probabilities_are_probabilities,
    check_completion_goes_on_from_the_prompt,
    check_each_input_has_its_vector,
    check_each_document_has_its_score,
    check_each_text_has_its_probabilities,
    check_what_does_not_fit_is_refused_with_the_numbers,
    check_a_field_that_the_engine_does_not_know_is_refused_by_its_name,
    check_sampling_that_cannot_be_is_refused,
    check_an_adapter_is_refused_where_there_are_none,
    check_an_adapter_that_is_not_here_is_told_of_with_the_host,
    check_an_answer_cut_anywhere_goes_on,
]
