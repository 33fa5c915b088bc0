"""Reads server-sent events from bytes as they come."""

from __future__ import annotations

from collections.abc import Iterator

from modelbus_broker.errors import UpstreamFailed

#: An event beyond this is no token of a language model.
_MAX_EVENT_BYTES = 16 << 20


class EventParser:
    """Feed it bytes, get (event name, data) of every event that is whole."""

    def __init__(self) -> None:
        self._name = ""
        self._data: list[bytes] = []
        self._size = 0  #: bytes of them
        self._line: list[bytes] = []  #: pieces of the line whose end has not come
        self._line_size = 0

    def feed(self, data: bytes) -> Iterator[tuple[str, bytes]]:
        """Raises UpstreamFailed for an event that is too large, before the whole of it has come."""
        *lines, rest = data.split(b"\n")
        if lines:
            lines[0] = self._end_line() + lines[0]
        self._line.append(rest)
        self._line_size += len(rest)
        if self._size + self._line_size > _MAX_EVENT_BYTES:
            raise UpstreamFailed(f"the provider sent an event of more than {_MAX_EVENT_BYTES >> 20} MiB")
        for line in lines:
            line = line.removesuffix(b"\r")
            if line:
                self._take(line)
            elif self._data:
                yield self._event()
            else:
                self._name = ""

    def end(self) -> Iterator[tuple[str, bytes]]:
        """The last event, when the stream ended without a blank line after it."""
        if rest := self._end_line():
            self._take(rest.removesuffix(b"\r"))
        if self._data:
            yield self._event()

    def _end_line(self) -> bytes:
        line = b"".join(self._line)
        self._line, self._line_size = [], 0
        return line

    def _take(self, line: bytes) -> None:
        field, _, value = line.partition(b":")
        value = value.removeprefix(b" ")
        if field == b"data":
            self._data.append(value)
            self._size += len(value)
        elif field == b"event":
            self._name = value.decode("utf-8", "replace")

    def _event(self) -> tuple[str, bytes]:
        event = self._name, b"\n".join(self._data)
        self._name, self._data, self._size = "", [], 0
        return event
