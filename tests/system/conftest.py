"""Fixtures of the system tests: real nodes, real gateways."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from modelbus_broker.connection import Bus

from tests.helpers.gateways import Start, started_gateways
from tests.helpers.hosts import NodeProcess, StartNode
from tests.helpers.namespaces import Namespace, second_host


@pytest.fixture
async def start_node(bus: Bus, bus_url: str, tmp_path: Path) -> AsyncIterator[StartNode]:
    """Starts nodes on the test's bus; arguments are those of the command line."""
    nodes: list[NodeProcess] = []

    def start(name: str, *arguments: str) -> NodeProcess:
        nodes.append(NodeProcess(tmp_path / name, "--address", bus_url, *arguments))
        return nodes[-1]

    yield start
    for node in nodes:
        await node.close()


@pytest.fixture
def start() -> Iterator[Start]:
    """Starts gateway processes; arguments are those of the command line."""
    with started_gateways() as start_one:
        yield start_one


@pytest.fixture
def namespace() -> Iterator[Namespace]:
    """A second host; needs root."""
    with second_host() as space:
        yield space
