"""The next tokens of all sequences at once: one forward pass, wherever that gives what each would give alone."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from modelbus_broker.errors import EngineFailed

from .adapters import Adapters, AdapterWeights

if TYPE_CHECKING:
    from torch import Tensor

log = logging.getLogger(__name__)

#: Their frequencies follow the longest sequence of a batch, so a neighbour would change an answer.
_ROPES_THAT_LOOK_AROUND = {"dynamic", "longrope"}
_MOVED = "rope_deltas"


class Row:
    """One sequence: its key-value cache, or its place in a batch's, and the token that is to be read next."""

    def __init__(self, cache: Any, adapter: AdapterWeights | None = None) -> None:
        self.cache = cache  #: None while it is in a batch
        self.adapter = adapter
        self.token = -1
        self.logits: Tensor | None = None
        self.error: Exception | None = None


class Decoder:
    """Reads tokens of sequences, each with its adapter, and one token of all that want it."""

    def __init__(
        self, model: Any, count_step: Callable[[], None], *, together: bool = True, adapters: Adapters | None = None
    ) -> None:
        self._model = model
        self._count_step = count_step
        self._adapters = adapters
        parameters = inspect.signature(model.forward).parameters
        self._last_only: dict[str, Any] = {"logits_to_keep": 1} if "logits_to_keep" in parameters else {}
        self._wanting: list[Row] = []
        #: Parts that keep for themselves how far the images of a sequence have moved its positions (Qwen2-VL and its kin).
        self._placed = [module for module in model.modules() if hasattr(module, _MOVED)]
        #: One for each adapter that sequences run with, and one for those without.
        self._batches: dict[AdapterWeights | None, _Batch] = {}
        #: Whether sequences are read together; otherwise each is when its turn comes.
        able = {"attention_mask", "position_ids"} <= set(parameters) and not self._placed
        self.together = together and able and self._gives_the_same()

    def forward(
        self,
        tokens: list[int],
        cache: Any,
        *,
        adapter: AdapterWeights | None = None,
        every: bool = False,
        features: Mapping[str, Any] | None = None,
    ) -> tuple[Tensor, Any]:
        """Float32 logits of one sequence, the last row or all, and the cache that has these tokens too."""
        import torch

        options: dict[str, Any] = {**({} if every else self._last_only), **(features or {})}
        if cache is not None:
            options["past_key_values"] = cache
        ids = torch.tensor([tokens], device=self._model.device)
        answer = self._call(adapter, input_ids=ids, **options)
        cache = getattr(answer, "past_key_values", None)
        if cache is None:
            raise EngineFailed(f"{type(self._model).__name__} has no key-value cache, so this engine cannot run it")
        return answer.logits[0].float(), cache

    def want(self, row: Row, token: int) -> None:
        """The sequence is to read this token."""
        row.token, row.logits = token, None
        self._wanting.append(row)

    def step(self) -> None:
        """Reads what is wanted now: in one pass what has the same adapter, if that is more than one token."""
        if not self.together:
            return
        groups: dict[AdapterWeights | None, list[Row]] = {}
        for row in self._wanting:
            groups.setdefault(row.adapter, []).append(row)
        for adapter, rows in groups.items():
            if len(rows) > 1:
                self._read(adapter, rows)

    def logits(self, row: Row) -> Tensor:
        """What follows the token that was wanted, read now if no step has done so."""
        if row.error is not None:
            raise row.error
        if row.logits is None:
            self._wanting.remove(row)
            self._part(row)
            rows, row.cache = self.forward([row.token], row.cache, adapter=row.adapter)
            row.logits = rows[-1]
        return row.logits

    def leave(self, row: Row) -> None:
        """The sequence has ended."""
        if row in self._wanting:
            self._wanting.remove(row)
        row.cache = row.logits = None
        self._without(row)

    def _read(self, adapter: AdapterWeights | None, rows: list[Row]) -> None:
        self._wanting = [row for row in self._wanting if row not in rows]
        batch = self._batches.setdefault(adapter, _Batch())
        try:
            batch.join(rows)
            for row, logits in zip(rows, self._read_joined(batch, rows), strict=True):
                row.logits = logits
        except Exception as error:
            del self._batches[adapter]
            for row in rows:
                row.error = error

    def _read_joined(self, batch: _Batch, rows: list[Row]) -> list[Tensor]:
        import torch

        device, width = self._model.device, max(batch.lengths)
        lengths = torch.tensor(batch.lengths, device=device)[:, None]
        mask = (torch.arange(width + 1, device=device)[None] >= width - lengths).long()
        answer = self._call(
            rows[0].adapter, input_ids=torch.tensor([[row.token] for row in rows], device=device), attention_mask=mask,
            position_ids=lengths, past_key_values=batch.cache, **self._last_only,
        )  # fmt: skip
        batch.lengths = [length + 1 for length in batch.lengths]
        return list(answer.logits[:, -1].float().unbind())

    def _call(self, adapter: AdapterWeights | None, **arguments: Any) -> Any:
        if self._adapters is not None:
            self._adapters.use(adapter)
        if self._placed:
            # Of the sequence whose turn it is, and not of the one before.
            moved = getattr(arguments.get("past_key_values"), "moved", None) or [None] * len(self._placed)
            for module, value in zip(self._placed, moved, strict=True):
                setattr(module, _MOVED, value)
        answer = self._model(use_cache=True, **arguments)
        if self._placed:
            answer.past_key_values.moved = [getattr(module, _MOVED) for module in self._placed]
        self._count_step()
        return answer

    def _part(self, row: Row) -> None:
        if row.cache is None and (batch := self._batches.get(row.adapter)) is not None:
            batch.part(row)
            self._without(row)

    def _without(self, row: Row) -> None:
        batch = self._batches.get(row.adapter)
        if batch is not None and not batch.without(row):
            del self._batches[row.adapter]

    def _gives_the_same(self) -> bool:
        """Tries it: two short sequences of different length, together and each on its own."""
        import torch

        if _ROPES_THAT_LOOK_AROUND & set(_rope_types(self._model.config.to_dict())):
            return False
        try:
            with torch.inference_mode():
                alone, rows, batch = [], [], _Batch()
                for tokens in ([3, 5, 7, 11, 13], [17, 19]):
                    cache = self.forward(tokens, None)[1]
                    if not is_plain(cache):
                        return False
                    alone.append(self.forward([23], self.forward(tokens, None)[1])[0][-1])
                    rows.append(Row(cache))
                    rows[-1].token = 23
                batch.join(rows)
                together = self._read_joined(batch, rows)
        except Exception as error:  # code of any model
            log.info("sequences are read one by one: %s: %s", type(error).__name__, error)
            return False
        # In less than float32 the last bits depend on the shapes.
        allowed = 1e-4 if self._model.dtype == torch.float32 else 5e-2
        return all(
            float((one - other).abs().max()) <= allowed * float(one.abs().max())
            for one, other in zip(alone, together, strict=True)
        )


class _Batch:
    """The caches of several sequences as one, each padded on its left to the longest.

    It is made anew when a sequence joins or leaves. A sequence on its own has no padding and computes as if there were
    no batches.
    """

    def __init__(self) -> None:
        self.lengths: list[int] = []
        self.cache: Any = None
        self._members: list[Row | None] = []

    def join(self, rows: list[Row]) -> None:
        """Makes the batch one of these sequences."""
        if self._members == rows:
            return
        import torch
        from torch.nn.functional import pad
        from transformers import DynamicCache

        for member in self._members:
            if member is not None and member not in rows:
                self.part(member)
        lengths = [self._length(row) for row in rows]
        width = max(lengths)
        joined = DynamicCache()
        for number in range(len(next(row.cache or self.cache for row in rows).layers)):
            parts = [self._layer(row, number) for row in rows]
            keys, values = (
                torch.cat([pad(part[side], (0, 0, width - part[side].shape[-2], 0)) for part in parts])
                for side in (0, 1)
            )
            joined.update(keys, values, number)
        self._members, self.lengths, self.cache = list(rows), lengths, joined
        for row in rows:
            row.cache = None

    def part(self, row: Row) -> None:
        """Gives a sequence a cache of its own again, if it is in here."""
        if row.cache is not None or row not in self._members:
            return
        from transformers import DynamicCache

        own = DynamicCache()
        for number in range(len(self.cache.layers)):
            own.update(*(part.clone() for part in self._layer(row, number)), number)
        row.cache = own
        self.without(row)

    def without(self, row: Row) -> bool:
        """Forgets a sequence. Whether any is left."""
        self._members = [None if member is row else member for member in self._members]
        return any(self._members)

    def _length(self, row: Row) -> int:
        return int(row.cache.get_seq_length()) if row.cache is not None else self.lengths[self._members.index(row)]

    def _layer(self, row: Row, number: int) -> tuple[Tensor, Tensor]:
        if row.cache is not None:
            layer = row.cache.layers[number]
            return layer.keys, layer.values
        layer, place = self.cache.layers[number], self._members.index(row)
        length = self.lengths[place]
        return layer.keys[place : place + 1, :, -length:], layer.values[place : place + 1, :, -length:]


def is_plain(cache: Any) -> bool:
    """Whether it has nothing but all keys and values of all layers."""
    from transformers.cache_utils import DynamicCache, DynamicLayer

    return type(cache) is DynamicCache and all(
        type(layer) is DynamicLayer and layer.is_initialized and layer.keys.dim() == 4 for layer in cache.layers
    )


def _rope_types(config: Mapping[str, Any]) -> Iterator[str]:
    for name, value in config.items():
        if isinstance(value, Mapping):
            yield from _rope_types(value)
        elif name in ("rope_type", "type") and isinstance(value, str):
            yield value
