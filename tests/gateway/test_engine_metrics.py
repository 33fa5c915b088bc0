"""What engines count shows in the gateway's /metrics."""

from __future__ import annotations

import aiohttp
from modelbus_gateway.engine_metrics import Measured, exposition
from prometheus_client.parser import text_string_to_metric_families

from tests.gateway.conftest import StartGateway
from tests.helpers.cluster import Cluster

COUNTER = '# HELP e_total Some.\n# TYPE e_total counter\ne_total{kind="a"} 3\n'


def test_the_numbers_of_several_workers_are_told_apart() -> None:
    text = exposition(
        [Measured(worker="w1", model="m", text=COUNTER), Measured(worker="w2", model="n", text=COUNTER)]
    ).decode()
    (family,) = text_string_to_metric_families(text)
    assert text.count("# TYPE") == 1
    assert [(sample.labels, sample.value) for sample in family.samples] == [
        ({"kind": "a", "modelbus_worker": "w1", "modelbus_model": "m"}, 3.0),
        ({"kind": "a", "modelbus_worker": "w2", "modelbus_model": "n"}, 3.0),
    ]


def test_a_text_that_is_none_hides_no_other() -> None:
    broken = Measured(worker="w1", model="m", text="}{ no numbers")
    assert b"e_total" in exposition([broken, Measured(worker="w2", model="m", text=COUNTER)])


async def test_the_engines_of_live_workers_are_asked_over_the_bus(
    cluster: Cluster, start_gateway: StartGateway
) -> None:
    workers = await cluster.deploy_echo(workers=2)
    url = await start_gateway()
    async with aiohttp.ClientSession() as http, http.get(f"{url}/metrics") as response:
        text = await response.text()
    families = {family.name: family for family in text_string_to_metric_families(text)}
    samples = families["echo_steps"].samples
    assert {sample.labels["modelbus_worker"] for sample in samples} == {worker.id for worker in workers}
    assert all(sample.value >= 1 for sample in samples)  # the self-test
    assert "modelbus_gateway_requests" in families
