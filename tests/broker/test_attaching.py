"""What follows from what was found out about a request that another publisher had. The rest is in tests/gateway/test_resuming.py."""

from __future__ import annotations

import itertools

import msgspec
import pytest
from modelbus_broker.attaching import NOBODY_S, Known, Step, decide

LONG = NOBODY_S + 1


@pytest.mark.parametrize(
    ("known", "step"),
    [
        (Known(held=True, complete=True), "wait"),
        (Known(running=True), "adopt"),
        (Known(running=True, belongs=False, complete=True), "replay"),
        (Known(running=True, belongs=False, begun=True, seen_frames=True, request=True), "go_on"),
        (Known(running=True, belongs=False, begun=True), "lost"),
        (Known(complete=True), "replay"),
        (Known(failed=True), "fail"),
        (Known(queued=True, begun=True, seen_frames=True, request=True), "wait"),
        (Known(queued=True, begun=True, seen_frames=True, request=True, nobody_for_s=LONG), "go_on"),
        (Known(begun=True, request=True, nobody_for_s=LONG), "lost"),
        (Known(queued=True, nobody_for_s=LONG), "wait"),
        (Known(request=True), "wait"),
        (Known(request=True, nobody_for_s=LONG), "publish"),
        (Known(), "lost"),
    ],
)
def test_what_follows(known: Known, step: Step) -> None:
    assert decide(known) == step


def test_no_state_makes_a_second_text_or_a_second_run() -> None:
    names = [field for field in Known.__struct_fields__ if field != "nobody_for_s"]
    for values in itertools.product((False, True), repeat=len(names)):
        for nobody_for_s in (0.0, LONG):
            known = msgspec.convert({**dict(zip(names, values, strict=True)), "nobody_for_s": nobody_for_s}, Known)
            step = decide(known)
            if step == "publish":
                assert not (known.held or known.running or known.queued or known.begun), known
            if step == "go_on":
                assert known.seen_frames and known.request and not (known.held or known.complete), known
            if step == "adopt":
                assert known.running and known.belongs, known
