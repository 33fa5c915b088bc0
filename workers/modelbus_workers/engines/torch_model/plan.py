"""A request's sampling fields, checked, with the model's own defaults for what the request leaves open."""

from __future__ import annotations

from typing import Any

import msgspec
from modelbus_broker.errors import InvalidRequest
from modelbus_broker.messages import Sampling

from .loading import TextModel

#: Below this a temperature is 0: dividing by it would overflow.
_COLDEST = 1e-5


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """How the tokens of one request are chosen; every field has its value."""

    temperature: float = 0.0  #: 0: always the likeliest
    top_p: float = 1.0
    top_k: int = 0  #: 0: all
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: dict[int, float] = {}
    seed: int | None = None
    min_tokens: int = 0
    stop: list[str] = []
    stop_ids: frozenset[int] = frozenset()  #: these tokens end an answer
    logprobs: int | None = None  #: alternatives per token; None: no log probabilities


def make_plan(sampling: Sampling, loaded: TextModel) -> Plan:
    """The plan of a request.

    What the request leaves open comes from the model's generation config. A model that does not say ``do_sample``
    is greedy, unless the request itself sets a field that only sampling has.

    Raises:
        InvalidRequest: a field has a value that it cannot have; ``param`` names it.
    """
    defaults = loaded.model.generation_config
    own = defaults if defaults.do_sample else None
    sampled = any(value is not None for value in (sampling.top_p, sampling.top_k, sampling.min_p))
    temperature = sampling.temperature
    if temperature is None:
        temperature = _first(getattr(own, "temperature", None), 1.0) if own or sampled else 0.0
    plan = Plan(
        temperature=0.0 if temperature < _COLDEST else temperature,
        top_p=_first(sampling.top_p, getattr(own, "top_p", None), 1.0),
        # -1 is vLLM's word for all
        top_k=max(0, _first(sampling.top_k, getattr(own, "top_k", None), 0)),
        min_p=_first(sampling.min_p, getattr(own, "min_p", None), 0.0),
        repetition_penalty=_first(sampling.repetition_penalty, defaults.repetition_penalty, 1.0),
        presence_penalty=sampling.presence_penalty or 0.0,
        frequency_penalty=sampling.frequency_penalty or 0.0,
        logit_bias=_bias(sampling, loaded.vocabulary),
        seed=sampling.seed,
        min_tokens=sampling.min_tokens or 0,
        stop=[stop for stop in sampling.stop if stop],
        stop_ids=frozenset(sampling.stop_token_ids) | (frozenset() if sampling.ignore_eos else loaded.eos),
        logprobs=sampling.logprobs,
    )
    _check(plan, temperature)
    return plan


def _first(*values: Any) -> Any:
    return next(value for value in values if value is not None)


def _bias(sampling: Sampling, vocabulary: int) -> dict[int, float]:
    biases: dict[int, float] = {}
    for text, bias in (sampling.logit_bias or {}).items():
        if not text.isdecimal() or int(text) >= vocabulary:
            raise InvalidRequest(f"logit_bias: {text!r} is no token id in 0 to {vocabulary - 1}", param="logit_bias")
        biases[int(text)] = bias
    return biases


def _check(plan: Plan, temperature: float) -> None:
    refused = [
        ("temperature", temperature < 0, "must not be negative"),
        ("top_p", not 0 < plan.top_p <= 1, "must be above 0 and at most 1"),
        ("min_p", not 0 <= plan.min_p <= 1, "must be in 0 to 1"),
        ("repetition_penalty", plan.repetition_penalty <= 0, "must be above 0"),
    ]
    for name, wrong, words in refused:
        if wrong:
            raise InvalidRequest(f"{name} {words}", param=name)
