"""What has been said of a request, from frames alone."""

from __future__ import annotations

import random

import pytest
from modelbus_broker.history import History, Seen, covers, cut, stand_ins
from modelbus_broker.messages import Accepted, Delta, Done, Failed, Frame

FIRST, SECOND = "1.1.a", "2.1.b"


def accepted(run: str, *, continues: str = "", starts: list[list[int]] | None = None) -> Accepted:
    starts = starts or []
    return Accepted(
        id="r", run=run, seq=0, ack_subject="", position=sum(start[0] for start in starts), continues=continues, starts=starts
    )  # fmt: skip


def delta(run: str, seq: int, text: str, position: int, choice: int = 0) -> Delta:
    return Delta(id="r", run=run, seq=seq, text=text, position=position, choice=choice)


def done(run: str, seq: int) -> Done:
    return Done(id="r", run=run, seq=seq)


def text(frames: list[Frame] | None) -> str:
    assert frames is not None
    return "".join(frame.text for frame in frames if isinstance(frame, Delta))


#: Its worker was lost after the third token; the second run was given two of them.
LOST: list[Frame] = [
    accepted(FIRST),
    delta(FIRST, 1, "one ", 1),
    delta(FIRST, 2, "two ", 2),
    delta(FIRST, 3, "THREE ", 3),
]
REST: list[Frame] = [
    accepted(SECOND, continues=FIRST, starts=[[2, 8]]), delta(SECOND, 1, "three ", 3), delta(SECOND, 2, "four", 4), done(SECOND, 3),
]  # fmt: skip


@pytest.mark.parametrize("seed", range(5))
def test_runs_that_go_on_from_each_other_are_one_answer_in_whatever_order_frames_come(seed: int) -> None:
    frames = [*LOST, *REST, *LOST[1:3]]
    random.Random(seed).shuffle(frames)
    assert text(History(frames).complete()) == "one two three four"


def test_what_a_reader_of_the_lost_run_has_seen_is_its_own_text() -> None:
    assert text(History([*LOST, *REST]).chain(FIRST)) == "one two THREE "


def test_two_runs_that_both_begin_at_the_beginning_are_never_joined() -> None:
    anew: list[Frame] = [accepted(SECOND), delta(SECOND, 1, "other", 1), done(SECOND, 2)]
    history = History([*LOST, *anew])
    assert text(history.complete()) == "other"
    assert not covers(history.complete() or (), Seen(run=FIRST, seq=2))
    assert covers(history.chain(FIRST) or (), Seen(run=FIRST, seq=2))


@pytest.mark.parametrize("missing", [0, 1, 2])
def test_an_answer_whose_beginning_is_missing_is_not_complete(missing: int) -> None:
    assert History([*LOST[:missing], *LOST[missing + 1 :], *REST]).complete() is None


def test_an_answer_ends_at_the_first_frame_that_is_missing() -> None:
    history = History([*LOST, *REST[:1], *REST[2:]])
    assert history.complete() is None
    assert text(history.chain(SECOND)) == "one two "


def test_a_cut_is_where_each_choice_has_its_tokens_and_characters() -> None:
    frames: list[Frame] = [delta(FIRST, 1, "a", 1), delta(FIRST, 2, "x", 1, 1), delta(FIRST, 3, "b", 2), done(FIRST, 4)]
    assert cut(frames, [[1, 1], [1, 1]]) == frames[:2]
    assert cut(frames, [[2, 2], [1, 1]]) == frames[:3]
    assert cut(frames, [[1, 2], [1, 1]]) is None
    assert cut(frames, [[2, 2]]) is None, "there is a choice that the other run does not know"


def test_the_newest_run_says_whether_the_request_failed() -> None:
    failed = Failed(id="r", run=SECOND, seq=1, code="engine_failed", message="no")
    assert History([*LOST, REST[0], failed]).failure() == failed
    assert (
        History([*LOST, REST[0], Failed(id="r", run=SECOND, seq=1, code="x", message="", handover=True)]).failure()
        is None
    )


def test_lost_frames_that_the_reader_has_seen_are_stood_in_for_by_as_many_tokens_and_characters() -> None:
    seen = Seen(run=FIRST, seq=2, positions=[2])
    assert [(f.position, len(f.text)) for f in stand_ins("r", seen, [[2, 8]]) or () if isinstance(f, Delta)] == [(2, 8)]
    assert stand_ins("r", seen, [[3, 12]]) is None, "a token is missing that the reader has not seen"
