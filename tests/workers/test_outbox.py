"""Rings keep what may have to be sent again."""

from __future__ import annotations

from modelbus_broker.messages import Delta
from modelbus_workers.outbox import RING_BYTES, Ring


def delta(seq: int, text: str = "x") -> Delta:
    return Delta(id="g1-0-a", run="1.1.w", seq=seq, text=text)


def test_a_ring_gives_frames_again_from_any_point_in_portions() -> None:
    ring = Ring("g1-0-a", "1.1.w", "g1")
    for seq in range(10):
        ring.add(delta(seq))
    assert [frame.seq for frame in ring.since(4)] == list(range(4, 10))
    assert [frame.seq for frame in ring.since(4, limit=1)] == [4]
    assert ring.since(10) == []


def test_a_full_ring_forgets_its_oldest_frames() -> None:
    ring = Ring("g1-0-a", "1.1.w", "g1")
    for seq in range(20):
        ring.add(delta(seq, "x" * (RING_BYTES // 10)))
    assert 0 < ring.first < 19
    assert ring.bytes <= RING_BYTES
    assert ring.since(0) == []
    assert ring.since(ring.first)[0].seq == ring.first
