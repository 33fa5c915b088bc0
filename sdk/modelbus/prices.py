"""What answers cost: a table of prices that the user gives, and a meter that adds up tokens and costs.

There are no built-in prices: they change, and a model's name on the bus says nothing of who is paid for it.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
from modelbus_broker.errors import ConfigurationError
from modelbus_broker.messages import Usage

from .hooks import Call, Following, JobCall

_MILLION = 1_000_000


class Price(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Of a million tokens."""

    input: float = 0.0
    output: float = 0.0
    cached_input: float | None = None  #: of input that the provider had read before; None: as the rest of it
    currency: str = "USD"

    def cost(self, usage: Usage) -> float:
        """Of one answer."""
        cached = min(usage.cached_tokens, usage.prompt_tokens)
        cached_price = self.input if self.cached_input is None else self.cached_input
        fresh = (usage.prompt_tokens - cached) * self.input
        return (fresh + cached * cached_price + usage.completion_tokens * self.output) / _MILLION


class PriceTable:
    """Prices by model; those of ``*`` are for all others."""

    def __init__(self, prices: Mapping[str, Price]) -> None:
        self._prices = dict(prices)

    def __repr__(self) -> str:
        return f"PriceTable({sorted(self._prices)})"

    @classmethod
    def read(cls, path: str | Path) -> PriceTable:
        """Reads a JSON file: ``{"chat": {"input": 0.5, "output": 1.5, "currency": "EUR"}, "*": {...}}``.

        Raises:
            ConfigurationError: it is not there, or not of this form.
        """
        try:
            return cls(msgspec.json.decode(Path(path).read_bytes(), type=dict[str, Price]))
        except OSError as error:
            raise ConfigurationError(f"the prices in {path} cannot be read: {error.strerror or error}") from error
        except msgspec.MsgspecError as error:
            raise ConfigurationError(f"the prices in {path} cannot be used: {error}") from error

    def of(self, model: str) -> Price | None:
        """None: nothing is said of this model. An adapter has the price of its model."""
        return self._prices.get(model) or self._prices.get(model.partition(":")[0]) or self._prices.get("*")

    def cost(self, model: str, usage: Usage) -> float | None:
        """Of one answer; None: the price is not known."""
        price = self.of(model)
        return None if price is None else price.cost(usage)


class Spent(msgspec.Struct, kw_only=True):
    """What a model has been asked for so far."""

    requests: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cost: float = 0.0
    currency: str = ""  #: "": the price is not known, and nothing is added up


class Meter:
    """A hook that adds up what this program uses: ``hooks.add(Meter(prices))``; see :mod:`modelbus.hooks` for what it sees."""

    def __init__(self, prices: PriceTable | None = None) -> None:
        self._prices = prices or PriceTable({})
        self.by_model: dict[str, Spent] = {}

    async def __call__(self, call: Call, following: Following) -> Any:
        answer = await following(call)
        if not isinstance(call, JobCall):  # it is in its queue, and has used nothing yet
            self.add(call.model, answer.usage)
        return answer

    def add(self, model: str, usage: Usage) -> None:
        """Adds one answer."""
        spent = self.by_model.setdefault(model, Spent())
        spent.requests += 1
        spent.prompt_tokens += usage.prompt_tokens
        spent.completion_tokens += usage.completion_tokens
        if (price := self._prices.of(model)) is not None:
            spent.cost += price.cost(usage)
            spent.currency = price.currency
