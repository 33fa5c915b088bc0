"""vLLM's schedulers, whose grammars read what an earlier run has made. They live in the engine core's process."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future
from typing import Any

from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler

#: In a request's ``extra_args``: how many tokens at the end of its prompt its grammar has to read first.
READ_FIRST = "modelbus_read_first"


class _ReadsFirst:
    structured_output_manager: Any

    def add_request(self, request: Any) -> None:
        params, structured = request.sampling_params, request.structured_output_request
        count = (params.extra_args or {}).get(READ_FIRST, 0) if params is not None else 0
        if count and structured is not None:
            # The grammar is being made by this executor, which takes one thing after the other.
            tokens = list(request.prompt_token_ids[-count:])
            submit = self.structured_output_manager.executor.submit
            structured.grammar = submit(_advanced, structured._grammar, request.request_id, tokens)
        super().add_request(request)  # type: ignore[misc]


class ContinuingScheduler(_ReadsFirst, Scheduler):  # type: ignore[misc]
    """vLLM's ordinary scheduler."""


class ContinuingAsyncScheduler(_ReadsFirst, AsyncScheduler):  # type: ignore[misc]
    """vLLM's scheduler that is a step ahead of the model."""


def _advanced(grammar: Any, request_id: str, tokens: Sequence[int]) -> Any:
    made = grammar.result() if isinstance(grammar, Future) else grammar
    if not made.accept_tokens(request_id, list(tokens)):
        raise ValueError("the answer so far does not keep to its form")
    return made


def scheduler_name(asynchronous: bool) -> str:
    """What ``scheduler_cls`` must be, by whether vLLM schedules a step ahead."""
    kind = ContinuingAsyncScheduler if asynchronous else ContinuingScheduler
    return f"{kind.__module__}.{kind.__qualname__}"
