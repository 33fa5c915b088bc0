"""The thread that runs all requests: a step for all that write, then one for a piece of a prompt, and so on."""

from __future__ import annotations

import asyncio
import functools
import logging
import queue
import threading
from collections import deque
from collections.abc import AsyncGenerator, Callable
from typing import Any

from modelbus_broker.errors import EngineFailed, ModelBusError
from modelbus_broker.messages import TokenLogprob

from ..base import Output
from ..torch_model.choice import Choice
from ..torch_model.work import Work
from .decoding import Decoder, Piece
from .sampling import Sampler, token_score
from .vocabulary import GgufTokenizer, TokenTexts

log = logging.getLogger(__name__)

#: Tokens of a prompt in one step when the probabilities of all of them are wanted, which takes memory.
_SCORED_PIECE = 128


class _End:
    """The request is complete."""


_Item = list[Output] | ModelBusError | type[_End]


class _Request:
    def __init__(self, work: Work) -> None:
        self.work = work
        self.items: asyncio.Queue[_Item] = asyncio.Queue()
        #: Set by the event loop, read by the thread before each step.
        self.aborted = False
        self.open = len(work.prompts) * work.n  #: choices that have not ended
        self.over = False


class _Branch:
    """One choice of a request: a sequence of the context is its own while it runs."""

    def __init__(self, request: _Request, index: int) -> None:
        self.request, self.index = request, index
        self.number = index // request.work.n
        self.prompt = request.work.prompts[self.number]
        self.scored = bool(request.work.echo) and request.work.plan.logprobs is not None
        self.scores: list[TokenLogprob] = []
        self.choice: Choice | None = None  #: since it has a sequence
        self.sampler: Sampler | None = None
        self.sequence = -1
        self.begun = False  #: what was known before the first new token has gone out
        self.parts: deque[list[int]] = deque()  #: to be read by the model, in these pieces
        self.position = 0
        self.after_prompt: Any = None  #: the logits of the prompt's last token, while nothing was read after it

    @property
    def reads(self) -> bool:
        return self.position < len(self.prompt)

    def next_piece(self) -> Piece:
        tokens = self.parts[0]
        last = len(self.parts) == 1 or self.position + len(tokens) == len(self.prompt)
        all_wanted = self.scored and self.reads
        return Piece(self.sequence, self.position, tokens, "all" if all_wanted else "last" if last else "none")


class BatchLoop:
    """Runs work on a context in one thread of its own."""

    def __init__(
        self, decoder: Decoder, tokenizer: GgufTokenizer, *, prompt_piece: int, replay_piece: int, last_n: int
    ) -> None:
        """Starts the thread.

        Args:
            prompt_piece: tokens of a prompt in one step.
            replay_piece: tokens of an earlier run in one step.
            last_n: how many tokens a repetition penalty looks back at; below 0: all.
        """
        self._decoder, self._tokenizer, self._last_n = decoder, tokenizer, last_n
        self._prompt_piece, self._replay_piece = prompt_piece, replay_piece
        self._texts = TokenTexts(tokenizer)
        self._inbox: queue.SimpleQueue[_Request | None] = queue.SimpleQueue()
        self._waiting: list[_Branch] = []
        self._branches: list[_Branch] = []
        self._free = list(range(decoder.sequences))
        self._loop = asyncio.get_running_loop()
        self._thread = threading.Thread(target=self._run, name="generation", daemon=True)
        self._thread.start()

    @property
    def running(self) -> int:
        """Sequences that are in use."""
        return len(self._branches)

    async def outputs(self, work: Work) -> AsyncGenerator[list[Output]]:
        """What the steps give, all that is ready at a time. Closing the iterator takes the request out of the loop."""
        request = _Request(work)
        self._inbox.put(request)
        try:
            while True:
                item = await request.items.get()
                if isinstance(item, list):
                    yield item
                elif isinstance(item, ModelBusError):
                    raise item
                else:
                    return
        finally:
            request.aborted = True

    async def close(self) -> None:
        """Stops the thread after the step that it is in."""
        self._inbox.put(None)
        await asyncio.to_thread(self._thread.join)

    def _run(self) -> None:
        while self._take_new():
            ready: dict[_Request, list[Output]] = {}
            failed: dict[_Request, ModelBusError] = {}
            self._round(ready, failed)
            self._tidy(ready, failed)
        self._decoder.close()

    def _take_new(self) -> bool:
        """Takes in what is new, waiting for it if nothing runs. False: the loop is closed."""
        while not (self._branches or self._waiting) or not self._inbox.empty():
            request = self._inbox.get()
            if request is None:
                return False
            self._waiting.extend(_Branch(request, index) for index in range(request.open))
        return True

    def _round(self, ready: dict[_Request, list[Output]], failed: dict[_Request, ModelBusError]) -> None:
        for branch in [*self._branches, *self._waiting]:
            if branch.request.aborted:
                self._end(branch)
        for branch in list(self._waiting):
            twin = self._twin(branch)
            if self._free and (twin is None or not twin.reads):
                self._guard(functools.partial(self._begin, twin), branch, ready, failed)
        self._step([branch for branch in self._branches if branch.parts and not branch.reads], ready, failed)
        # A prompt is read alone, so that its pieces, and with them the last bits, are the same whoever else runs.
        self._step([branch for branch in self._branches if branch.parts and branch.reads][:1], ready, failed)

    def _twin(self, branch: _Branch) -> _Branch | None:
        """Another choice of the same prompt, from which what it has read can be copied, now or soon."""
        for other in () if branch.scored else self._branches:
            if other.request is branch.request and other.number == branch.number:
                if other.reads or other.after_prompt is not None:
                    return other
        return None

    def _step(
        self, branches: list[_Branch], ready: dict[_Request, list[Output]], failed: dict[_Request, ModelBusError]
    ) -> None:
        branches = [branch for branch in branches if branch.request not in failed]
        if not branches:
            return
        pieces = [branch.next_piece() for branch in branches]
        try:
            rows = self._decoder.decode(pieces)
        except ModelBusError as error:
            failed.update({branch.request: error for branch in branches})
            return
        for branch, piece, found in zip(branches, pieces, rows, strict=True):
            branch.parts.popleft()
            branch.position += len(piece.tokens)
            branch.after_prompt = found[-1] if branch.position == len(branch.prompt) else None
            self._guard(functools.partial(self._advance, found), branch, ready, failed)

    def _guard(
        self,
        act: Callable[[_Branch, list[Output]], None],
        branch: _Branch,
        ready: dict[_Request, list[Output]],
        failed: dict[_Request, ModelBusError],
    ) -> None:
        if branch.request in failed:
            return
        try:
            act(branch, ready.setdefault(branch.request, []))
        except ModelBusError as error:
            failed[branch.request] = error
        except Exception as error:
            log.exception("a step failed")
            failed[branch.request] = EngineFailed(f"{type(error).__name__}: {error}")

    def _tidy(self, ready: dict[_Request, list[Output]], failed: dict[_Request, ModelBusError]) -> None:
        """Ends what has failed, and puts all outputs of the step out in one turn of the event loop."""
        for branch in [*self._branches, *self._waiting]:
            if branch.request in failed:
                self._end(branch)
        items: list[tuple[_Request, _Item]] = []
        for request, outputs in ready.items():
            if outputs:
                items.append((request, outputs))
            if request not in failed and request.open == 0 and not request.over:
                request.over = True
                items.append((request, _End))
        items += failed.items()
        if items:
            self._loop.call_soon_threadsafe(_deliver, items)

    def _begin(self, twin: _Branch | None, branch: _Branch, outputs: list[Output]) -> None:
        work = branch.request.work
        self._waiting.remove(branch)
        branch.choice = Choice(work, branch.number, branch.index, self._tokenizer)
        branch.sequence = self._free.pop()
        self._branches.append(branch)
        if not branch.scored:
            self._first_output(branch, outputs)
            if branch.choice.finish:
                return
        before, prompt = work.before(branch.index), branch.prompt
        branch.sampler = Sampler(work.plan, branch.index, prompt, self._last_n, branch.choice.constraint)
        branch.sampler.replay(before)
        # What an earlier run has made is read in other pieces than prompts: as it was written, to the last bit.
        size = self._replay_piece
        branch.parts.extend(before[start : start + size] for start in range(0, len(before), size))
        if twin is not None:
            self._decoder.copy(twin.sequence, branch.sequence)
            branch.position, branch.after_prompt = len(prompt), twin.after_prompt
            self._advance([branch.after_prompt], branch, outputs)
            return
        size = min(self._prompt_piece, _SCORED_PIECE) if branch.scored else self._prompt_piece
        branch.parts.extendleft(reversed([prompt[start : start + size] for start in range(0, len(prompt), size)]))

    def _first_output(self, branch: _Branch, outputs: list[Output]) -> None:
        assert branch.choice is not None
        branch.begun = True
        first = branch.choice.begin(branch.scores)
        if first.text or first.finish_reason or first.logprobs:
            outputs.append(first)
        if branch.choice.finish:
            self._end(branch)

    def _advance(self, rows: Any, branch: _Branch, outputs: list[Output]) -> None:
        """The model has read one more piece."""
        work, choice, sampler = branch.request.work, branch.choice, branch.sampler
        assert choice is not None and sampler is not None
        alternatives = work.plan.logprobs
        if not branch.begun:
            self._score_prompt(rows, branch)
            if branch.reads:
                return
            self._first_output(branch, outputs)
            if choice.finish:
                return
        if branch.parts:
            return
        token = sampler.choose(rows[-1])
        sampler.count(token)
        score = None if alternatives is None else token_score(self._texts, rows[-1], token, alternatives)
        outputs.append(choice.take(token, score))
        if choice.finish:
            self._end(branch)
        else:
            branch.parts.append([token])

    def _score_prompt(self, rows: Any, branch: _Branch) -> None:
        alternatives = branch.request.work.plan.logprobs
        assert alternatives is not None
        if not branch.scores:
            text, raw = self._texts.of(branch.prompt[0])
            branch.scores.append(TokenLogprob(token=text, logprob=0.0, bytes=raw, token_id=branch.prompt[0]))
        following = branch.prompt[len(branch.scores) : len(branch.scores) + len(rows)]
        branch.scores += [
            token_score(self._texts, row, token, alternatives) for row, token in zip(rows, following, strict=False)
        ]

    def _end(self, branch: _Branch) -> None:
        """Takes a branch out; its sequence is free for another."""
        if branch in self._waiting:
            self._waiting.remove(branch)
        if branch in self._branches:
            self._branches.remove(branch)
            self._decoder.clear(branch.sequence)
            self._free.append(branch.sequence)
        branch.request.open -= 1


def _deliver(items: list[tuple[_Request, _Item]]) -> None:
    for request, item in items:
        request.items.put_nowait(item)
