"""What is asked of a model: the tasks inside a request, in the vocabulary of the OpenAI API.

These structs are what the gateway decodes a client's JSON into and what the SDK's users build, so that a
request is translated once at most. Names and meanings follow the OpenAI API reference.
"""

from __future__ import annotations

from typing import Any, Literal

import msgspec

from .base import Message
from .search import Operation

Role = Literal["system", "developer", "user", "assistant", "tool", "function"]


class TextPart(Message, frozen=True, kw_only=True, tag="text", tag_field="type"):
    text: str


class ImageURL(Message, frozen=True, kw_only=True):
    url: str  #: an https address or a data URL
    detail: str = "auto"


class ImagePart(Message, frozen=True, kw_only=True, tag="image_url", tag_field="type"):
    image_url: ImageURL


class AudioData(Message, frozen=True, kw_only=True, omit_defaults=False):
    data: str  #: base64
    format: str = "wav"


class AudioPart(Message, frozen=True, kw_only=True, tag="input_audio", tag_field="type"):
    input_audio: AudioData


class FileData(Message, frozen=True, kw_only=True):
    file_data: str | None = None
    file_id: str | None = None
    filename: str | None = None


class FilePart(Message, frozen=True, kw_only=True, tag="file", tag_field="type"):
    file: FileData


class RefusalPart(Message, frozen=True, kw_only=True, tag="refusal", tag_field="type"):
    refusal: str


Part = TextPart | ImagePart | AudioPart | FilePart | RefusalPart


class FunctionCall(Message, frozen=True, kw_only=True, omit_defaults=False):
    name: str = ""
    arguments: str = ""  #: JSON text as the model wrote it


class ToolCall(Message, frozen=True, kw_only=True, omit_defaults=False):
    id: str = ""
    type: str = "function"
    function: FunctionCall = FunctionCall()


class ChatMessage(Message, frozen=True, kw_only=True):
    """One turn of a conversation."""

    role: Role
    content: str | list[Part] | None = None
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None
    refusal: str | None = None

    def text(self) -> str:
        """The text of the content; other parts leave nothing."""
        if isinstance(self.content, str):
            return self.content
        return "".join(part.text for part in self.content or () if isinstance(part, TextPart))


class Sampling(Message, frozen=True, kw_only=True):
    """How tokens are chosen. ``None`` leaves the choice to the engine or the model."""

    n: int = 1
    max_tokens: int | None = None  #: most output tokens per choice
    min_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    stop: list[str] = []
    stop_token_ids: list[int] = []
    ignore_eos: bool = False
    seed: int | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    logprobs: int | None = None  #: how many alternatives per token; 0 = only the chosen token's


#: How an answer came to have its form: it needed none; the model's own way (a provider's, or what it was trained for);
#: a grammar in the engine; words in the prompt; or words and the errors of an earlier answer.
Rung = Literal["text", "native", "grammar", "prompted", "reasked"]


class Ladder(Message, frozen=True, kw_only=True):
    """How far an answer of a certain form is sought: first as the model does it best, then by other ways.

    The defaults take whatever works. ``Ladder(rungs=("native", "grammar"))`` refuses what only a prompt could ask for.
    """

    #: The ways that may be taken.
    rungs: tuple[Literal["native", "grammar", "prompted"], ...] = ("native", "grammar", "prompted")
    reasks: int = 2  #: how often the model is told what is wrong with its answer and asked again
    max_tokens: int = 0  #: output tokens over all attempts, after which nothing is asked again; 0: no limit
    examples: int = 2  #: generated ones, in prompts that ask for a form
    reason_first: bool = False  #: the model writes freely first, then its answer in the form that is asked for
    retry_temperature: float | None = None  #: of re-asks; None: that of the request
    max_string: int = 2000  #: characters of strings whose schema says nothing, where a grammar runs; 0: no bound
    max_items: int = 100  #: items of arrays whose schema says nothing, where a grammar runs; 0: no bound
    #: Where a grammar runs, of several tools the likeliest one is offered alone to a model that was not made for tools.
    likely_tool: bool = True


class Chat(Message, frozen=True, kw_only=True, tag="chat"):
    """A conversation to go on with."""

    messages: list[ChatMessage]
    sampling: Sampling = Sampling()
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    response_format: dict[str, Any] | None = None
    reasoning_effort: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    #: Fields that only some engines know (``guided_json`` ...), by their wire name.
    extra: dict[str, Any] = msgspec.field(default_factory=dict)
    ladder: Ladder | None = None  #: how far ``response_format`` and ``tools`` are sought; None: all the way


class Completion(Message, frozen=True, kw_only=True, tag="completion"):
    """A text, or token ids, to go on from. Several prompts give choices ``prompt * n + i``."""

    prompt: list[str | list[int]]
    sampling: Sampling = Sampling()
    echo: bool = False
    suffix: str | None = None
    extra: dict[str, Any] = msgspec.field(default_factory=dict)


class Embedding(Message, frozen=True, kw_only=True, tag="embedding"):
    """Texts, or token ids, to embed."""

    input: list[str | list[int]]
    dimensions: int | None = None


class Score(Message, frozen=True, kw_only=True, tag="score"):
    """How well each document answers a query: the task of a reranker, or of a similarity model."""

    queries: list[str]  #: one for all documents, or one for each
    documents: list[str]
    extra: dict[str, Any] = msgspec.field(default_factory=dict)


class Classification(Message, frozen=True, kw_only=True, tag="classification"):
    """Texts, or token ids, to sort into the model's classes."""

    input: list[str | list[int]]
    extra: dict[str, Any] = msgspec.field(default_factory=dict)


class Storage(Message, frozen=True, kw_only=True, tag="storage"):
    """One operation on the stores of a search service. The answer is one ``Reply`` of ``messages.search``."""

    operation: Operation


class Decision(Message, frozen=True, kw_only=True, tag="decision"):
    """How likely each of some answers to a conversation is. The answer has one choice for each label, with no text and the
    log probabilities of the label's tokens; nothing is generated."""

    messages: list[ChatMessage]
    labels: list[str]
    chat_template_kwargs: dict[str, Any] | None = None


#: Everything a worker can be asked to do.
Task = Chat | Completion | Embedding | Score | Classification | Decision | Storage
