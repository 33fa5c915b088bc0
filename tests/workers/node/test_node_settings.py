from __future__ import annotations

from pathlib import Path

import pytest
from modelbus_broker.errors import BusUnavailable, ConfigurationError
from modelbus_workers.node.settings import parse


def test_the_command_line_becomes_settings(tmp_path: Path) -> None:
    settings = parse(
        ["--address", "host:4222", "--label", "disk=ssd", "--label", "zone=", "--cpus", "1.5", "--gpus", "2"]
        + ["--memory-mb", "100", "--home", str(tmp_path)]
    )
    assert settings.bus.url == "nats://host:4222"
    assert settings.labels == {"disk": "ssd", "zone": ""}
    assert (settings.cpus, settings.gpus, settings.memory_mb, settings.home) == (1.5, 2, 100, tmp_path)


def test_a_node_needs_a_bus() -> None:
    with pytest.raises(BusUnavailable, match="modelbus start --head"):
        parse([])


def test_a_label_needs_a_name_and_a_value() -> None:
    with pytest.raises(ConfigurationError, match="NAME=VALUE"):
        parse(["--address", "h", "--label", "ssd"])


def test_less_than_nothing_cannot_be_offered(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        parse(["--address", "h", "--cpus", "-1"])
    assert caught.value.code == 2
    assert "less than nothing" in capsys.readouterr().err
