"""Several models answer, others rank their answers, and the best one is taken.

Reviewers see the answers without names and in a different order each time, and say an order; the places are added up by
reciprocal rank fusion (Cormack, Clarke and Buettcher 2009: 1 / (60 + place)). All that was said is in the result.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence
from typing import Any

import msgspec
from modelbus_broker.asking import CallOptions
from modelbus_broker.errors import ConfigurationError, ModelBusError
from modelbus_broker.messages import ChatMessage, Usage

from .answer_types import ChatAnswer
from .model_client import Messages, ModelClient, chat_task
from .structure import Ladder, answer, output_type
from .structure.replies import summed

#: The constant of reciprocal rank fusion: the larger, the less the first places count for.
RANK_CONSTANT = 60


class Candidate(msgspec.Struct, frozen=True, kw_only=True):
    """What one model has answered, or why it has not."""

    model: str
    answer: ChatAnswer | None = None
    error: ModelBusError | None = None
    score: float = 0.0  #: the sum of its places


class Review(msgspec.Struct, frozen=True, kw_only=True):
    """What one reviewer has said in one round."""

    model: str
    order: list[int] = []  #: candidates, the best first
    error: ModelBusError | None = None


class Fused(msgspec.Struct, frozen=True, kw_only=True):
    """The best answer, and how it was found."""

    answer: ChatAnswer
    candidates: list[Candidate]
    reviews: list[Review]
    usage: Usage  #: of all answers and reviews

    @property
    def text(self) -> str:
        return self.answer.text


async def fuse(
    client: ModelClient,
    models: Sequence[str],
    messages: Messages,
    *,
    reviewers: Sequence[str],
    rounds: int = 1,
    seed: int | None = None,
    options: CallOptions | None = None,
    **fields: Any,
) -> Fused:
    """Asks all models side by side and takes the answer that the reviewers place best. Of equals, the first is taken.

    A model that fails is left out, and so is a review that fails; without any review the first answer is taken.

    Args:
        models: who answers; one may be named several times.
        reviewers: models that rank; they may be among those.
        rounds: how often each reviewer ranks, with the answers in another order each time.
        seed: of the orders in which reviewers see the answers.
        fields: as ``client.chat``, for the answers.

    Raises:
        ConfigurationError: nobody is to answer, or to review.
        ModelBusError: that of the first model, if none has answered.
    """
    if not models or not reviewers or rounds < 1:
        raise ConfigurationError("fusion needs models that answer, reviewers, and at least one round")
    turns = chat_task(messages, {}).messages
    candidates = list(await asyncio.gather(*(_candidate(client, model, turns, options, fields) for model in models)))
    there = [index for index, candidate in enumerate(candidates) if candidate.answer is not None]
    if not there:
        assert candidates[0].error is not None
        raise candidates[0].error
    reviews: list[Review] = []
    usages = [candidate.answer.usage for candidate in candidates if candidate.answer is not None]
    if len(there) > 1:
        mixing = random.Random(seed)
        orders = [(model, mixing.sample(there, len(there))) for _ in range(rounds) for model in reviewers]
        found = await asyncio.gather(
            *(_review(client, model, turns, candidates, order, options) for model, order in orders)
        )
        reviews = [review for review, _ in found]
        usages += [usage for _, usage in found]
    scores = reciprocal_ranks([review.order for review in reviews], len(candidates))
    candidates = [msgspec.structs.replace(one, score=score) for one, score in zip(candidates, scores, strict=True)]
    best = candidates[max(there, key=lambda index: scores[index])]
    assert best.answer is not None
    return Fused(answer=best.answer, candidates=candidates, reviews=reviews, usage=summed(usages))


def reciprocal_ranks(orders: Sequence[Sequence[int]], count: int) -> list[float]:
    """The score of each of ``count`` things from some orders of them, the best first; what an order leaves out gets nothing."""
    scores = [0.0] * count
    for order in orders:
        for place, index in enumerate(order, 1):
            scores[index] += 1 / (RANK_CONSTANT + place)
    return scores


async def _candidate(
    client: ModelClient, model: str, turns: list[ChatMessage], options: CallOptions | None, fields: dict[str, Any]
) -> Candidate:
    try:
        return Candidate(model=model, answer=await client.chat(model, turns, options=options, **fields))
    except ModelBusError as error:
        return Candidate(model=model, error=error)


async def _review(
    client: ModelClient, model: str, turns: list[ChatMessage], candidates: list[Candidate], order: list[int],
    options: CallOptions | None,
) -> tuple[Review, Usage]:  # fmt: skip
    question = "\n\n".join(f"[{turn.role}]\n{turn.text()}" for turn in turns)
    shown = []
    for number, index in enumerate(order, 1):
        said = candidates[index].answer
        assert said is not None
        shown.append(f"Answer {number}:\n{said.text}")
    asked = (
        f"A conversation:\n\n{question}\n\nSeveral answers to its end:\n\n" + "\n\n".join(shown) + "\n\n"
        f"Rank them from the best to the worst. Give the numbers 1 to {len(order)} in that order, each once."
    )
    try:
        result = await answer(
            client, model, [ChatMessage(role="user", content=asked)], output_type(list[int]).with_validators(_once(len(order))),
            sampling={"temperature": 0}, options=options, ladder=Ladder(),
        )  # fmt: skip
    except ModelBusError as error:
        return Review(model=model, error=error), Usage()
    return Review(model=model, order=[order[number - 1] for number in result.value]), result.usage


def _once(count: int) -> Any:
    def check(numbers: list[int]) -> None:
        if sorted(numbers) != list(range(1, count + 1)):
            raise ValueError(f"give each of the numbers 1 to {count} exactly once")

    return check
