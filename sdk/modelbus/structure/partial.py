"""JSON as it comes from a model: read letter by letter, forgiving, and never taking back what it has given.

One state machine reads whole answers and streams alike. What it accepts beyond JSON is what models write: single and
typographic quotes, bare keys, trailing and missing commas, comments, the constants of Python, tuples, line breaks in
strings. Valid JSON is read as JSON says. Nothing is made up: what is cut off stays away, or is a text's beginning.
"""

from __future__ import annotations

from typing import Any, Final

#: There is no value yet.
MISSING: Final[Any] = type("Missing", (), {"__repr__": lambda self: "MISSING", "__bool__": lambda self: False})()

#: More levels than this are no answer but a model that turns in circles.
MAX_DEPTH = 100
_CONSTANTS = {"true": True, "false": False, "null": None, "True": True, "False": False, "None": None}
_CLOSING = {"{": "}", "[": "]", "(": ")"}
_QUOTES = {'"': '"', "'": "'", "“": "”", "”": "”", "„": "“", "‘": "’", "`": "`"}
_ESCAPES = {
    '"': '"', "'": "'", "\\": "\\", "/": "/", "b": "\b", "f": "\f", "n": "\n", "r": "\r", "t": "\t", "`": "`",
}  # fmt: skip
_BLANKS = " \t\r\n\ufeff\u00a0"
#: What may stand after a string that has ended; a quote before anything else belongs to the string.
_AFTER_STRING = frozenset(",:}])\n#/\"'“‘`")
_WORD_ENDS = frozenset(" \t\r\n,:}])[{(#\"'")


class Broken(ValueError):
    """This is not JSON, not even as models write it. ``at``: how many letters were read before."""

    def __init__(self, words: str, at: int) -> None:
        super().__init__(words)
        self.at = at


class _Frame:
    """A list or an object that is open."""

    __slots__ = ("closing", "has_key", "key", "value")

    def __init__(self, value: list[Any] | dict[str, Any], closing: str) -> None:
        self.value = value
        self.closing = closing
        self.key = ""
        self.has_key = False  #: of an object: a key has come and its value has not


class PartialJSON:
    """Takes the text of one JSON value in pieces and holds the value so far.

    Texts grow, members and items are added, and none is taken back or changed: a number or a constant is there when it
    has ended, a member when its value has begun.

    Attributes:
        value: so far; ``MISSING`` before it has begun.
        complete: the value has ended.
        cut: after :meth:`finish`: the text ended before the value did.
        read: how many letters of the text were read.
    """

    def __init__(self) -> None:
        self.value: Any = MISSING
        self.complete = self.cut = False
        self.read = 0
        self._stack: list[_Frame] = []
        self._mode = "value"  # value, string, word, comment, done
        self._buffer: list[str] = []  # of the string or the word that is open
        self._quote = ""
        self._is_key = False
        self._escape = ""
        self._high = ""  # the first half of a pair of surrogates
        self._held = ""  # a quote that may close the string, and the blanks after it
        self._comment = ""
        self._resume = "value"  # the mode after a comment
        self._shown = 0  # letters of the open string that are in the value
        self._given = 0  # items that ``items`` has given out

    def feed(self, text: str) -> Any:
        """Reads on; what follows after the value's end is not read. Returns the value so far.

        Raises:
            Broken: this is no JSON.
        """
        for letter in text:
            if self.complete:
                break
            self._take(letter)
            self.read += 1
        self._show_string()
        return self.value

    def finish(self) -> Any:
        """The text has ended. Returns the value; see ``cut``."""
        if not self.complete:
            if self._mode == "string" and self._held:
                self._end_string()
            elif self._mode == "word" and not self._stack:
                self._end_word()
            elif self._mode == "string":
                self._show_string()
            self.cut = not self.complete
        return self.value

    @property
    def path(self) -> tuple[str | int, ...]:
        """Where in the value it is being written now: everything that is not on this path is done."""
        steps: list[str | int] = []
        for frame in self._stack:
            if isinstance(frame.value, list):
                steps.append(len(frame.value) - (1 if self._inside(frame) else 0))
            elif frame.has_key or self._inside(frame):
                steps.append(frame.key)
        return tuple(steps)

    def items(self) -> list[Any]:
        """The items of a list that are complete and were not given out before, in their order."""
        if not isinstance(self.value, list):
            return []
        done = len(self.value)
        if not self.complete and self._stack and self._inside(self._stack[0]):
            done -= 1
        new = self.value[self._given : done]
        self._given = max(self._given, done)
        return new

    def _inside(self, frame: _Frame) -> bool:
        """The last value in this frame is still open."""
        if frame is not self._stack[-1]:
            return True
        return self._mode == "string" and not self._is_key and self._shown >= 0

    # Letters

    def _take(self, letter: str) -> None:
        mode = self._mode
        if mode == "string":
            self._in_string(letter)
        elif mode == "word":
            self._in_word(letter)
        elif mode == "comment":
            self._in_comment(letter)
        elif mode == "slash":
            if letter not in "/*":
                raise Broken("a single / stands between the values", self.read)
            self._comment, self._mode = ("*" if letter == "*" else "/"), "comment"
        else:
            self._between(letter)

    def _between(self, letter: str) -> None:
        """Between values."""
        if letter in _BLANKS:
            return
        frame = self._stack[-1] if self._stack else None
        if letter == "#" or letter == "/":
            self._mode, self._comment = ("comment", "/") if letter == "#" else ("slash", "")
        elif letter in "{[(":
            self._open(letter)
        elif letter in "}])":
            self._close(letter)
        elif letter == "," and frame is not None:
            if frame.has_key:
                raise Broken("a member has no value", self.read)
        elif letter == ":" and frame is not None and frame.has_key:
            pass
        elif letter in _QUOTES:
            self._begin_string(letter)
        elif letter.isalnum() or letter in "+-._$":
            self._mode, self._buffer = "word", [letter]
            self._is_key = self._wants_key()
        else:
            raise Broken(f"{letter!r} stands where a value or its end should be", self.read)

    def _wants_key(self) -> bool:
        frame = self._stack[-1] if self._stack else None
        return frame is not None and isinstance(frame.value, dict) and not frame.has_key

    def _open(self, letter: str) -> None:
        if self._wants_key():
            raise Broken("an object stands where a key should be", self.read)
        if len(self._stack) >= MAX_DEPTH:
            raise Broken(f"it is nested more than {MAX_DEPTH} levels deep", self.read)
        new: list[Any] | dict[str, Any] = {} if letter == "{" else []
        self._add(new)
        self._stack.append(_Frame(new, _CLOSING[letter]))

    def _close(self, letter: str) -> None:
        if not self._stack or self._stack[-1].closing != letter:
            raise Broken(f"{letter!r} closes what is not open", self.read)
        if self._stack[-1].has_key:
            raise Broken("a member has no value", self.read)
        self._stack.pop()
        self._ended()

    def _add(self, value: Any) -> None:
        """A value begins, or is there at once."""
        if not self._stack:
            self.value = value
            return
        frame = self._stack[-1]
        if isinstance(frame.value, list):
            frame.value.append(value)
        else:
            frame.value[frame.key] = value
            frame.has_key = False

    def _ended(self) -> None:
        self._mode = "value"
        if not self._stack:
            self.complete, self._mode = True, "done"

    # Strings

    def _begin_string(self, letter: str) -> None:
        self._mode, self._quote, self._buffer, self._held = "string", _QUOTES[letter], [], ""
        self._is_key = self._wants_key()
        self._shown = -1  # nothing of it is in the value yet

    def _in_string(self, letter: str) -> None:
        if self._held:
            self._after_quote(letter)
        elif self._escape:
            self._in_escape(letter)
        elif letter == "\\":
            self._escape = "\\"
        elif letter == self._quote or (self._quote == "”" and letter == '"'):
            if not self._stack:
                self._end_string()
            else:
                self._held = letter
        else:
            self._drop_half()
            self._buffer.append(letter)

    def _after_quote(self, letter: str) -> None:
        """Whether the quote before closes the string is known from what stands after it."""
        if letter in " \t\r":
            self._held += letter
        elif letter in _AFTER_STRING and not (self._is_key and letter not in ":/#\n"):
            self._end_string()
            self._take(letter)
        elif self._is_key:
            raise Broken("a key is not followed by a colon", self.read)
        else:
            # An unescaped quote inside of a text.
            self._buffer.extend(self._held)
            self._held = ""
            self._in_string(letter)

    def _in_escape(self, letter: str) -> None:
        self._escape += letter
        if self._escape[1] == "u":
            if len(self._escape) > 2 and letter not in "0123456789abcdefABCDEF":
                self._drop_half()
                self._buffer.extend(self._escape[:-1])  # no escape after all
                self._escape = ""
                self._in_string(letter)
            elif len(self._escape) == 6:
                self._take_unit(int(self._escape[2:], 16))
                self._escape = ""
            return
        self._drop_half()
        known = _ESCAPES.get(letter)
        # Models write \d and \alpha where JSON wants \\d: both letters are meant.
        self._buffer.append(self._escape if known is None else known)
        self._escape = ""

    def _take_unit(self, unit: int) -> None:
        if self._high and 0xDC00 <= unit < 0xE000:
            self._buffer.append((self._high + chr(unit)).encode("utf-16", "surrogatepass").decode("utf-16"))
            self._high = ""
            return
        self._drop_half()
        if 0xD800 <= unit < 0xDC00:
            self._high = chr(unit)
        else:
            self._buffer.append("\ufffd" if 0xDC00 <= unit < 0xE000 else chr(unit))

    def _drop_half(self) -> None:
        """Half a pair of surrogates is no character."""
        if self._high:
            self._buffer.append("\ufffd")
            self._high = ""

    def _end_string(self) -> None:
        self._drop_half()
        self._held = ""
        if self._is_key:
            self._end_key()
            return
        self._show_string()
        self._ended()

    def _end_key(self) -> None:
        frame, key = self._stack[-1], "".join(self._buffer)
        if key in frame.value:
            raise Broken(f"the key {key!r} stands there twice", self.read)
        frame.key, frame.has_key, self._mode = key, True, "value"

    def _show_string(self) -> None:
        """What has come of the string that is open becomes part of the value."""
        if self._mode != "string" or self._is_key or self._shown == len(self._buffer):
            return
        text = "".join(self._buffer)
        if self._shown < 0:
            self._add(text)
        elif not self._stack:
            self.value = text
        else:
            frame = self._stack[-1]
            if isinstance(frame.value, list):
                frame.value[-1] = text
            else:
                frame.value[frame.key] = text
        self._shown = len(self._buffer)

    # Words: numbers, constants, bare keys

    def _in_word(self, letter: str) -> None:
        if letter in _WORD_ENDS or (letter == "/" and self._buffer):
            self._end_word()
            if not self.complete:
                self._take(letter)
        else:
            self._buffer.append(letter)

    def _end_word(self) -> None:
        if self._is_key:
            self._end_key()
            return
        self._add(self._constant("".join(self._buffer)))
        self._ended()

    def _constant(self, word: str) -> Any:
        if word in _CONSTANTS:
            return _CONSTANTS[word]
        digits = word.replace("_", "")
        try:
            number: int | float = float(digits) if set(digits) & set(".eE") else int(digits)
        except ValueError:
            raise Broken(f"{word!r} is neither a number nor a quoted text", self.read - len(word)) from None
        if number != number or number in (float("inf"), float("-inf")):
            raise Broken(f"{word!r} is no number of JSON", self.read - len(word))
        return number

    # Comments

    def _in_comment(self, letter: str) -> None:
        if self._comment == "/":
            if letter == "\n":
                self._mode = "value"
        elif letter == "/" and self._comment.endswith("**"):
            self._mode = "value"
        else:
            self._comment = "**" if letter == "*" else "*"
