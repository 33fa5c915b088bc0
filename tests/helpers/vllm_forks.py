"""vLLM's children as forks of the test's process, which has imported vLLM already: seconds instead of half a minute."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator
from contextlib import contextmanager

import pytest


@contextmanager
def vllm_forks() -> Iterator[None]:
    """Engines that are started inside have forked children. What else they do is the same; workers of modelbus spawn."""
    import vllm.v1.engine.utils
    import vllm.v1.executor.multiproc_executor

    with pytest.MonkeyPatch.context() as patch:
        for module in (vllm.v1.engine.utils, vllm.v1.executor.multiproc_executor):
            patch.setattr(module, "get_mp_context", lambda: multiprocessing.get_context("fork"))
        yield
