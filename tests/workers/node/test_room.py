from __future__ import annotations

import socket
from pathlib import Path

import pytest
from modelbus_broker.messages import GPU, Deployment, NodeRecord
from modelbus_workers.node.resources import Offer, offer, offer_of
from modelbus_workers.node.room import Share, free, free_of, place, why_no_room


def _deployment(**fields: object) -> Deployment:
    values: dict[str, object] = {"name": "chat", "model": "chat", "engine": "echo", "revision": "r1", "cpus": 1.0}
    return Deployment(**(values | fields))  # type: ignore[arg-type]


_OFFER = Offer(
    cpus=4.0,
    memory_mb=8000,
    gpus=tuple(GPU(index=index, name="g", memory_mb=1000) for index in (0, 1, 3)),
    labels={"disk": "ssd"},
    engines=frozenset({"echo"}),
    missing={"vllm": "engine 'vllm' needs vllm: pip install it"},
)


def _why(deployment: Deployment, *taken: Share) -> str:
    return why_no_room(deployment, _OFFER, free(_OFFER, taken))


def test_what_fits_has_room(tmp_path: Path) -> None:
    assert _why(_deployment(cpus=4.0, memory_mb=8000, gpus=3.0, require={"disk": "ssd"})) == ""
    assert _why(_deployment(require={"disk": ""}, model_path=str(tmp_path))) == ""


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"engine": "vllm"}, "engine 'vllm' needs vllm: pip install it"),
        ({"engine": "magic"}, "there is no engine 'magic' here"),
        ({"model_path": "/no/such/model"}, "there is no /no/such/model here"),
        ({"require": {"disk": "hdd"}}, "it requires disk=hdd, here is disk=ssd"),
        ({"require": {"zone": ""}}, "it requires zone, here is no label zone"),
        ({"cpus": 5.0}, "it needs 5 CPUs, 4 of 4 are free"),
        ({"memory_mb": 9000}, "it needs 9000 MB of memory, 8000 of 8000 are free"),
        ({"gpus": 4.0}, "it needs 4 GPUs, of 3 devices are free: 1, 1, 1"),
    ],
)
def test_what_does_not_fit_says_why(fields: dict[str, object], words: str) -> None:
    assert _why(_deployment(**fields)) == words


def test_what_others_took_is_not_free() -> None:
    assert _why(_deployment(cpus=2.5), Share(cpus=2.0)) == "it needs 2.5 CPUs, 2 of 4 are free"
    assert "are free: 0.5, 0, 1" in _why(
        _deployment(gpus=2.0), Share(gpus=(0,), gpu_fraction=0.5), Share(gpus=(1,), gpu_fraction=1.0)
    )


def test_tenths_of_a_cpu_add_up_without_losing_the_last() -> None:
    taken = [Share(cpus=0.1)] * 39
    assert _why(_deployment(cpus=0.1), *taken) == ""
    assert _why(_deployment(cpus=0.1), *taken, Share(cpus=0.1)) != ""


def test_whole_gpus_are_whole_devices() -> None:
    share = place(_deployment(gpus=2.0), free(_OFFER, [Share(gpus=(0,), gpu_fraction=0.1)]))
    assert share is not None
    assert share.gpus == (1, 3)
    assert place(_deployment(gpus=3.0), free(_OFFER, [Share(gpus=(0,), gpu_fraction=0.1)])) is None


def test_fractions_share_one_device_and_leave_the_others_whole() -> None:
    taken: list[Share] = []
    for _ in range(3):
        share = place(_deployment(gpus=0.4), free(_OFFER, taken))
        assert share is not None
        taken.append(share)
    assert [share.gpus for share in taken] == [(0,), (0,), (1,)]


def test_a_host_without_gpus_says_so() -> None:
    bare = Offer(cpus=1.0, memory_mb=100, engines=frozenset({"echo"}))
    assert why_no_room(_deployment(gpus=0.5), bare, free(bare, [])) == "it needs 0.5 GPUs, here are none"


def test_another_nodes_record_tells_the_same() -> None:
    record = NodeRecord(
        id="n", host="h", cpus=4.0, cpus_free=1.0, memory_mb=100, memory_free_mb=50, engines=["echo"],
        gpus=[GPU(index=2, name="g", memory_mb=1)], gpus_free=[0.5],
    )  # fmt: skip
    assert why_no_room(_deployment(gpus=0.5), offer_of(record), free_of(record)) == ""
    assert why_no_room(_deployment(cpus=2.0), offer_of(record), free_of(record)) != ""


def test_a_host_offers_what_it_is_told_to_offer() -> None:
    found = offer(cpus=1.5, memory_mb=100, gpus=2, labels={"a": "b"})
    assert (found.cpus, found.memory_mb, len(found.gpus)) == (1.5, 100, 2)
    assert found.labels == {"host": socket.gethostname(), "a": "b"}
    assert "echo" in found.engines
    everything = offer()
    assert everything.cpus >= 1
    assert everything.memory_mb > 100
