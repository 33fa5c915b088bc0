"""One step of the library: tokens of some sequences go in, logits come out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import llama_cpp
import msgspec
import numpy
from modelbus_broker.errors import EngineFailed

from .library import REPLAY_PIECE, Loaded


class Piece(msgspec.Struct, frozen=True):
    """The next tokens of a sequence."""

    sequence: int
    position: int  #: of the first
    tokens: list[int]
    wanted: Literal["none", "last", "all"] = "none"  #: whose logits


class Decoder:
    """The context of a model; not for use by two threads at once."""

    def __init__(self, loaded: Loaded, count_step: Callable[[], None]) -> None:
        self._loaded, self._count_step = loaded, count_step
        self._memory: Any = llama_cpp.llama_get_memory(loaded.context)
        self._batch: Any = llama_cpp.llama_batch_init(loaded.n_batch, 0, 1)
        self.vocabulary = loaded.vocabulary
        self.sequences = loaded.slots

    def decode(self, pieces: Sequence[Piece]) -> list[Any]:
        """The logits that each piece wants, as a float32 array with a row for each token.

        Raises:
            EngineFailed: the library cannot; its words are in the message.
        """
        batch, at = self._batch, 0
        for piece in pieces:
            last = len(piece.tokens) - 1
            for place, token in enumerate(piece.tokens):
                batch.token[at], batch.pos[at], batch.n_seq_id[at] = token, piece.position + place, 1
                batch.seq_id[at][0] = piece.sequence
                batch.logits[at] = piece.wanted == "all" or (piece.wanted == "last" and place == last)
                at += 1
        batch.n_tokens = at
        code = llama_cpp.llama_decode(self._loaded.context, batch)
        self._count_step()
        if code:
            raise EngineFailed(f"llama.cpp cannot decode (code {code}): {self._loaded.words()}")
        rows, end = [], 0
        for piece in pieces:
            end += len(piece.tokens)
            count = {"none": 0, "last": 1, "all": len(piece.tokens)}[piece.wanted]
            rows.append(numpy.array([self._row(place) for place in range(end - count, end)]))
        return rows

    def _row(self, place: int) -> Any:
        pointer = llama_cpp.llama_get_logits_ith(self._loaded.context, place)
        return numpy.ctypeslib.as_array(pointer, (self.vocabulary,))

    def clear(self, sequence: int) -> None:
        llama_cpp.llama_memory_seq_rm(self._memory, sequence, -1, -1)

    def copy(self, source: int, target: int) -> None:
        """All that the model has read in one sequence it has read in the other too."""
        llama_cpp.llama_memory_seq_cp(self._memory, source, target, -1, -1)

    def replay_piece(self) -> int:
        """How many tokens of an earlier run may be read at once so that what follows is the same to the last bit.

        Where sums are made in another order for several tokens (other kernels, on GPUs and for some kinds of weights),
        another token may be the likeliest, so there it is one.
        """
        tokens = [token % self.vocabulary for token in range(100, 108)]
        single = [self.decode([Piece(0, at, [token], "last")])[0] for at, token in enumerate(tokens)][-1]
        self.clear(0)
        together = self.decode([Piece(0, 0, tokens, "last")])[0]
        self.clear(0)
        return REPLAY_PIECE if (single == together).all() else 1

    def close(self) -> None:
        llama_cpp.llama_batch_free(self._batch)
