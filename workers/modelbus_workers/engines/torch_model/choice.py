"""The text side of one choice: which tokens it has, what of their text may go out, whether it has ended."""

from __future__ import annotations

from typing import Any

from modelbus_broker.messages import FinishReason, TokenLogprob

from ..base import Output
from .call_parser import CallParser, Piece
from .grammar import Constraint
from .text import Detokenizer, StopBuffer
from .work import Work


class Choice:
    """One choice of one request.

    What has gone out after ``k`` tokens depends on these tokens alone, and goes out in one output with the last of them.
    So a run that goes on after the tokens of another one adds them again, and knows what the client has: all of it.

    Attributes:
        finish: why it has ended; "" while it goes on.
        constraint: where it is in the grammar of the request, if there is one.
        reasoning_tokens: how many of its tokens were reasoning.
    """

    def __init__(self, work: Work, number: int, index: int, tokenizer: Any) -> None:
        """``number`` is that of the prompt, ``index`` that of the choice."""
        self._work, self._plan = work, work.plan
        self._limit = work.max_tokens[number]
        self._index = index
        self._echo = work.echo[number] if work.echo else ""
        self._skip = work.emitted(index)
        self._tokens = 0
        self._text = Detokenizer(tokenizer, work.prompts[number], work.call_tokens)
        self._stops = StopBuffer(work.plan.stop)
        self._calls: CallParser | None = None
        if work.form.calls is not None:
            self._calls = CallParser(work.form.calls, work.form.tools, lambda call: work.call_id(index, call))
        self._reader = work.reader(number, index) if work.reader is not None else None
        self._called = False
        self.constraint: Constraint | None = work.grammar.constraint() if work.grammar is not None else None
        self.finish: FinishReason = ""
        self.reasoning_tokens = 0

    @property
    def reasons(self) -> bool:
        """Whether the next token is reasoning."""
        return self._reader is not None and self._reader.reasons

    @property
    def left(self) -> int:
        """How many more tokens it may have."""
        return self._limit - self._tokens

    def begin(self, echo_scores: list[TokenLogprob]) -> Output:
        """What the client lacks of the echo and of the tokens of an earlier run."""
        before = self._work.before(self._index)
        told = bool(before) or self._skip > 0
        text = self._echo + "".join(self._add(token).text for token in before)
        if not self.finish and self._tokens >= self._limit:
            text += self._end("length").text
        return Output(
            choice=self._index,
            text=self._unseen(text),
            finish_reason="" if told else self.finish,
            logprobs=[] if told else echo_scores,
        )

    def take(self, token: int, score: TokenLogprob | None) -> Output:
        """A new token. One that only ends the answer has no text, so it has no log probability either."""
        piece = self._add(token)
        ends = token in self._plan.stop_ids
        return Output(
            choice=self._index,
            text=self._unseen(piece.text),
            token_ids=[token],
            finish_reason=self.finish,
            reasoning=piece.reasoning,
            tool_calls=piece.calls,
            logprobs=[score] if score is not None and not ends else [],
        )

    def _add(self, token: int) -> Piece:
        if self.finish:
            return Piece()
        self._tokens += 1
        if self.constraint is not None:
            self.constraint.take(token)
        if token in self._plan.stop_ids and self._tokens > self._plan.min_tokens:
            return self._end("stop")
        self.reasoning_tokens += self.reasons
        said = Piece(self._text.add(token))
        if self._reader is not None:
            said = self._reader.add(token, said.text)
        return self._together(said, self._answer(said.text))

    def _answer(self, text: str) -> Piece:
        """What is no reasoning: it is where stop strings and calls are looked for."""
        if self._tokens > self._plan.min_tokens:
            text, found = self._stops.add(text)
            if found:
                self.finish = "stop"
                return self._read(text)
        if self.constraint is not None and self.constraint.complete:
            return self._end("stop", text)
        if self._tokens >= self._limit:
            return self._end("length", text)
        return self._read(text)

    def _end(self, reason: FinishReason, text: str = "") -> Piece:
        self.finish = reason
        said = Piece(self._text.flush())
        if self._reader is not None:
            said = self._reader.finish(said.text)
        rest, found = self._stops.add(said.text)
        if found:
            self.finish = "stop"
        else:
            rest += self._stops.flush()
        return self._together(said, self._read(text + rest))

    def _together(self, said: Piece, answer: Piece) -> Piece:
        """What the reader has told and what was made of the answer's text."""
        calls = [call for call in said.calls if not (self._work.form.one_call and call.index)]
        self._called = self._called or bool(calls)
        if self._called and self.finish == "stop":
            self.finish = "tool_calls"
        return Piece(answer.text, calls + answer.calls, said.reasoning + answer.reasoning)

    def _read(self, text: str) -> Piece:
        """Tells calls from content, where there may be calls."""
        calls = self._calls
        if calls is None:
            return Piece(text)
        piece = calls.add(text)
        if not self.finish and self._work.form.one_call and calls.ended:
            self.finish = "stop"
        if self.finish:
            last = calls.finish(cut=self.finish == "length")
            # Half the words that begin a call are no content where nothing but calls can come.
            text = "" if self._work.form.forced else piece.text + last.text
            piece = Piece(text, piece.calls + last.calls)
            if calls.calls and self.finish == "stop":
                self.finish = "tool_calls"
        return piece

    def _unseen(self, text: str) -> str:
        if not self._skip:
            return text
        unseen = text[self._skip :]
        self._skip = max(0, self._skip - len(text))
        return unseen
