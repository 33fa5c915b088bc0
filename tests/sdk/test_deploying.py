"""When a deploy gives up: the decision alone; tests/system/test_cli.py deploys for real."""

from __future__ import annotations

from modelbus.errors import DeploymentFailed, NoRoom
from modelbus.readiness import why_not
from modelbus_broker.messages import Deployment, NodeRecord, StartFailure, WorkerRecord

WISH = Deployment(name="chat", model="chat", engine="echo", revision="r2", replicas=2)


def node(id: str, refused: str = "") -> NodeRecord:
    return NodeRecord(id=id, host=f"host-{id}", refused={"chat.r2": refused} if refused else {})


def failure(node: str, words: str, revision: str = "r2") -> StartFailure:
    return StartFailure(deployment="chat", revision=revision, node=node, words=words)


def worker(replica: int) -> WorkerRecord:
    return WorkerRecord(
        id=f"w{replica}", model="chat", deployment="chat", revision="r2", replica=replica, node="a", engine="echo",
        state="starting",
    )  # fmt: skip


def test_it_waits_while_a_node_may_still_take_a_worker() -> None:
    assert why_not(WISH, [node("a", "no CPU"), node("b")], [], []) is None
    assert why_not(WISH, [node("a"), node("b")], [], [failure("a", "bad key")]) is None


def test_it_waits_while_all_workers_are_on_their_way() -> None:
    assert why_not(WISH, [node("a", "no CPU")], [worker(0), worker(1)], []) is None


def test_without_any_node_there_is_no_room() -> None:
    assert isinstance(why_not(WISH, [], [], []), NoRoom)


def test_what_is_short_is_said_for_every_host() -> None:
    verdict = why_not(WISH, [node("a", "no GPU"), node("b", "no CPU")], [worker(0)], [])

    assert isinstance(verdict, NoRoom)
    assert "host-a: no GPU; host-b: no CPU" in verdict.message


def test_a_failed_start_everywhere_gives_the_engine_s_own_words() -> None:
    verdict = why_not(WISH, [node("a"), node("b")], [], [failure("a", "bad key"), failure("b", "bad key")])

    assert type(verdict) is DeploymentFailed
    assert verdict.message == "bad key"


def test_failures_and_refusals_are_told_apart_by_host() -> None:
    verdict = why_not(WISH, [node("a"), node("b", "no CPU")], [], [failure("a", "bad key")])

    assert type(verdict) is DeploymentFailed
    assert verdict.message == "host-a: bad key; host-b: no CPU"


def test_a_failure_of_another_revision_does_not_count() -> None:
    assert why_not(WISH, [node("a")], [], [failure("a", "bad key", revision="r1")]) is None
