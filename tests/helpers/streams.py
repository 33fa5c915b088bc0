"""Reads streams of server-sent events as they are on the wire, with their ids."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

import aiohttp
import msgspec


class Event(msgspec.Struct, frozen=True):
    """One event."""

    id: str
    data: str

    @property
    def shown(self) -> Any:
        """What a client makes of it, wherever it comes from."""
        if self.data == "[DONE]":
            return "[DONE]"
        found = json.loads(self.data)
        return {name: found.get(name) for name in ("choices", "usage", "error", "model")}


async def next_event(response: aiohttp.ClientResponse) -> Event | None:
    """The next event of a stream; None at its end."""
    lines: list[str] = []
    while raw := await response.content.readline():
        line = raw.decode().rstrip("\n")
        if line:
            lines.append(line)
            continue
        fields = dict(line.split(": ", 1) for line in lines if not line.startswith(":"))
        if fields:
            return Event(fields.get("id", ""), fields["data"])
        lines = []
    return None


async def some_events(response: aiohttp.ClientResponse, count: int) -> list[Event]:
    """The next events; fails when there are not so many."""
    found: list[Event] = []
    while len(found) < count:
        event = await next_event(response)
        assert event is not None, f"the stream ended after {found}"
        found.append(event)
    return found


async def all_events(response: aiohttp.ClientResponse) -> list[Event]:
    """All that still come."""
    found = []
    while (event := await next_event(response)) is not None:
        found.append(event)
    return found


def text_of(events: Iterable[Event], choice: int = 0) -> str:
    """What a choice has said in these events."""
    said = ""
    for event in events:
        if event.data != "[DONE]":
            for part in json.loads(event.data).get("choices", ()):
                if part["index"] == choice:
                    said += part.get("text") or part.get("delta", {}).get("content") or ""
    return said


def shown(events: Iterable[Event]) -> list[Any]:
    return [event.shown for event in events]
