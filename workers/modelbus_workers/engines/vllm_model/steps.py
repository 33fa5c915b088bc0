"""The steps of vLLM's engine core, counted where vLLM tells its statistics."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from vllm.v1.metrics.loggers import StatLoggerBase


def step_counter(count: Callable[[], object]) -> Any:
    """One of vLLM's ``stat_loggers``: it calls ``count`` for each step that any of its engine cores has made."""

    class StepCounter(StatLoggerBase):  # type: ignore[misc]
        def __init__(self, vllm_config: Any, engine_index: int = 0) -> None:
            pass

        def record(
            self, scheduler_stats: Any, iteration_stats: Any, mm_cache_stats: Any = None, engine_idx: int = 0
        ) -> None:
            count()

        def log_engine_initialized(self) -> None:
            pass

    return StepCounter
