"""How likely a model is to answer with each of some labels: the prompt is read once, then the tokens of each label."""

from __future__ import annotations

import msgspec
from modelbus_broker.errors import InvalidRequest
from modelbus_broker.messages import Chat, ChatMessage, Decision

from .loading import TextModel
from .prompts import chat_prompt


def label_prompt(loaded: TextModel, task: Decision) -> tuple[list[int], list[list[int]]]:
    """The token ids of the conversation and of each label, as the chat template writes an answer.

    Raises:
        UnsupportedField, InvalidRequest: as ``chat_prompt``; a label that is no token is refused too.
    """
    chat = Chat(messages=task.messages, chat_template_kwargs=task.chat_template_kwargs)
    prompt = chat_prompt(loaded, chat)
    labels = [_label(loaded, chat, prompt, label) for label in task.labels]
    for index, tokens in enumerate(labels):
        if not tokens:
            raise InvalidRequest("a label has no tokens", param=f"labels[{index}]")
    return prompt, labels


def _label(loaded: TextModel, chat: Chat, prompt: list[int], label: str) -> list[int]:
    answered = [*chat.messages, ChatMessage(role="assistant", content=label)]
    whole = chat_prompt(loaded, msgspec.structs.replace(chat, messages=answered))
    if whole[: len(prompt)] == prompt:
        return whole[len(prompt) :]
    # A template that begins an answer otherwise than it shows one (with thoughts, for instance).
    return [int(token) for token in loaded.tokenizer(label, add_special_tokens=False)["input_ids"]]
