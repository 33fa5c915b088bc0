"""Notices when this process stood still: it was stopped, its host slept, or something kept the event loop for itself.

What it holds may have gone to another worker meanwhile, and nobody will have been able to say so.
"""

from __future__ import annotations

import time
from collections.abc import Callable

#: Publishers give up a worker that is silent for a little longer than this.
STOOD_STILL_S = 1.0


class Pulse:
    """Beats every half second while the process runs; ``stood_still`` is called when it did not, with the seconds."""

    def __init__(self, stood_still: Callable[[float], object]) -> None:
        self._stood_still = stood_still
        self._last = time.monotonic()

    def beat(self) -> float:
        """To be called often, and before a message is judged. Returns ``time.monotonic()``."""
        now = time.monotonic()
        gap, self._last = now - self._last, now
        if gap > STOOD_STILL_S:
            self._stood_still(gap)
        return now
