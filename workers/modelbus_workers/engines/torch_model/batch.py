"""The next tokens of all sequences at once: one forward pass, wherever that gives what each would give alone."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from modelbus_broker.errors import EngineFailed

if TYPE_CHECKING:
    from torch import Tensor

log = logging.getLogger(__name__)

#: Their frequencies follow the longest sequence of a batch, so a neighbour would change an answer.
_ROPES_THAT_LOOK_AROUND = {"dynamic", "longrope"}


class Row:
    """One sequence: its key-value cache, or its place in the batch's, and the token that is to be read next."""

    def __init__(self, cache: Any) -> None:
        self.cache = cache  #: None while it is in the batch
        self.token = -1
        self.logits: Tensor | None = None
        self.error: Exception | None = None


class Decoder:
    """Reads a token of each sequence that wants it.

    The caches of a batch are one, each sequence padded on its left to the longest. It is made anew when a sequence
    joins or leaves. A sequence on its own has no padding and computes as if there were no batches.
    """

    def __init__(self, model: Any, count_step: Callable[[], None], *, together: bool = True) -> None:
        self._model = model
        self._count_step = count_step
        parameters = inspect.signature(model.forward).parameters
        self._last_only: dict[str, Any] = {"logits_to_keep": 1} if "logits_to_keep" in parameters else {}
        self._wanting: list[Row] = []
        self._members: list[Row | None] = []
        self._lengths: list[int] = []
        self._cache: Any = None
        #: Whether sequences are read together; otherwise each is when its turn comes.
        able = {"attention_mask", "position_ids"} <= set(parameters)
        self.together = together and able and self._gives_the_same()

    def forward(self, tokens: list[int], cache: Any, *, every: bool = False) -> tuple[Tensor, Any]:
        """Float32 logits of one sequence, the last row or all, and the cache that has these tokens too."""
        import torch

        options = {} if every else dict(self._last_only)
        if cache is not None:
            options["past_key_values"] = cache
        ids = torch.tensor([tokens], device=self._model.device)
        answer = self._model(input_ids=ids, use_cache=True, **options)
        self._count_step()
        cache = getattr(answer, "past_key_values", None)
        if cache is None:
            raise EngineFailed(f"{type(self._model).__name__} has no key-value cache, so this engine cannot run it")
        return answer.logits[0].float(), cache

    def want(self, row: Row, token: int) -> None:
        """The sequence is to read this token."""
        row.token, row.logits = token, None
        self._wanting.append(row)

    def step(self) -> None:
        """Reads what is wanted now, if it is more than one token."""
        if not self.together or len(self._wanting) < 2:
            return
        rows, self._wanting = self._wanting, []
        try:
            self._join(rows)
            for row, logits in zip(rows, self._read(rows), strict=True):
                row.logits = logits
        except Exception as error:
            self._members, self._lengths, self._cache = [], [], None
            for row in rows:
                row.error = error

    def logits(self, row: Row) -> Tensor:
        """What follows the token that was wanted, read now if no step has done so."""
        if row.error is not None:
            raise row.error
        if row.logits is None:
            self._wanting.remove(row)
            self._part(row)
            rows, row.cache = self.forward([row.token], row.cache)
            row.logits = rows[-1]
        return row.logits

    def leave(self, row: Row) -> None:
        """The sequence has ended."""
        if row in self._wanting:
            self._wanting.remove(row)
        row.cache = row.logits = None
        self._members = [None if member is row else member for member in self._members]
        if not any(self._members):
            self._members, self._lengths, self._cache = [], [], None

    def _join(self, rows: list[Row]) -> None:
        """Makes the batch one of these sequences."""
        if self._members == rows:
            return
        import torch
        from torch.nn.functional import pad
        from transformers import DynamicCache

        for member in self._members:
            if member is not None and member not in rows:
                self._part(member)
        lengths = [self._length(row) for row in rows]
        width = max(lengths)
        joined = DynamicCache()
        for number in range(len(next(row.cache or self._cache for row in rows).layers)):
            parts = [self._layer(row, number) for row in rows]
            keys, values = (
                torch.cat([pad(part[side], (0, 0, width - part[side].shape[-2], 0)) for part in parts])
                for side in (0, 1)
            )
            joined.update(keys, values, number)
        self._members, self._lengths, self._cache = list(rows), lengths, joined
        for row in rows:
            row.cache = None

    def _read(self, rows: list[Row]) -> list[Tensor]:
        import torch

        device, width = self._model.device, max(self._lengths)
        lengths = torch.tensor(self._lengths, device=device)[:, None]
        mask = (torch.arange(width + 1, device=device)[None] >= width - lengths).long()
        answer = self._model(
            input_ids=torch.tensor([[row.token] for row in rows], device=device),
            attention_mask=mask, position_ids=lengths, past_key_values=self._cache, use_cache=True, **self._last_only,
        )  # fmt: skip
        self._count_step()
        self._lengths = [length + 1 for length in self._lengths]
        return list(answer.logits[:, -1].float().unbind())

    def _part(self, row: Row) -> None:
        """Gives a sequence of the batch a cache of its own again."""
        if row.cache is not None or row not in self._members:
            return
        from transformers import DynamicCache

        own = DynamicCache()
        for number in range(len(self._cache.layers)):
            own.update(*(part.clone() for part in self._layer(row, number)), number)
        row.cache = own
        self._members = [None if member is row else member for member in self._members]
        if not any(self._members):
            self._members, self._lengths, self._cache = [], [], None

    def _length(self, row: Row) -> int:
        return int(row.cache.get_seq_length()) if row.cache is not None else self._lengths[self._members.index(row)]

    def _layer(self, row: Row, number: int) -> tuple[Tensor, Tensor]:
        if row.cache is not None:
            layer = row.cache.layers[number]
            return layer.keys, layer.values
        layer, place = self._cache.layers[number], self._members.index(row)
        length = self._lengths[place]
        return layer.keys[place : place + 1, :, -length:], layer.values[place : place + 1, :, -length:]

    def _gives_the_same(self) -> bool:
        """Tries it: two short sequences of different length, together and each on its own."""
        import torch

        if _ROPES_THAT_LOOK_AROUND & set(_rope_types(self._model.config.to_dict())):
            return False
        try:
            with torch.inference_mode():
                alone, rows = [], []
                for tokens in ([3, 5, 7, 11, 13], [17, 19]):
                    cache = self.forward(tokens, None)[1]
                    if not _is_plain(cache):
                        return False
                    alone.append(self.forward([23], self.forward(tokens, None)[1])[0][-1])
                    rows.append(Row(cache))
                    rows[-1].token = 23
                self._join(rows)
                together = self._read(rows)
        except Exception as error:  # code of any model
            log.info("sequences are read one by one: %s: %s", type(error).__name__, error)
            return False
        finally:
            self._members, self._lengths, self._cache = [], [], None
        # In less than float32 the last bits depend on the shapes.
        allowed = 1e-4 if self._model.dtype == torch.float32 else 5e-2
        return all(
            float((one - other).abs().max()) <= allowed * float(one.abs().max())
            for one, other in zip(alone, together, strict=True)
        )


def _is_plain(cache: Any) -> bool:
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
