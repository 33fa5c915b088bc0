"""The sampling fields of a request, within OpenAI's bounds. Pure."""

from __future__ import annotations

from modelbus_broker.errors import InvalidRequest
from modelbus_broker.messages import Sampling

from .checks import Need, decimal, integer
from .openai_types import ChatRequest, CompletionRequest

MAX_STOPS = 16


def sampling_of(
    request: ChatRequest | CompletionRequest, max_tokens: int | None, logprobs: int | None, needs: list[Need]
) -> Sampling:
    """What the bus knows them as. Raises InvalidRequest; what only some engines can do is added to ``needs``."""
    n = 1 if request.n is None else request.n
    if n != 1:
        integer("n", n, 1, 128)
        needs.append(Need("n", "n"))
    if request.temperature is not None:
        decimal("temperature", request.temperature, 0, 2)
    if request.top_p is not None:
        decimal("top_p", request.top_p, 0, 1)
    if request.seed is not None:
        integer("seed", request.seed, -(2**63), 2**63 - 1)
        needs.append(Need("seed", "seed"))
    presence, frequency = request.presence_penalty, request.frequency_penalty
    if presence:
        decimal("presence_penalty", presence, -2, 2)
        needs.append(Need("presence_penalty", "penalties"))
    if frequency:
        decimal("frequency_penalty", frequency, -2, 2)
        needs.append(Need("frequency_penalty", "penalties"))
    if request.logit_bias:
        _logit_bias(request.logit_bias)
        needs.append(Need("logit_bias", "logit_bias"))
    _engine_ranges(request)
    return Sampling(
        n=n,
        max_tokens=max_tokens,
        min_tokens=request.min_tokens,
        temperature=request.temperature,
        top_p=request.top_p,
        top_k=request.top_k,
        min_p=request.min_p,
        stop=_stops(request.stop) if request.stop is not None else [],
        stop_token_ids=request.stop_token_ids or [],
        ignore_eos=bool(request.ignore_eos),
        seed=request.seed,
        presence_penalty=presence,
        frequency_penalty=frequency,
        repetition_penalty=request.repetition_penalty,
        logit_bias=request.logit_bias or None,
        logprobs=logprobs,
    )


def _engine_ranges(request: ChatRequest | CompletionRequest) -> None:
    if request.top_k is not None:
        integer("top_k", request.top_k, -1)
    if request.min_p is not None:
        decimal("min_p", request.min_p, 0, 1)
    if request.min_tokens is not None:
        integer("min_tokens", request.min_tokens, 0)
    if request.repetition_penalty is not None and request.repetition_penalty <= 0:
        raise InvalidRequest(
            f"Invalid 'repetition_penalty': expected a value > 0, but got {request.repetition_penalty:g} instead.",
            param="repetition_penalty",
        )


def _logit_bias(biases: dict[str, float]) -> None:
    for token, bias in biases.items():
        if not token.isascii() or not token.isdigit():
            raise InvalidRequest(f"Invalid key in 'logit_bias': {token!r} is no token id.", param="logit_bias")
        decimal(f"logit_bias.{token}", bias, -100, 100)


def _stops(stop: str | list[str]) -> list[str]:
    stops = [stop] if isinstance(stop, str) else stop
    if len(stops) > MAX_STOPS:
        raise InvalidRequest(
            f"Invalid 'stop': array too long. Expected an array with maximum length {MAX_STOPS}, "
            f"but got an array with length {len(stops)} instead.",
            param="stop",
        )
    if "" in stops:
        raise InvalidRequest("Invalid 'stop': empty string. Expected strings with a minimum length 1.", param="stop")
    return stops
