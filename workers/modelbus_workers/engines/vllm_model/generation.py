"""One engine request for each choice: vLLM's tokens become outputs, all choices of a request at once."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from typing import Any

import msgspec
from modelbus_broker.errors import EngineFailed
from modelbus_broker.messages import TokenLogprob, TopLogprob

from ..base import Output
from ..torch_model.choice import Choice
from ..torch_model.text import TokenTexts
from ..torch_model.work import Work
from .loading import Loaded
from .requests import Extra, bad_words, sampling_params, vllm_errors
from .stretches import next_stretch

_numbers = itertools.count()


class Tally:
    """What is counted while an answer is made, over all of its choices."""

    def __init__(self) -> None:
        self.choices: list[Choice] = []

    @property
    def reasoning_tokens(self) -> int:
        return sum(choice.reasoning_tokens for choice in self.choices)


async def outputs(loaded: Loaded, work: Work, extra: Extra, lora: Any, tally: Tally) -> AsyncGenerator[Output]:
    """The outputs of all choices as they come. Leaving early aborts what still runs."""
    choices = [(number, number * work.n + at) for number in range(len(work.prompts)) for at in range(work.n)]
    if len(choices) == 1:
        async with aclosing(_choice(loaded, work, 0, 0, extra, lora, tally)) as made:
            async for output in made:
                yield output
        return
    ready: asyncio.Queue[Output | None] = asyncio.Queue()

    async def run(number: int, index: int) -> None:
        try:
            async with aclosing(_choice(loaded, work, number, index, extra, lora, tally)) as made:
                async for output in made:
                    ready.put_nowait(output)
        finally:
            ready.put_nowait(None)

    tasks = [asyncio.create_task(run(number, index)) for number, index in choices]
    try:
        for _ in tasks:
            while (some := await ready.get()) is not None:
                yield some
            for task in tasks:
                if task.done():
                    task.result()
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _choice(
    loaded: Loaded, work: Work, number: int, index: int, extra: Extra, lora: Any, tally: Tally
) -> AsyncGenerator[Output]:
    choice = Choice(work, number, index, loaded.tokenizer)
    tally.choices.append(choice)
    so_far = list(work.before(index))
    # What concerns the prompt is told in the first output, which a run that goes on has behind it.
    echoed = work.plan.logprobs if work.echo else None
    asked = [count for count in (echoed, extra.prompt_logprobs) if count is not None]
    scored = max(asked) if asked and not so_far else None
    begun = scored is None
    if begun:
        first = choice.begin([])
        if first.text or first.finish_reason:
            yield first
        if choice.finish:
            return
    words = bad_words(extra, loaded.tokenizer) if so_far else []
    while True:
        stretch = next_stretch(work.plan, so_far, words if so_far else [])
        params = sampling_params(
            work, number, extra, index=index, so_far=so_far, stretch=stretch, prompt_logprobs=scored,
            read_first=0 if choice.reasons else len(so_far) - choice.reasoning_tokens,
        )  # fmt: skip
        over = False
        async with aclosing(_requested(loaded, work, number, index, params, lora, so_far, choice)) as parts:
            async for part in parts:
                if not begun:
                    begun = True
                    first = _with_prompt_scores(loaded, work, number, choice, part.prompt_logprobs, echoed, extra)
                    yield first
                    if choice.finish:
                        return
                made = part.outputs[0]
                scores: Sequence[Mapping[int, Any] | None] = made.logprobs or [None] * len(made.token_ids)
                for token, row in zip(made.token_ids, scores, strict=True):
                    score = None
                    if row is not None and work.plan.logprobs is not None:
                        score = token_score(loaded.texts, row, token, work.plan.logprobs)
                    so_far.append(token)
                    yield choice.take(token, score)
                    if choice.finish:
                        return
                    over = stretch.one_token or token in stretch.until
                    if over:
                        break
                if over:
                    break
                if made.finish_reason is not None:
                    raise EngineFailed(
                        f"vLLM ended the answer early: {made.finish_reason} {made.stop_reason or ''}".strip()
                    )
        if not over:
            raise EngineFailed("vLLM ended the answer without a reason")


async def _requested(
    loaded: Loaded,
    work: Work,
    number: int,
    index: int,
    params: Any,
    lora: Any,
    so_far: list[int],
    choice: Choice,
) -> AsyncGenerator[Any]:
    """vLLM's own outputs, and its errors as ours."""
    from vllm.inputs import TokensPrompt

    prompt = TokensPrompt(prompt_token_ids=work.prompts[number] + so_far)
    if work.features:  # vLLM puts the images into the tokens before them itself
        prompt = TokensPrompt(
            prompt_token_ids=work.features["unfilled"] + so_far, multi_modal_data=work.features["data"]
        )
    name = f"{work.request_id}-{index}-{next(_numbers)}"
    generated = loaded.engine.generate(
        prompt, params, name, lora_request=lora,
        # An answer is held to its form when its reasoning has ended, which its core tells from now on.
        reasoning_ended=None if params.structured_outputs is None else not choice.reasons,
    )  # fmt: skip
    with vllm_errors("structured_outputs" if params.structured_outputs is not None else ""):
        async with aclosing(generated) as parts:
            async for part in parts:
                yield part


def _with_prompt_scores(
    loaded: Loaded,
    work: Work,
    number: int,
    choice: Choice,
    rows: Sequence[Mapping[int, Any] | None] | None,
    echoed: int | None,
    extra: Extra,
) -> Output:
    prompt = work.prompts[number]

    def scores(alternatives: int) -> list[TokenLogprob | None]:
        known = zip(prompt, rows or (), strict=False)
        return [None if row is None else token_score(loaded.texts, row, token, alternatives) for token, row in known]

    echo_scores: list[TokenLogprob] = []
    if echoed is not None:
        # The first token of a prompt has nothing before it that could make it likely.
        text, raw = loaded.texts.of(prompt[0])
        none = TokenLogprob(token=text, logprob=0.0, bytes=list(raw), token_id=prompt[0])
        echo_scores = [score or none for score in scores(echoed)]
    first = choice.begin(echo_scores)
    if extra.prompt_logprobs is None:
        return first
    return msgspec.structs.replace(first, prompt_logprobs=scores(extra.prompt_logprobs))


def token_score(texts: TokenTexts, row: Mapping[int, Any], token: int, alternatives: int) -> TokenLogprob:
    """A token with its log probability, and the likeliest ones in its place."""
    text, raw = texts.of(token)
    ranked = sorted((entry for entry in row.items() if entry[1].rank <= alternatives), key=lambda entry: entry[1].rank)
    top = []
    for other, entry in ranked:
        if entry.logprob == float("-inf"):
            break
        other_text, other_raw = texts.of(other)
        top.append(TopLogprob(token=other_text, logprob=float(entry.logprob), bytes=list(other_raw)))
    return TokenLogprob(token=text, logprob=float(row[token].logprob), bytes=list(raw), top=top, token_id=token)
