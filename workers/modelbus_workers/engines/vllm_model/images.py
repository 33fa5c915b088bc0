"""Conversations with images: vLLM puts the images' own tokens where the template marks them."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

from modelbus_broker.messages import Chat

from ..torch_model.prompts import text_and_pictures
from .loading import Loaded
from .requests import vllm_errors


def unfilled_prompt(loaded: Loaded, task: Chat, files: Sequence[tuple[str, bytes]]) -> Mapping[str, Any]:
    """The token ids with one mark for each image, and the images, as ``Work.features`` has them for vLLM.

    Raises:
        InvalidRequest: a file is no image, or the template refuses the conversation.
        UnsupportedField: a part that is neither text nor image.
    """
    text, pictures = text_and_pictures(loaded.text, task, files)
    ids = [int(token) for token in loaded.text.tokenizer(text, add_special_tokens=False)["input_ids"]]
    return {"unfilled": ids, "data": {"image": pictures}} if pictures else {"unfilled": ids}


async def filled_prompt(loaded: Loaded, unfilled: Mapping[str, Any]) -> list[int]:
    """The token ids with those of the images, which count like any others.

    Raises:
        InvalidRequest: the model cannot read these images.
    """
    from vllm.inputs import TokensPrompt

    if "data" not in unfilled:
        ids: list[int] = unfilled["unfilled"]
        return ids
    prompt = TokensPrompt(prompt_token_ids=unfilled["unfilled"], multi_modal_data=unfilled["data"])
    with vllm_errors("messages"):
        # Not by the cache: its other half, in the engine core, hears nothing of this.
        made = await loaded.engine.renderer.process_for_engine_async(prompt, time.time(), skip_mm_cache=True)
    return [int(token) for token in made["prompt_token_ids"]]
