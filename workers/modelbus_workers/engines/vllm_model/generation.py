"""One engine request for each choice: vLLM's tokens become outputs, all choices of a request at once."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from typing import Any

import msgspec
from modelbus_broker.errors import EngineFailed, InvalidRequest, ModelBusError, WorkerLost
from modelbus_broker.messages import Adapter, TokenLogprob, TopLogprob

from ..base import Output
from ..torch_model.choice import Choice
from ..torch_model.text import TokenTexts
from ..torch_model.work import Work
from .loading import Loaded
from .requests import Extra, lora_request, sampling_params

_numbers = itertools.count()


async def outputs(loaded: Loaded, work: Work, extra: Extra, adapter: Adapter | None) -> AsyncGenerator[Output]:
    """The outputs of all choices as they come. Leaving early aborts what still runs."""
    choices = [(number, number * work.n + at) for number in range(len(work.prompts)) for at in range(work.n)]
    if len(choices) == 1:
        async with aclosing(_choice(loaded, work, 0, 0, extra, adapter)) as made:
            async for output in made:
                yield output
        return
    ready: asyncio.Queue[Output | None] = asyncio.Queue()

    async def run(number: int, index: int) -> None:
        try:
            async with aclosing(_choice(loaded, work, number, index, extra, adapter)) as made:
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
    loaded: Loaded, work: Work, number: int, index: int, extra: Extra, adapter: Adapter | None
) -> AsyncGenerator[Output]:
    choice = Choice(work, number, index, loaded.tokenizer)
    before = work.before(index)
    # What concerns the prompt is told in the first output, which a run that goes on has behind it.
    echoed = work.plan.logprobs if work.echo else None
    asked = [count for count in (echoed, extra.prompt_logprobs) if count is not None]
    scored = max(asked) if asked and not before else None
    begun = scored is None
    if begun:
        first = choice.begin([])
        if first.text or first.finish_reason:
            yield first
        if choice.finish:
            return
    params = sampling_params(work, number, index, extra, scored)
    async with aclosing(_requested(loaded, work, number, index, params, adapter)) as parts:
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
                    score = _score(loaded.texts, row, token, work.plan.logprobs)
                yield choice.take(token, score)
                if choice.finish:
                    return
            if made.finish_reason is not None:
                raise EngineFailed(
                    f"vLLM ended the answer early: {made.finish_reason} {made.stop_reason or ''}".strip()
                )
    raise EngineFailed("vLLM ended the answer without a reason")


async def _requested(
    loaded: Loaded, work: Work, number: int, index: int, params: Any, adapter: Adapter | None
) -> AsyncGenerator[Any]:
    """vLLM's own outputs, and its errors as ours."""
    from vllm.exceptions import VLLMClientError
    from vllm.inputs import TokensPrompt
    from vllm.v1.engine.exceptions import EngineDeadError

    prompt = TokensPrompt(prompt_token_ids=work.prompts[number] + work.before(index))
    name = f"{work.request_id}-{index}-{next(_numbers)}"
    lora = lora_request(adapter)
    try:
        async with aclosing(loaded.engine.generate(prompt, params, name, lora_request=lora)) as parts:
            async for part in parts:
                yield part
    except ModelBusError:
        raise
    except EngineDeadError as error:
        raise WorkerLost(f"vLLM's engine core has died: {error}") from error
    except (ValueError, VLLMClientError) as error:
        param = "structured_outputs" if params.structured_outputs is not None else ""
        raise InvalidRequest(f"vLLM refuses the request: {error}", param=param) from error


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
        return [None if row is None else _score(loaded.texts, row, token, alternatives) for token, row in known]

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


def _score(texts: TokenTexts, row: Mapping[int, Any], token: int, alternatives: int) -> TokenLogprob:
    text, raw = texts.of(token)
    ranked = sorted((entry for entry in row.items() if entry[1].rank <= alternatives), key=lambda entry: entry[1].rank)
    top = []
    for other, entry in ranked:
        if entry.logprob == float("-inf"):
            break
        other_text, other_raw = texts.of(other)
        top.append(TopLogprob(token=other_text, logprob=float(entry.logprob), bytes=list(other_raw)))
    return TokenLogprob(token=text, logprob=float(row[token].logprob), bytes=list(raw), top=top, token_id=token)
