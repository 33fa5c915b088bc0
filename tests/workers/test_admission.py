"""What happens to a message that came out of the queue."""

from __future__ import annotations

import pytest
from modelbus_broker.messages import Request
from modelbus_workers.admission import decide


def action(request: Request, **given: object) -> str:
    facts: dict[str, object] = {
        "now_ms": 1_000.0, "stored_ms": 1_000.0, "starts": 0, "revision": "r1", "compat": "c1", "free": 1,
        "ended": False,
    }  # fmt: skip
    return decide(request, **facts | given).action  # type: ignore[arg-type]


def request(**fields: object) -> Request:
    return Request(id="g1-0-a", model="m", budget_ms=1_000, **fields)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("asked", "facts", "expected"),
    [
        (request(), {}, "run"),
        (request(), {"ended": True}, "done"),
        (request(), {"now_ms": 2_001.0}, "expire"),
        (request(crashes=3), {}, "dead"),
        (request(crashes=1), {"starts": 2}, "dead"),
        (request(crashes=1), {}, "run"),
        (request(crashes=2), {}, "run_alone"),
        (request(crashes=1), {"starts": 1}, "run_alone"),
        (request(crashes=2), {"free": 0}, "give_back"),
        (request(crashes=2, max_crashes=50), {}, "run"),
        (request(max_crashes=1), {}, "run"),
        (request(crashes=1, max_crashes=1), {}, "dead"),
        (request(), {"cancelled": True}, "cancelled"),
        (request(), {"cancelled": True, "ended": True}, "done"),
        (request(), {"free": 0}, "give_back"),
        (request(revision="r2"), {}, "give_back"),
        (request(revision="r1"), {}, "run"),
        (request(compat="c2"), {}, "give_back"),
        (request(compat="c1"), {}, "run"),
        (request(crashes=3), {"now_ms": 2_001.0}, "expire"),
        (request(avoid=["w1"]), {"worker": "w1"}, "leave"),
        (request(avoid=["w1"]), {"worker": "w2"}, "run"),
        (request(avoid=["w1"]), {"worker": "w1", "now_ms": 1_500.0}, "run"),
    ],
)
def test_each_delivery_is_judged(asked: Request, facts: dict[str, object], expected: str) -> None:
    assert action(asked, **facts) == expected
