"""How the kernel schedules the processes through which every request passes."""

from __future__ import annotations

import contextlib
import os


def prefer_throughput() -> None:
    """Lets this process finish its turn's work before what it has woken runs, where both want the same core.

    A request passes four processes. With the kernel's ordinary policy each one that is woken pushes aside the one that
    woke it, and works on a single message: on two cores that costs a third of the requests per second. Under
    ``SCHED_BATCH`` it waits until a core is free or the other has used up its slice, some ms at most; on an idle
    core nothing changes. It needs no privilege; an unusual policy that somebody has chosen stays.
    """
    with contextlib.suppress(AttributeError, OSError):  # not Linux, or forbidden
        if os.sched_getscheduler(0) == os.SCHED_OTHER:
            os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
