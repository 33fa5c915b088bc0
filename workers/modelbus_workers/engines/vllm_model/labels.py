"""How likely a model is to answer with each of some labels, on vLLM: each label is read as the end of a prompt."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Sequence
from contextlib import aclosing
from typing import Any

from modelbus_broker.errors import EngineFailed
from modelbus_broker.messages import TokenLogprob

from .generation import token_score
from .loading import Loaded
from .requests import vllm_errors

_numbers = itertools.count()


async def label_scores(
    loaded: Loaded, prompt: list[int], labels: Sequence[list[int]], request_id: str, lora: Any
) -> list[list[TokenLogprob]]:
    """The tokens of each label, with the log probability of each after the prompt and the tokens before it. vLLM has all
    labels in its batch at once; cancelling aborts what still runs.

    Raises:
        EngineFailed: vLLM gave no log probabilities.
        ModelBusError: what vLLM refuses, as an error of ours.
    """
    reading = [asyncio.create_task(_scores(loaded, prompt, label, request_id, lora)) for label in labels]
    try:
        return await asyncio.gather(*reading)
    finally:
        for task in reading:
            task.cancel()
        await asyncio.gather(*reading, return_exceptions=True)


async def _scores(
    loaded: Loaded, prompt: list[int], label: list[int], request_id: str, lora: Any
) -> list[TokenLogprob]:
    from vllm import SamplingParams
    from vllm.inputs import TokensPrompt
    from vllm.sampling_params import RequestOutputKind

    # vLLM reads nothing without writing one token.
    params = SamplingParams(
        temperature=0.0, max_tokens=1, prompt_logprobs=0, detokenize=False, output_kind=RequestOutputKind.FINAL_ONLY
    )
    whole = TokensPrompt(prompt_token_ids=[*prompt, *label])
    name = f"{request_id}-label-{next(_numbers)}"
    rows: Sequence[Any] = ()
    with vllm_errors():
        async with aclosing(loaded.engine.generate(whole, params, name, lora_request=lora)) as parts:
            async for part in parts:
                rows = part.prompt_logprobs or rows
    own = rows[len(prompt) :]
    if len(own) != len(label):
        raise EngineFailed("vLLM gave no log probabilities of a label")
    return [token_score(loaded.texts, row, token, 0) for token, row in zip(label, own, strict=True)]
