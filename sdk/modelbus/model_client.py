"""What can be asked of models: conversations, embeddings, rankings, classes and decisions as typed calls."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import msgspec
from modelbus_broker.asking import CallOptions
from modelbus_broker.errors import InvalidRequest, UnsupportedField, misfit
from modelbus_broker.messages import (
    Capabilities,
    Chat,
    ChatMessage,
    Classification,
    Embedding,
    Sampling,
    Score,
)
from modelbus_broker.messages import (
    Decision as DecisionTask,
)

from .answer_types import (
    ChatAnswer,
    ClassificationAnswer,
    ClassifiedText,
    EmbeddingAnswer,
    RankedDocument,
    Ranking,
)
from .answers import AnswerBuilder, collect, floats
from .decisions import Decision, Labels, decision_of, judge, labels_of
from .decisions.decision import asked
from .hooks import Call, ChatCall, ClassificationCall, DecisionCall, EmbeddingCall, ScoreCall, around
from .port import Publishing
from .streams import ChatStream
from .tracing import Asking

if TYPE_CHECKING:
    from .structure.profiles import Profile

T = TypeVar("T")

#: A conversation: one user's text, typed messages, or mappings in the form of the OpenAI API.
Messages = str | Sequence[ChatMessage | Mapping[str, Any]]


class ModelClient(ABC):
    """What can be asked of models, wherever they are: behind the bus (:class:`Client`) or in this process
    (``modelbus.testing``)."""

    publisher: Publishing

    @abstractmethod
    def capabilities(self, model: str) -> Capabilities:
        """What any request to the model can rely on: what all its workers can do.

        Raises:
            ModelNotFound: there is no such model.
        """

    def revision(self, model: str) -> str:
        """Which weights answer for a model, as far as it is known: another text when it has been deployed anew."""
        return ""

    def profile(self, model: str) -> Profile:
        """The same about the form of an answer."""
        from .structure.profiles import profile_of

        return profile_of(self.capabilities(model))

    async def chat(
        self, model: str, messages: Messages, *, options: CallOptions | None = None, **fields: Any
    ) -> ChatAnswer:
        """The whole answer to a conversation.

        Args:
            model: its name on the bus; ``model:adapter`` lays an adapter over it.
            messages: a text is one turn of the user.
            options: budget, lane, tenant, ...
            fields: fields of ``Sampling`` (``temperature=0``, ``max_tokens=10``) and of ``Chat``
                (``tools=``, ``response_format=``); others go to the engine, which refuses what it does not know.

        Raises:
            ModelBusError: one of its subclasses, see ``modelbus.errors``.
        """
        call = ChatCall(model=model, task=chat_task(messages, fields), options=plain(options))
        return await around(call, self._chat, ChatAnswer)

    async def _chat(self, asked: ChatCall) -> ChatAnswer:
        started = time.monotonic()
        call_id, builder = await self._ask("chat", asked)
        return ChatAnswer(
            id=call_id,
            model=asked.model,
            choices=builder.choices,
            usage=builder.usage,
            time_cost_ms=(time.monotonic() - started) * 1000,
            rung=builder.done.rung if builder.done else "",
            attempts=builder.done.attempts if builder.done else 0,
            grounding=builder.done.grounding if builder.done else None,
        )

    async def _ask(self, operation: str, asked: Call) -> tuple[str, AnswerBuilder]:
        """The id of a request, and its whole answer."""
        sampling = asked.task.sampling if isinstance(asked.task, Chat) else None
        with Asking(operation, asked.model, asked.options, sampling) as asking:
            call = await self.publisher.publish(asked.model, asked.task, asking.options)
            builder = await collect(call)
            asking.answered(builder.usage, id=call.id, finish_reasons=[c.finish_reason for c in builder.choices])
        return call.id, builder

    def stream(
        self, model: str, messages: Messages, *, options: CallOptions | None = None, **fields: Any
    ) -> ChatStream:
        """An answer as it comes; see ``chat`` for the arguments and :class:`ChatStream` for its use."""
        return ChatStream(self.publisher, model, chat_task(messages, fields), options or CallOptions())

    async def embed(
        self,
        model: str,
        texts: str | Sequence[str],
        *,
        dimensions: int | None = None,
        options: CallOptions | None = None,
    ) -> EmbeddingAnswer:
        """The vectors of texts.

        Raises:
            ModelBusError: one of its subclasses, see ``modelbus.errors``.
        """
        task = Embedding(input=_inputs(texts, "embed"), dimensions=dimensions)
        call = EmbeddingCall(model=model, task=task, options=plain(options))
        return await around(call, self._embed, EmbeddingAnswer)

    async def _embed(self, asked: EmbeddingCall) -> EmbeddingAnswer:
        call_id, builder = await self._ask("embedding", asked)
        return EmbeddingAnswer(
            id=call_id,
            model=asked.model,
            vectors=[floats(vector) for vector in builder.vectors],
            dimensions=builder.dimensions,
            usage=builder.usage,
        )

    async def rerank(
        self,
        model: str,
        query: str,
        documents: Sequence[str],
        *,
        top_n: int | None = None,
        options: CallOptions | None = None,
    ) -> Ranking:
        """The documents, those that answer the query best first.

        Args:
            top_n: only so many of them; None: all.

        Raises:
            ModelBusError: one of its subclasses, see ``modelbus.errors``.
        """
        texts = _listed(documents, "documents")
        if not texts:
            raise InvalidRequest("there is no document to rank", param="documents")
        if top_n is not None and top_n < 1:
            raise InvalidRequest(f"top_n must be at least 1, not {top_n}", param="top_n")
        task = Score(queries=[query], documents=texts)
        call = ScoreCall(model=model, task=task, options=plain(options))
        ranking = await around(call, self._rank, Ranking)
        return ranking if top_n is None else msgspec.structs.replace(ranking, documents=ranking.documents[:top_n])

    async def score(
        self, model: str, pairs: Sequence[tuple[str, str]], *, options: CallOptions | None = None
    ) -> Ranking:
        """Pairs of a query and a document, those that fit each other best first; ``index`` is the pair's place.

        Raises:
            ModelBusError: one of its subclasses, see ``modelbus.errors``.
        """
        if not pairs:
            raise InvalidRequest("there is no pair to score", param="pairs")
        try:
            queries, documents = zip(*pairs, strict=True)
        except (TypeError, ValueError) as error:
            raise InvalidRequest("each pair is a query and a document", param="pairs") from error
        call = ScoreCall(
            model=model, task=Score(queries=list(queries), documents=list(documents)), options=plain(options)
        )
        return await around(call, self._rank, Ranking)

    async def _rank(self, asked: ScoreCall) -> Ranking:
        call_id, builder = await self._ask("rerank", asked)
        scores = [floats(vector)[0] for vector in builder.vectors]
        order = sorted(range(len(scores)), key=lambda index: -scores[index])
        documents = asked.task.documents
        ranked = [RankedDocument(index=index, score=scores[index], text=documents[index]) for index in order]
        return Ranking(id=call_id, model=asked.model, documents=ranked, usage=builder.usage)

    async def classify(
        self, model: str, texts: str | Sequence[str], *, options: CallOptions | None = None
    ) -> ClassificationAnswer:
        """The classes of texts.

        Raises:
            ModelBusError: one of its subclasses, see ``modelbus.errors``.
        """
        task = Classification(input=_inputs(texts, "classify"))
        call = ClassificationCall(model=model, task=task, options=plain(options))
        return await around(call, self._classify, ClassificationAnswer)

    async def _classify(self, asked: ClassificationCall) -> ClassificationAnswer:
        call_id, builder = await self._ask("classify", asked)
        classified = []
        for vector in builder.vectors:
            probabilities = dict(zip(builder.labels, floats(vector), strict=True))
            label = max(probabilities, key=lambda name: probabilities[name])
            classified.append(ClassifiedText(label=label, probabilities=probabilities))
        return ClassificationAnswer(id=call_id, model=asked.model, texts=classified, usage=builder.usage)

    async def decide(
        self,
        model: str,
        messages: Messages,
        question: str,
        *,
        of: Any = bool,
        descriptions: Mapping[Any, str] | None = None,
        options: CallOptions | None = None,
    ) -> Decision[Any]:
        """What a model decides, and how likely each value is; nothing is generated.

        Args:
            messages: what the question is about.
            of: the type of the value: ``bool``, a ``Literal`` or an ``Enum``.
            descriptions: what values mean, by value.

        Raises:
            UnsupportedField: the model's engine gives no log probabilities of labels.
            InvalidRequest: ``of`` is no such type, or two values are the same to the model's tokenizer.
            ModelBusError: one of its subclasses, see ``modelbus.errors``.
        """
        labels = labels_of(of, descriptions)
        return await self.decide_among(
            model, asked(chat_task(messages, {}).messages, question, labels), labels, options
        )

    async def decide_among(
        self, model: str, messages: Sequence[ChatMessage], labels: Labels, options: CallOptions | None = None
    ) -> Decision[Any]:
        """As :meth:`decide`, where the messages ask the question already."""
        tasks = self.capabilities(model).tasks
        if tasks and "decision" not in tasks:
            raise UnsupportedField(
                f"model {model!r} gives no log probabilities of labels, which decisions are made of", param="model"
            )
        task = DecisionTask(messages=list(messages), labels=[label.text for label in labels])

        async def decided(asked: DecisionCall) -> Decision[Any]:
            call_id, builder = await self._ask("decision", asked)
            judged = judge(builder.choices, len(labels))
            return decision_of(labels, judged, id=call_id, model=asked.model, usage=builder.usage)

        return await around(DecisionCall(model=model, task=task, options=plain(options)), decided, Decision)


def chat_task(messages: Messages, fields: Mapping[str, Any]) -> Chat:
    """A typed task of messages in any accepted form and of fields by name.

    Raises:
        InvalidRequest: a message or a field has the wrong type; ``param`` names it.
    """
    sampling = {name: value for name, value in fields.items() if name in _SAMPLING_FIELDS}
    chat = {name: value for name, value in fields.items() if name in _CHAT_FIELDS}
    extra = {name: value for name, value in fields.items() if name not in _SAMPLING_FIELDS | _CHAT_FIELDS}
    if isinstance(sampling.get("stop"), str):
        sampling["stop"] = [sampling["stop"]]
    if extra:
        chat["extra"] = {**chat.get("extra", {}), **extra}
    given: dict[str, Any] = {"type": "chat", "messages": _plain_messages(messages), "sampling": sampling, **chat}
    try:
        task = msgspec.convert(given, Chat)
    except msgspec.ValidationError as error:
        raise misfit(error) from error
    if task.sampling.seed is not None and not -(2**63) <= task.sampling.seed < 2**63:
        raise InvalidRequest("seed must be an integer of 64 bits", param="seed")
    if not task.messages:
        raise InvalidRequest("the conversation is empty", param="messages")
    return task


def plain(options: CallOptions | None) -> CallOptions:
    """For a caller who gets the answer as a whole, which can therefore begin anew."""
    if options is None:
        return _PLAIN
    return msgspec.structs.replace(options, stream=False) if options.stream else options


_PLAIN = CallOptions(stream=False)
_SAMPLING_FIELDS = frozenset(Sampling.__struct_fields__)
_CHAT_FIELDS = frozenset(Chat.__struct_fields__) - {"messages", "sampling"}


def _plain_messages(messages: Messages) -> list[Any]:
    if isinstance(messages, str):
        return [{"role": "user", "content": messages}]
    found: list[Any] = []
    for item in _listed(messages, "messages"):
        if isinstance(item, ChatMessage):
            found.append(msgspec.to_builtins(item))
        elif isinstance(item, Mapping):
            found.append(dict(item))
        else:
            raise InvalidRequest(
                f"a message is a ChatMessage or a mapping like {{'role': 'user', 'content': 'Hello'}}, not {str(item)[:60]!r}",
                param="messages",
            )
    return found


def _inputs(texts: str | Iterable[str], what: str) -> list[str | list[int]]:
    found: list[Any] = [texts] if isinstance(texts, str) else _listed(texts, "input")
    if not found:
        raise InvalidRequest(f"there is no text to {what}", param="input")
    return found


def _listed(given: Iterable[T], param: str) -> list[T]:
    """Anything that is several of something."""
    if isinstance(given, Iterable) and not isinstance(given, (str, bytes, Mapping)):
        return list(given)
    raise InvalidRequest(f"{param} must be a list, not {str(given)[:60]!r}", param=param)
