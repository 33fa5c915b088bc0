from __future__ import annotations

import pytest
from modelbus_broker.buckets import Entry
from modelbus_broker.messages import Claim, Deployment, WorkerRecord, encode
from modelbus_broker.names import claim_key
from modelbus_workers.node.claiming import after_refusal, backoff_s, held_off, may_claim, next_roll, wished


def _entry(node: str) -> Entry:
    return Entry(encode(Claim(deployment="chat", replica=0, node=node, revision="r1")), 7)


_MARKER = Entry(b"", 8, True)


def test_a_claim_is_written_over_nothing_a_marker_or_ones_own_value_only() -> None:
    assert may_claim(None, "me")
    assert may_claim(_MARKER, "me")
    assert may_claim(_entry("me"), "me")
    assert not may_claim(_entry("other"), "me")


def test_a_refused_renewal_means_what_lies_there_now() -> None:
    assert after_refusal(None, "me") == "claim"
    assert after_refusal(_MARKER, "me") == "claim"
    assert after_refusal(_entry("me"), "me") == "go on"
    assert after_refusal(_entry("other"), "me") == "stop"


def test_after_a_reconnect_the_owners_come_first() -> None:
    assert held_off(9.9, 10)
    assert not held_off(10, 10)
    assert not held_off(float("inf"), 10)


def test_every_replica_of_every_deployment_is_wished_for() -> None:
    chat = Deployment(name="chat", model="chat", engine="echo", revision="r1", replicas=2)
    assert wished([chat]) == {claim_key("chat", 0): (chat, 0), claim_key("chat", 1): (chat, 1)}


def _ok(replica: int, revision: str = "r2", state: str = "ok") -> WorkerRecord:
    return WorkerRecord(
        id=f"w{replica}", model="chat", deployment="chat", revision=revision, replica=replica, node="n",
        engine="echo", state=state,  # type: ignore[arg-type]
    )  # fmt: skip


@pytest.mark.parametrize(
    ("replica", "workers", "changes", "step"),
    [
        (0, [], {}, "beside"),
        (0, [], {"room_beside": False}, "stop first"),
        (0, [], {"room_beside": False, "room_after": False}, "stay"),
        (0, [], {"excluded": True}, "stay"),
        (0, [], {"running": "r2"}, "stay"),
        (2, [_ok(0), _ok(1)], {}, "beside"),
        (2, [_ok(0)], {}, "stay"),
        (2, [_ok(0), _ok(1, revision="r1")], {}, "stay"),
        (2, [_ok(0), _ok(1, state="starting")], {}, "stay"),
    ],
)
def test_replicas_roll_one_after_another(
    replica: int, workers: list[WorkerRecord], changes: dict[str, object], step: str
) -> None:
    deployment = Deployment(name="chat", model="chat", engine="echo", revision="r2", replicas=3)
    facts: dict[str, object] = {"running": "r1", "excluded": False, "room_beside": True, "room_after": True} | changes
    running = str(facts.pop("running"))
    assert next_roll(deployment, replica, running, workers, **facts) == step  # type: ignore[arg-type]


def test_an_exclusive_deployment_never_has_two_workers() -> None:
    deployment = Deployment(name="s", model="s", engine="echo", revision="r2", exclusive=True)
    assert next_roll(deployment, 0, "r1", [], excluded=False, room_beside=True, room_after=True) == "stop first"


def test_the_pause_after_crashes_doubles_up_to_a_limit() -> None:
    assert [backoff_s(crashes, 0.5, 30) for crashes in (1, 2, 3, 7, 1000)] == [0.5, 1, 2, 30, 30]
