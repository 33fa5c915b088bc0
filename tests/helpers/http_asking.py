"""Requests over HTTP whose answers must be right to the last token, by clients that survive the loss of a gateway.

The model is an echo model: its answer is the question. A client whose gateway went away, or that was told that its
request was not taken, asks another gateway with the same ``Idempotency-Key``; every other end is a failure.
"""

from __future__ import annotations

import asyncio
import json
import random
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import aiohttp
import msgspec
from modelbus.testing.echo import count_tokens

#: The request was not accepted, or its gateway was told to stop: the client is to ask again.
ASK_AGAIN = {"model_unavailable", "bus_unavailable", "gateway_stopping"}

_SYLLABLES = ("mo", "ti", "ra", "ße", "ku", "lön", "da", "vé", "日", "本", "🙂", "shi", "na", "per", "çu")


class Question(msgspec.Struct, frozen=True, kw_only=True):
    """One request and what must come back."""

    number: int
    text: str
    stream: bool

    @classmethod
    def of(cls, seed: int | str, number: int, *, words: tuple[int, int] = (10, 80)) -> Question:
        """The same for the same seed and number."""
        dice = random.Random(f"{seed}/{number}")
        made = ("".join(dice.choices(_SYLLABLES, k=dice.randint(1, 4))) for _ in range(dice.randint(*words)))
        return cls(number=number, text=f"{number}: {' '.join(made)}", stream=dice.random() < 0.6)


class Answer(msgspec.Struct, frozen=True, kw_only=True):
    """A whole answer."""

    id: str  #: of the request on the bus
    text: str
    prompt_tokens: int
    completion_tokens: int


class Cut(Exception):
    """The connection was refused, or it ended before the answer did."""


class ErrorAnswer(Exception):
    """An error in the shape of the OpenAI API, as the response or as the last event of a stream."""

    def __init__(self, code: str, text: str) -> None:
        super().__init__(f"{code}: {text}")
        self.code = code


async def ask(session: aiohttp.ClientSession, url: str, question: Question, *, model: str = "echo") -> Answer:
    """Asks one gateway once.

    Raises:
        Cut, ErrorAnswer: see there.
        AssertionError: the answer looks whole and is not.
    """
    body: dict[str, Any] = {"model": model, "messages": [{"role": "user", "content": question.text}]}
    if question.stream:
        body |= {"stream": True, "stream_options": {"include_usage": True}}
    headers = {"Idempotency-Key": f"question-{question.number}"}
    try:
        async with session.post(f"{url}/v1/chat/completions", json=body, headers=headers) as response:
            if response.status != 200:
                error = (await response.json())["error"]
                raise ErrorAnswer(str(error["code"]), str(error["message"]))
            return _from_events(await response.read()) if question.stream else _from_body(await response.json())
    except (aiohttp.ClientError, ConnectionError) as error:
        raise Cut(str(error)) from error


def _from_body(body: dict[str, Any]) -> Answer:
    (choice,) = body["choices"]
    assert choice["finish_reason"] == "stop"
    return _answer(body["id"], choice["message"]["content"], body["usage"])


def _from_events(data: bytes) -> Answer:
    """Reads a stream that has ended.

    Raises:
        Cut: without its end.
    """
    lines = (line for event in data.split(b"\n\n")[:-1] for line in event.split(b"\n"))
    events = [line.removeprefix(b"data: ") for line in lines if line.startswith(b"data: ")]
    pieces: list[str] = []
    usage: dict[str, Any] = {}
    ids: set[str] = set()
    reasons: list[str] = []
    for event in events:
        if event == b"[DONE]":
            break
        chunk = json.loads(event)
        if "error" in chunk:
            raise ErrorAnswer(str(chunk["error"]["code"]), str(chunk["error"]["message"]))
        ids.add(chunk["id"])
        usage = chunk.get("usage") or usage
        for choice in chunk["choices"]:
            pieces.append(choice["delta"].get("content") or "")
            reasons += [choice["finish_reason"]] if choice["finish_reason"] else []
    else:
        raise Cut("the stream ended without [DONE]")
    assert reasons == ["stop"], reasons
    (id,) = ids
    return _answer(id, "".join(pieces), usage)


def _answer(id: str, text: str, usage: dict[str, Any]) -> Answer:
    return Answer(
        id=id.removeprefix("chatcmpl-"), text=text, prompt_tokens=usage["prompt_tokens"],
        completion_tokens=usage["completion_tokens"],
    )  # fmt: skip


class Clients:
    """Asks questions, each until it is answered, and keeps what came of them.

    Args:
        gateways: URLs; a client changes to the next when its own goes away.
        count: at least so many questions.
        go_on: asked when they are all asked; true for as long as more shall follow.
        give_up_s: for one question, all its tries together.

    Attributes:
        answers: by the question's number.
        again: why questions were asked again.
        failures: what must not happen.
    """

    def __init__(
        self,
        gateways: Sequence[str],
        *,
        seed: int | str,
        count: int,
        clients: int,
        words: tuple[int, int] = (10, 80),
        go_on: Callable[[], bool] = lambda: False,
        give_up_s: float = 120.0,
    ) -> None:
        self.answers: dict[int, Answer] = {}
        self.again: Counter[str] = Counter()
        self.failures: list[str] = []
        self.streams = 0
        self._gateways = gateways
        self._seed, self._count, self._clients, self._words = seed, count, clients, words
        self._go_on, self._give_up_s = go_on, give_up_s
        self._next = 0

    async def run(self) -> None:
        """Returns when all questions have come to an end."""
        timeout = aiohttp.ClientTimeout(total=None, connect=10)
        connector = aiohttp.TCPConnector(limit=0, force_close=True)
        async with aiohttp.ClientSession(timeout=timeout, connector=connector) as session:
            async with asyncio.TaskGroup() as group:
                for number in range(self._clients):
                    group.create_task(self._client(session, number))

    async def _client(self, session: aiohttp.ClientSession, client: int) -> None:
        gateway = client
        while self._next < self._count or self._go_on():
            question = Question.of(self._seed, self._next, words=self._words)
            self._next += 1
            gateway = await self._until_answered(session, question, gateway)

    async def _until_answered(self, session: aiohttp.ClientSession, question: Question, gateway: int) -> int:
        """The number of the gateway that the next question goes to."""
        why = ""
        try:
            async with asyncio.timeout(self._give_up_s):
                while True:
                    try:
                        answer = await ask(session, self._gateways[gateway % len(self._gateways)], question)
                    except Cut:
                        why = "gateway lost"
                    except ErrorAnswer as error:
                        if error.code not in ASK_AGAIN:
                            raise
                        why = error.code
                    else:
                        break
                    self.again[why] += 1
                    gateway += 1
                    await asyncio.sleep(0.1)
        except TimeoutError:
            self.failures.append(f"question {question.number} had no answer ({why or 'silence'})")
        except (ErrorAnswer, AssertionError) as error:
            self.failures.append(f"question {question.number}: {type(error).__name__}: {error}")
        else:
            self._check(question, answer)
        return gateway

    def _check(self, question: Question, answer: Answer) -> None:
        self.answers[question.number] = answer
        self.streams += question.stream
        tokens = count_tokens(question.text)
        if answer.text != question.text:
            self.failures.append(f"question {question.number} ({answer.id}): {answer.text!r} is not {question.text!r}")
        elif (answer.prompt_tokens, answer.completion_tokens) != (tokens, tokens):
            counted = f"{answer.prompt_tokens} + {answer.completion_tokens}"
            self.failures.append(f"question {question.number} ({answer.id}): usage {counted}, not {tokens} + {tokens}")
