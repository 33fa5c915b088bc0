"""A task becomes token ids: the chat template, plain texts, given tokens, and whether they fit."""

from __future__ import annotations

import inspect
import json
from collections.abc import Sequence
from typing import Any

from modelbus_broker.errors import InvalidRequest, UnsupportedField
from modelbus_broker.messages import Chat, ChatMessage, Completion, ImagePart, TextPart

from .call_formats import knows_tools
from .images import decode_image
from .loading import TextModel
from .tool_prompts import shown_tools, with_described_tools


def chat_prompt(loaded: TextModel, task: Chat) -> list[int]:
    """The token ids of a conversation. A last message of the assistant is gone on with, not answered.

    Raises:
        UnsupportedField: the model has no chat template, or the request wants what this engine cannot do.
        InvalidRequest: the template refuses the conversation; its words are in the message.
    """
    return [int(token) for token in _templated(loaded, task, images=False)["input_ids"]]


def picture_prompt(
    loaded: TextModel, task: Chat, files: Sequence[tuple[str, bytes]]
) -> tuple[list[int], dict[str, Any]]:
    """The token ids of a conversation for a model that reads images, and what it reads beside them.

    Args:
        files: of all images in the order of the conversation, each with its place.

    Raises what ``chat_prompt`` raises, and InvalidRequest where a file is no image.
    """
    import torch

    text, pictures = text_and_pictures(loaded, task, files)
    try:
        made = loaded.processor(text=[text], images=pictures or None, add_special_tokens=False, return_tensors="pt")
    except Exception as error:  # processors raise what they like
        raise InvalidRequest(f"the model cannot read these images: {error}", param="messages") from error
    model, features = loaded.model, {}
    for name, value in made.items() if pictures else ():
        if name not in ("input_ids", "attention_mask"):
            if isinstance(value, torch.Tensor):
                value = value.to(model.device, model.dtype if value.is_floating_point() else None)
            features[name] = value
    return [int(token) for token in made["input_ids"][0]], features


def text_and_pictures(loaded: TextModel, task: Chat, files: Sequence[tuple[str, bytes]]) -> tuple[str, list[Any]]:
    """The conversation with a mark for each image, and the images (``PIL.Image.Image``). Raises what ``picture_prompt`` raises."""
    marker = getattr(loaded.processor, "image_token", None)
    if marker and any(marker in message.text() for message in task.messages):
        raise InvalidRequest(f"{marker!r} stands for an image in this model: texts may not have it", param="messages")
    text: str = _templated(loaded, task, images=True)
    return text, [decode_image(at, data) for at, data in files]


def _templated(loaded: TextModel, task: Chat, *, images: bool) -> Any:
    """What the tokenizer's template makes of a conversation: with images a text, else a mapping with ``input_ids``."""
    template = loaded.template
    if not template:
        raise UnsupportedField("this model has no chat template; use /v1/completions instead", param="messages")
    options = _template_options(loaded, task) | _effort(task, template)
    if not task.messages:
        raise InvalidRequest("messages is empty", param="messages")
    for index, message in enumerate(task.messages):
        _check_parts(message, index, images)
    last = task.messages[-1]
    goes_on = last.role == "assistant" and not last.tool_calls and bool(last.text())
    messages, tools = task.messages, shown_tools(task)
    if not knows_tools(template):
        messages = with_described_tools(messages, tools)
    elif tools:
        options["tools"] = tools
    turns = [_for_template(message, template, loaded.processor is not None) for message in messages]
    try:
        return loaded.tokenizer.apply_chat_template(
            turns,
            add_generation_prompt=not goes_on,
            continue_final_message=goes_on,
            tokenize=not images,
            return_dict=not images,
            **options,
        )
    except Exception as error:  # templates raise what they like
        raise InvalidRequest(f"the model's chat template refuses the messages: {error}", param="messages") from error


def completion_prompts(loaded: TextModel, task: Completion) -> list[list[int]]:
    """The token ids of every prompt.

    Raises:
        UnsupportedField: ``suffix`` is set.
        InvalidRequest: a prompt is empty, or a token id is not in the vocabulary.
    """
    if task.suffix:
        raise UnsupportedField("this model cannot fill in before a suffix", param="suffix")
    if not task.prompt:
        raise InvalidRequest("prompt is empty", param="prompt")
    return [_completion_prompt(loaded, prompt) for prompt in task.prompt]


def prompt_texts(loaded: TextModel, task: Completion) -> list[str]:
    """The prompts as texts, for ``echo``."""
    return [prompt if isinstance(prompt, str) else loaded.tokenizer.decode(prompt) for prompt in task.prompt]


def _completion_prompt(loaded: TextModel, prompt: str | list[int]) -> list[int]:
    if isinstance(prompt, str):
        ids = [int(token) for token in loaded.tokenizer(prompt)["input_ids"]]
        bos = loaded.tokenizer.bos_token_id
        if not ids and bos is not None:
            return [int(bos)]
    else:
        ids = prompt
        for token in ids:
            if not 0 <= token < loaded.vocabulary:
                raise InvalidRequest(f"token id {token} is not in 0 to {loaded.vocabulary - 1}", param="prompt")
    if not ids:
        raise InvalidRequest("prompt is empty", param="prompt")
    return ids


def _check_parts(message: ChatMessage, index: int, images: bool) -> None:
    for part in message.content if isinstance(message.content, list) else ():
        if not isinstance(part, TextPart) and not (images and isinstance(part, ImagePart)):
            kind, reads = part.__struct_config__.tag, "text and images" if images else "text"
            raise UnsupportedField(f"this model reads {reads} only, not {kind}", param=f"messages[{index}].content")


def _for_template(message: ChatMessage, template: str, parts: bool) -> dict[str, Any]:
    """The message in the words of Hugging Face's templates."""
    role = {"function": "tool"}.get(message.role, message.role)
    if role == "developer" and "developer" not in template:
        role = "system"
    turn: dict[str, Any] = {"role": role, "content": _as_parts(message) if parts else message.text()}
    if message.name is not None:
        turn["name"] = message.name
    if message.tool_call_id is not None:
        turn["tool_call_id"] = message.tool_call_id
    if message.reasoning_content is not None:
        turn["reasoning_content"] = message.reasoning_content
    if message.tool_calls:
        turn["tool_calls"] = [
            {
                "id": call.id,
                "type": "function",
                "function": {"name": call.function.name, "arguments": _arguments(call.function.arguments)},
            }
            for call in message.tool_calls
        ]
    return turn


def _as_parts(message: ChatMessage) -> list[dict[str, str]]:
    """The form that templates of models with images expect."""
    if not isinstance(message.content, list):
        return [{"type": "text", "text": message.content or ""}]
    return [
        {"type": "text", "text": part.text} if isinstance(part, TextPart) else {"type": "image"}
        for part in message.content
    ]


def _arguments(text: str) -> object:
    # Templates write them with the tojson filter, so they want an object and not its text.
    try:
        return json.loads(text)
    except ValueError:
        return text


def _template_options(loaded: TextModel, task: Chat) -> dict[str, Any]:
    options = dict(task.chat_template_kwargs or {})
    # The library's own parameters would change what is computed, or bring the client's template in.
    reserved = inspect.signature(loaded.tokenizer.apply_chat_template).parameters.keys() & options.keys()
    if reserved:
        names = ", ".join(sorted(reserved))
        raise UnsupportedField(f"chat_template_kwargs may not have {names}", param="chat_template_kwargs")
    return options


def _effort(task: Chat, template: str) -> dict[str, Any]:
    if task.reasoning_effort is None:
        return {}
    if "reasoning_effort" not in template:
        raise UnsupportedField("this model has no reasoning effort to set", param="reasoning_effort")
    return {"reasoning_effort": task.reasoning_effort}
