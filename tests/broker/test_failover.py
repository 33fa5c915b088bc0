"""What follows a run that came to nothing."""

from __future__ import annotations

from typing import Any

from modelbus_broker.errors import UpstreamFailed, WorkerLost
from modelbus_broker.failover import MAX_RESCUES, Again, GiveUp, GoOn, Progress, RunEnd, heir_lives, next_attempt
from modelbus_broker.messages import Capabilities, Request, WorkerRecord

REFUSED = UpstreamFailed("refused")
NOTHING = Progress()
SHOWN = Progress(output=True, shown=True, token_ids=[[1, 2]], chars=[5])
HIDDEN = Progress(output=True, token_ids=[[1, 2]], chars=[5])


def request(**fields: Any) -> Request:
    return Request(**({"id": "g1-0-a", "model": "m"} | fields))


def worker(id: str, deployment: str = "d", compat: str = "", **fields: Any) -> WorkerRecord:
    able = Capabilities(can_continue=bool(compat))
    given: dict[str, Any] = {"model": "m", "revision": "r1", "replica": 0, "node": "n", "engine": "e", "state": "ok"}
    return WorkerRecord(
        **(given | {"id": id, "deployment": deployment, "compat": compat, "capabilities": able} | fields)
    )


def lost(compat: str = "", crashed: bool = True) -> RunEnd:
    return RunEnd(worker="a", why="gone", compat=compat, crashed=crashed)


def failed(by: str = "a", error: UpstreamFailed = REFUSED) -> RunEnd:
    return RunEnd(worker=by, why="refused", failure=error)


def decide(
    asked: Request, end: RunEnd, progress: Progress, *workers: WorkerRecord, budget_ms: int = 60_000
) -> Again | GoOn | GiveUp:
    return next_attempt(asked, end, progress, workers, attempt=asked.attempt + 1, budget_ms=budget_ms)


def test_before_any_output_a_lost_run_begins_again_anywhere_and_counts_as_a_crash_if_it_had_started() -> None:
    for crashed in (True, False):
        match decide(request(compat="c"), lost("c", crashed), NOTHING):
            case Again(follower):
                assert (follower.attempt, follower.lane, follower.compat) == (2, "re", "")
                assert (follower.crashes, follower.avoid, follower.budget_ms) == (int(crashed), [], 60_000)
            case other:
                raise AssertionError(other)


def test_output_is_continued_where_the_compat_lives_on() -> None:
    match decide(request(), lost("c"), SHOWN, worker("a", compat="c"), worker("b", compat="c")):
        case GoOn(follower):
            assert (follower.compat, follower.output_token_ids, follower.emitted_chars) == ("c", [[1, 2]], [5])
        case other:
            raise AssertionError(other)


def test_output_that_a_client_has_seen_waits_for_a_worker_that_can_go_on() -> None:
    for others in ([], [worker("a", compat="c")], [worker("b", compat="x")], [worker("b")]):
        match decide(request(), lost("c"), SHOWN, *others):
            case GoOn(follower):
                assert (follower.compat, follower.output_token_ids) == ("c", [[1, 2]])
            case other:
                raise AssertionError(other)
        assert not heir_lives(lost("c"), others)
    assert heir_lives(lost("c"), [worker("a", compat="c"), worker("b", compat="c")])


def test_output_that_a_client_has_seen_ends_in_an_error_where_nobody_will_ever_go_on() -> None:
    match decide(request(), lost(""), SHOWN, worker("b"), worker("d", compat="c")):
        case GiveUp(error):
            assert isinstance(error, WorkerLost)
        case other:
            raise AssertionError(other)


def test_a_handover_is_no_crash() -> None:
    end = RunEnd(worker="a", why="stopped", compat="c", handover=True)
    match decide(request(crashes=1), end, SHOWN, worker("b", compat="c")):
        case GoOn(follower):
            assert (follower.crashes, follower.handover, follower.compat) == (1, True, "c")
        case other:
            raise AssertionError(other)
    match decide(request(), end, NOTHING):
        case Again(follower):
            assert (follower.crashes, follower.handover, follower.compat) == (0, True, "")
        case other:
            raise AssertionError(other)


def test_output_that_nobody_has_seen_is_thrown_away_and_made_anew() -> None:
    match decide(request(output_token_ids=[[1]], emitted_chars=[2]), lost(), HIDDEN, worker("b")):
        case Again(follower):
            assert (follower.output_token_ids, follower.emitted_chars) == ([], [])
        case other:
            raise AssertionError(other)


def test_a_failed_request_goes_to_a_worker_that_has_not_tried_it() -> None:
    match decide(request(avoid=["z"], rescues=1), failed(), NOTHING, worker("a"), worker("b"), worker("z")):
        case Again(follower):
            assert (follower.avoid, follower.rescues, follower.crashes) == (["z", "a"], 2, 0)
        case other:
            raise AssertionError(other)


def test_workers_of_another_deployment_come_first() -> None:
    workers = [worker("a"), worker("a2"), worker("b", "other")]
    match decide(request(), failed(), NOTHING, *workers):
        case Again(follower):
            assert follower.avoid == ["a", "a2"]
        case other:
            raise AssertionError(other)
    # No other deployment is left: the rest of the first one gets it.
    match decide(request(avoid=["b"]), failed(), NOTHING, *workers):
        case Again(follower):
            assert follower.avoid == ["b", "a"]
        case other:
            raise AssertionError(other)


def test_a_worker_of_another_revision_is_no_rescue_for_a_request_that_names_one() -> None:
    match decide(request(revision="r1"), failed(), NOTHING, worker("a"), worker("b", revision="r2")):
        case GiveUp(error):
            assert error is REFUSED
        case other:
            raise AssertionError(other)


def test_alone_a_failure_is_the_end_and_keeps_its_words() -> None:
    for workers in ([], [worker("a")]):
        match decide(request(), failed(), NOTHING, *workers):
            case GiveUp(error):
                assert error is REFUSED
            case other:
                raise AssertionError(other)


def test_when_all_have_failed_quickly_one_tries_with_patience() -> None:
    asked = request(avoid=["b"], rescues=1, fail_fast=True)
    match decide(asked, failed(), NOTHING, worker("a"), worker("b")):
        case Again(follower):
            assert (follower.avoid, follower.fail_fast) == ([], False)
            assert isinstance(decide(follower, failed("b"), NOTHING, worker("a"), worker("b")), GiveUp)
        case other:
            raise AssertionError(other)
    silent = UpstreamFailed("silent", status=504)
    assert decide(asked, failed(error=silent), NOTHING, worker("a"), worker("b")) == GiveUp(silent)


def test_rescues_are_few_and_need_time() -> None:
    workers = [worker(id) for id in "abcdef"]
    assert decide(request(rescues=MAX_RESCUES), failed(), NOTHING, *workers) == GiveUp(REFUSED)
    assert decide(request(), failed(), NOTHING, *workers, budget_ms=10) == GiveUp(REFUSED)


def test_a_failure_in_a_stream_that_a_client_has_seen_is_the_end() -> None:
    assert decide(request(), failed(), SHOWN, worker("a"), worker("b")) == GiveUp(REFUSED)
    assert isinstance(decide(request(), failed(), HIDDEN, worker("a"), worker("b")), Again)


def test_an_answer_that_broke_off_unseen_is_made_once_more_where_there_is_one_worker() -> None:
    match decide(request(), failed(), HIDDEN, worker("a")):
        case Again(follower):
            assert follower.avoid == []
            assert decide(follower, failed(), HIDDEN, worker("a")) == GiveUp(REFUSED)
        case other:
            raise AssertionError(other)
