"""Tool calls are told from a model's text as it comes.

What has been given out depends on the tokens alone, so a run that goes on after another's tokens knows by replaying
them which pieces of which calls the client has.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection
from typing import Any, NamedTuple

from modelbus_broker.messages import ToolCallDelta

from .call_formats import CallFormat
from .text import overlap


class Piece(NamedTuple):
    """What a piece of a model's text says."""

    text: str = ""
    calls: list[ToolCallDelta] = []
    reasoning: str = ""


class JsonExtent:
    """Finds the end of a JSON object that comes in pieces."""

    #: All that may stand outside of the strings of JSON.
    _OUTSIDE = frozenset(' \t\r\n{}[]:,"+-.0123456789eEtrufalsn')

    def __init__(self) -> None:
        self._depth = 0
        self._in_string = self._escaped = False
        self.broken = False  #: something stood there that no JSON has

    def end(self, text: str) -> int:
        """Where in this piece the object ends, or what is no JSON begins; -1: not in this piece."""
        for at, letter in enumerate(text):
            if self._in_string:
                if self._escaped:
                    self._escaped = False
                elif letter == "\\":
                    self._escaped = True
                elif letter == '"':
                    self._in_string = False
            elif letter not in self._OUTSIDE:
                self.broken = True
                return at
            elif letter == '"':
                self._in_string = True
            elif letter in "{[":
                self._depth += 1
            elif letter in "}]":
                self._depth -= 1
                if self._depth <= 0:
                    return at + 1
        return -1


#: The usual order, in which the arguments can be passed on as they come. Other orders are read at the end of the object.
_HEADER = re.compile(
    r'\{\s*(?:"type"\s*:\s*"function"\s*,\s*)?"name"\s*:\s*("(?:[^"\\]|\\.)*")\s*,\s*'
    r'"(?:arguments|parameters)"\s*:\s*(?=\{)'
)
#: How an object begins that may be a call, as far as it has come.
_MAYBE_CALL = re.compile(r'\{\s*(?:"[^"]*)?\Z|\{\s*"(?:name|type|id|arguments|parameters)"')


class CallObject:
    """One call that is written as a JSON object with a name and arguments.

    Attributes:
        raw: all of it so far.
        name: "" until it is known to be a call.
        ended: the object has ended.
        refused: it is no call; ``raw`` is ordinary text.
    """

    def __init__(self, known: Collection[str] | None) -> None:
        """``known``: it is only a call if its name is one of these, which an ordinary object is told from by."""
        self.raw = ""
        self.name = ""
        self.ended = self.refused = False
        self._known = known
        self._whole, self._arguments = JsonExtent(), JsonExtent()
        self._at = -1  # where in raw the arguments go on; -1: not there yet, or all passed on

    def add(self, text: str) -> tuple[list[tuple[str, str]], str]:
        """Pieces of name and of arguments that this text brings, and the text after the object."""
        end = self._whole.end(text)
        part, rest = (text, "") if end < 0 else (text[:end], text[end:])
        self.raw += part
        pieces = self._passed_on()
        if end >= 0:
            self.ended = True
            if not self.name:
                pieces = self._read_whole()
        elif not self.name and self._known is not None and not _MAYBE_CALL.match(self.raw):
            self.refused = True
        return pieces, rest

    def _passed_on(self) -> list[tuple[str, str]]:
        pieces: list[tuple[str, str]] = []
        if not self.name:
            header = _HEADER.match(self.raw)
            name = _loaded(header[1]) if header else None
            if header is None or not isinstance(name, str) or not self._may_be(name):
                return []
            self.name, self._at = name, header.end()
            pieces.append((name, ""))
        if self._at >= 0:
            new = self.raw[self._at :]
            end = self._arguments.end(new)
            new = new if end < 0 else new[:end]
            self._at = self._at + len(new) if end < 0 else -1
            if new:
                pieces.append(("", new))
        return pieces

    def _read_whole(self) -> list[tuple[str, str]]:
        """A call whose members stand in another order, or whose arguments are missing or a text."""
        found = None if self._whole.broken else _loaded(self.raw)
        name = found.get("name") if isinstance(found, dict) else None
        if not isinstance(name, str) or not self._may_be(name):
            self.refused = True
            return []
        assert isinstance(found, dict)
        arguments = found.get("arguments", found.get("parameters"))
        if arguments is None and self._known is not None:
            self.refused = True
            return []
        self.name = name
        text = arguments if isinstance(arguments, str) else json.dumps(arguments or {}, ensure_ascii=False)
        return [(name, ""), ("", text)]

    @property
    def broken(self) -> bool:
        """Something in it is no JSON."""
        return self._whole.broken

    def _may_be(self, name: str) -> bool:
        return bool(name) and (self._known is None or name in self._known)


def _loaded(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return None


class CallParser:
    """Takes the text of one choice and gives out what is content and what are calls.

    Never a piece of a call as content, unless it turns out to be none. Blanks around calls are left out.

    Attributes:
        calls: how many have begun: their names are given out.
        ended: how many are complete.
    """

    def __init__(self, format: CallFormat, tools: Collection[str], call_id: Callable[[int], str]) -> None:
        """``call_id`` gives the n-th call of the choice its id."""
        self._format, self._call_id = format, call_id
        self._known = tools if format.bare else None
        self._bare_name = re.compile(rf"([\w.-]+)(?:\[CALL_ID\]\w+)?(?:{re.escape(format.name_end)})?\s*(?=\{{)")
        self.calls = self.ended = 0
        self._waiting = ""  # not looked at yet, or too short to tell
        self._held = ""  # the beginning of what may be a call: shown if it is none
        self._object = CallObject(self._known)
        self._arguments = JsonExtent()
        # Each step looks at the waiting text and says whether it came further.
        self._step: Callable[[], bool] = self._after if format.bare else self._in_text
        self._out_text: list[str] = []
        self._out_calls: list[ToolCallDelta] = []

    def add(self, text: str) -> Piece:
        self._waiting += text
        while self._waiting and self._step():
            pass
        return self._take_out()

    def finish(self, *, cut: bool) -> Piece:
        """The text has ended; what still waits is shown if it is no call.

        ``cut``: by the token limit. The beginning of a call whose name is not known yet is left out then, except where
        it may be an ordinary object.
        """
        text = self._held + (self._object.raw if self._step == self._in_object else "") + self._waiting
        self._held = self._waiting = ""
        begun = self._step in (self._opened, self._in_name, self._in_object)
        if self._step == self._in_object and self._object.name:
            text = ""
        elif begun and cut and (self.calls or not self._format.bare):
            text = ""
        elif self._step == self._after and self.calls:
            text = ""
        elif self._step in (self._in_arguments, self._lost):
            text = ""
        self._out_text.append(text)
        return self._take_out()

    def _take_out(self) -> Piece:
        piece = Piece("".join(self._out_text), self._out_calls)
        self._out_text, self._out_calls = [], []
        return piece

    def _in_text(self) -> bool:
        begin, text = self._format.begin, self._waiting
        at = text.find(begin)
        # Blanks before a call belong to it.
        shown = text[: at if at >= 0 else len(text) - overlap(text, begin)].rstrip()
        self._out_text.append(shown)
        self._waiting = text[len(shown) :]
        if at >= 0:
            self._hold(at - len(shown) + len(begin))
            self._step = self._opened
        return at >= 0

    def _opened(self) -> bool:
        """``begin`` has come."""
        self._hold(len(self._waiting) - len(self._waiting.lstrip(self._format.separators)))
        if self._waiting.startswith("{"):
            self._begin_object()
        elif self._waiting and self._format.name_end:
            self._step = self._in_name
        elif self._waiting:
            self._show_held()
        return bool(self._waiting)

    def _after(self) -> bool:
        """A call has ended; or the answer begins, and may do so with a call."""
        format, text = self._format, self._waiting
        if text.startswith("{") and format.repeats:
            self._begin_object()
        elif text.startswith(format.begin):
            self._hold(len(format.begin))
            self._step = self._opened
        elif format.end and text.startswith(format.end):
            self._hold(len(format.end))
        elif format.begin.startswith(text) or format.end.startswith(text):
            return False
        elif text[0] in format.separators:
            self._hold(1)  # the next one may be the first of ``begin``
        else:
            if self.calls:
                self._held = ""
            self._show_held()
        return bool(self._waiting)

    def _in_object(self) -> bool:
        pieces, self._waiting = self._object.add(self._waiting)
        for name, arguments in pieces:
            if name:
                self._begin_call(name)
            else:
                self._out_calls.append(ToolCallDelta(index=self.calls - 1, arguments=arguments))
        if self._object.refused:
            self._held += self._object.raw
            self._show_held()
        elif self._object.ended:
            self._end_call(self._object.broken)
        return bool(self._waiting)

    def _in_name(self) -> bool:
        """A name that stands bare before its arguments."""
        match = self._bare_name.match(self._waiting)
        if match is not None:
            self._waiting = self._waiting[match.end() :]
            self._begin_call(match[1])
            self._arguments = JsonExtent()
            self._step = self._in_arguments
        elif re.fullmatch(r"[\w.\-\[\]]+\s*", self._waiting):
            return False
        else:
            self._show_held()
        return True

    def _in_arguments(self) -> bool:
        """Of a call whose name stood bare."""
        end = self._arguments.end(self._waiting)
        part = self._waiting if end < 0 else self._waiting[:end]
        self._waiting = self._waiting[len(part) :]
        if part:
            self._out_calls.append(ToolCallDelta(index=self.calls - 1, arguments=part))
        if end >= 0:
            self._end_call(self._arguments.broken)
        return bool(self._waiting)

    def _lost(self) -> bool:
        """What follows in a call that is no JSON is neither arguments nor content."""
        at = self._waiting.find(self._format.end) if self._format.end else -1
        keep = overlap(self._waiting, self._format.end) if at < 0 else len(self._waiting) - at
        self._waiting = self._waiting[len(self._waiting) - keep :]
        if at >= 0:
            self._step = self._after
        return at >= 0

    def _hold(self, length: int) -> None:
        self._held, self._waiting = self._held + self._waiting[:length], self._waiting[length:]

    def _show_held(self) -> None:
        self._out_text.append(self._held)
        self._held = ""
        self._step = self._in_text

    def _begin_object(self) -> None:
        self._object = CallObject(self._known)
        self._step = self._in_object

    def _begin_call(self, name: str) -> None:
        self._held = ""
        self._out_calls.append(ToolCallDelta(index=self.calls, id=self._call_id(self.calls), name=name))
        self.calls += 1

    def _end_call(self, broken: bool) -> None:
        self.ended += 1
        self._step = self._lost if broken else self._after
