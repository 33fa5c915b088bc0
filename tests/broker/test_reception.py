"""Which frames count."""

from __future__ import annotations

from modelbus_broker.messages import Accepted, Delta, Frame
from modelbus_broker.reception import Reception, Verdict


def accepted(run: str, seq: int = 0) -> Frame:
    return Accepted(id="x", run=run, seq=seq, ack_subject="ack")


def delta(run: str, seq: int) -> Frame:
    return Delta(id="x", run=run, seq=seq, text="t")


def test_frames_of_the_first_run_are_taken_in_order_and_once() -> None:
    reception = Reception()
    assert reception.offer(accepted("1.1.a")) is Verdict.TAKE
    assert reception.offer(delta("1.1.a", 1)) is Verdict.TAKE
    assert reception.offer(delta("1.1.a", 1)) is Verdict.DROP
    assert reception.offer(delta("1.1.a", 3)) is Verdict.GAP
    assert reception.next_seq == 2
    assert reception.offer(delta("1.1.a", 2)) is Verdict.TAKE


def test_a_run_whose_first_frames_are_lost_is_known_and_asked_for_them() -> None:
    reception = Reception()
    assert reception.offer(delta("1.1.a", 4)) is Verdict.GAP
    assert (reception.run, reception.next_seq) == ("1.1.a", 0)


def test_the_first_accepted_wins_and_a_rival_of_the_same_attempt_is_told_to_let_go() -> None:
    reception = Reception()
    reception.offer(accepted("1.1.a"))
    assert reception.offer(accepted("1.2.b")) is Verdict.RIVAL
    assert reception.offer(delta("1.2.b", 1)) is Verdict.DROP
    assert reception.run == "1.1.a"


def test_after_the_fence_is_raised_a_zombie_is_stale_and_the_next_attempt_counts() -> None:
    reception = Reception()
    reception.offer(accepted("1.1.a"))
    assert reception.raise_fence() == 2
    assert reception.offer(delta("1.1.a", 1)) is Verdict.STALE
    assert reception.offer(accepted("1.2.b")) is Verdict.STALE
    assert reception.offer(accepted("2.1.b")) is Verdict.TAKE
    assert reception.offer(delta("2.1.b", 1)) is Verdict.TAKE
