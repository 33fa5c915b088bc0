"""Children that do not outlive their parent, however it ends."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from collections.abc import Callable

_PR_SET_PDEATHSIG = 1


def die_with_parent(signal_number: int = signal.SIGKILL) -> Callable[[], None]:
    """A ``preexec_fn``: the kernel sends ``signal_number`` to the child when the thread that started it ends.

    Linux only; elsewhere it does nothing and the child must watch its parent's pid itself. Everything that the
    function needs is looked up here, before the fork, because between fork and exec nothing may take a lock.
    """
    if sys.platform != "linux":
        return _nothing
    prctl = ctypes.CDLL(None, use_errno=True).prctl
    parent = os.getpid()

    def preexec() -> None:
        prctl(_PR_SET_PDEATHSIG, int(signal_number), 0, 0, 0)
        # The parent may have ended between the fork and the line above: then nobody will send the signal.
        if os.getppid() != parent:
            os._exit(1)

    return preexec


def _nothing() -> None:
    pass
