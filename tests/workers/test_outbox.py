"""Rings keep what may have to be sent again."""

from __future__ import annotations

import pytest
from modelbus_broker.messages import Delta, decode_frames, encode, encode_list
from modelbus_workers.outbox import RING_BYTES, Ring


def delta(seq: int, text: str = "x") -> Delta:
    return Delta(id="g1-0-a", run="1.1.w", seq=seq, text=text)


def seqs(frames: list[bytes]) -> list[int]:
    return [frame.seq for frame in decode_frames(encode_list(frames))]


@pytest.mark.parametrize("count", [0, 1, 15, 16, 65_535, 65_536])
def test_encoded_frames_make_the_same_message_as_frames(count: int) -> None:
    assert encode_list([encode(delta(1))] * count) == encode([delta(1)] * count)


def test_a_ring_gives_frames_again_from_any_point_in_portions() -> None:
    ring = Ring("g1-0-a", "1.1.w", "g1")
    for seq in range(10):
        ring.add(delta(seq))
    assert seqs(ring.since(4)) == list(range(4, 10))
    assert seqs(ring.since(4, limit=1)) == [4]
    assert ring.since(10) == []


def test_a_full_ring_forgets_its_oldest_frames() -> None:
    ring = Ring("g1-0-a", "1.1.w", "g1")
    for seq in range(20):
        ring.add(delta(seq, "x" * (RING_BYTES // 10)))
    assert 0 < ring.first < 19
    assert ring.bytes <= RING_BYTES
    assert ring.since(0) == []
    assert seqs(ring.since(ring.first))[0] == ring.first
