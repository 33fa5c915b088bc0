"""A small process that ends what a killed node leaves behind.

A worker dies with its node by the parent-death signal, but the engine's own children hang on the worker, not on the
node. They are in the worker's process group, whose numbers the node writes here: ``+PGID`` when a worker starts,
``-PGID`` when its group is gone. The end of the input without a farewell means that the node is dead.

It is started by path and uses nothing but the standard library, so that it stays small.
"""

import os
import signal
import sys


def main() -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    groups: set[int] = set()
    for line in sys.stdin:
        group = int(line[1:])
        if line[0] == "+":
            groups.add(group)
        else:
            groups.discard(group)
    for group in groups:
        try:
            os.killpg(group, signal.SIGKILL)
        except (ProcessLookupError, PermissionError):
            pass


if __name__ == "__main__":
    main()
