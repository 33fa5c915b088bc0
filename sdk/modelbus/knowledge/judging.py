"""How well texts fit a question, as a model judges them: one request for each text, many at once, in the lane for batches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import msgspec
from modelbus_broker.asking import CallOptions
from modelbus_broker.errors import OutputError

from ..gathering import gathered
from ..model_client import ModelClient
from ..structure import Ladder, answer

#: Requests to the model that judges, at the same time.
AT_ONCE = 16
#: From here on a text is taken.
RELEVANT = 0.5


class Relevance(msgspec.Struct, frozen=True):
    """How much a document helps to answer a question."""

    score: Annotated[
        int, msgspec.Meta(ge=0, le=10, description="0: it has nothing to do with it; 10: it has the answer")
    ]


async def relevances(client: ModelClient, model: str, question: str, texts: Sequence[str], ask: str) -> list[float]:
    """For each text how likely the model finds that it fits, 0 to 1.

    A model whose engine decides (see ``ModelClient.decide``) gives the probability of its "yes"; any other one a number from
    0 to 10. An answer that is no such number counts as 0.

    Args:
        ask: the question about each text, to be answered with yes or no.

    Raises:
        ModelBusError: what the model says; the first error ends the others.
    """
    options = CallOptions(lane="lo", wait=True, stream=False)
    decides = "decision" in client.capabilities(model).tasks

    async def one(text: str) -> float:
        about = f"Document:\n\n{text}\n\nQuestion: {question}"
        if decides:
            return (await client.decide(model, about, ask, of=bool, options=options)).probabilities[True]
        words = f"{about}\n\n{ask} Give a score from 0 (no) to 10 (yes)."
        try:
            found = await answer(
                client, model, words, Relevance, options=options, ladder=Ladder(reasks=1), sampling={"temperature": 0}
            )
        except OutputError:
            return 0.0
        return found.value.score / 10

    return await gathered([one(text) for text in texts], AT_ONCE)
