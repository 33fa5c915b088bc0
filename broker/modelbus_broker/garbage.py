"""The garbage collector of a long-running service."""

from __future__ import annotations

import gc

#: Container objects between two looks at the young ones; Python's own 700 is for small programs.
YOUNG = 20_000


def settle() -> None:
    """Call it once when everything is loaded: what is there now stays, and is not looked through again.

    A full collection over all modules stops the event loop for tens of milliseconds, in the middle of every stream.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(YOUNG, 20, 50)
