"""vLLM's engine core is a process of its own, and why it cannot start stands only in what it writes."""

from __future__ import annotations

import os
import re
import sys
import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

_ERROR = re.compile(r"(?:^|[\s\]])((?:\w+\.)*\w*(?:Error|Exception|Interrupt)): (\S.*)$")
#: Words of vLLM for "look further up".
_NO_CAUSE = ("Engine core initialization failed", "See root cause above", "WorkerProc initialization failed")


class LastWords:
    """Copies what processes write to where it would have gone, and remembers the last lines."""

    def __init__(self) -> None:
        self.lines: deque[str] = deque(maxlen=400)
        self._threads: list[threading.Thread] = []

    @contextmanager
    def listen(self) -> Iterator[None]:
        """Processes that are started inside are heard as long as they live."""
        sys.stdout.flush()
        sys.stderr.flush()
        originals = {stream: os.dup(stream) for stream in (1, 2)}
        try:
            for stream in originals:
                reading, writing = os.pipe()
                os.dup2(writing, stream)
                os.close(writing)
                thread = threading.Thread(
                    target=self._copy, args=(reading, os.dup(originals[stream])), name="vllm-output", daemon=True
                )
                thread.start()
                self._threads.append(thread)
            yield
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            for stream, original in originals.items():
                os.dup2(original, stream)
                os.close(original)

    def _copy(self, reading: int, target: int) -> None:
        with open(reading, "rb") as lines:
            for line in lines:
                self.lines.append(line.decode(errors="replace").rstrip())
                try:
                    os.write(target, line)
                except OSError:
                    pass  # nobody reads there any more; the writers shall not notice
        os.close(target)

    def cause(self, patience_s: float = 2.0) -> str:
        """The last error that was written; "" if none was. Waits for processes that ended to be read to their end."""
        for thread in self._threads:
            thread.join(patience_s)
        return cause(self.lines)


def cause(lines: Iterator[str] | deque[str] | list[str]) -> str:
    """The last error in a process's output that says a reason."""
    found = ""
    for line in lines:
        match = _ERROR.search(line)
        if match is not None and not any(words in line for words in _NO_CAUSE):
            found = f"{match[1]}: {match[2]}"
    return found
