"""Arguments, the environment and secrets."""

from __future__ import annotations

from pathlib import Path

import pytest
from modelbus_broker.errors import ConfigurationError
from modelbus_gateway.settings import gateway_settings

BUS = ["--address", "nats://127.0.0.1:4222"]


@pytest.fixture(autouse=True)
def no_key_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MODELBUS_API_KEY", raising=False)


def test_only_this_host_is_served_unless_said_otherwise() -> None:
    settings = gateway_settings(BUS)
    assert (settings.host, settings.port, settings.api_key, settings.processes) == ("127.0.0.1", 8000, "", 1)
    assert settings.address == "http://127.0.0.1:8000"


def test_flags_may_be_written_with_underscores() -> None:
    settings = gateway_settings(
        [*BUS, "--response_role=bot", "--allowed_origins", '["http://a", "http://b"]', "--log_level", "DEBUG"]
    )
    assert settings.response_role == "bot"
    assert settings.allowed_origins == ("http://a", "http://b")
    assert settings.log_level == "debug"


@pytest.mark.parametrize("port", ["80000", "0", "-1"])
def test_a_port_out_of_range_is_refused_with_the_range(port: str) -> None:
    with pytest.raises(ConfigurationError, match="1 to 65535"):
        gateway_settings([*BUS, f"--port={port}"])


def test_the_key_of_the_environment_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MODELBUS_API_KEY", "from-environment")
    assert gateway_settings([*BUS, "--api-key", "from-flag"]).api_key == "from-environment"


def test_a_key_can_come_from_a_variable_or_a_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("OUR_KEY", "one")
    (tmp_path / "key").write_text("two\n")
    assert gateway_settings([*BUS, "--api-key", "env:OUR_KEY"]).api_key == "one"
    assert gateway_settings([*BUS, "--api-key", f"file:{tmp_path / 'key'}"]).api_key == "two"


@pytest.mark.parametrize("key", ["env:NOT_SET_ANYWHERE", "file:/does/not/exist"])
def test_a_key_that_is_not_there_stops_the_program(key: str) -> None:
    with pytest.raises(ConfigurationError, match="--api-key"):
        gateway_settings([*BUS, "--api-key", key])


def test_the_key_is_not_shown() -> None:
    settings = gateway_settings([*BUS, "--api-key", "very-secret"])
    assert "very-secret" not in repr(settings)


def test_tls_files_that_cannot_be_used_stop_the_program(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="ssl-certfile"):
        gateway_settings([*BUS, "--ssl_keyfile", "key.pem"])
    with pytest.raises(ConfigurationError, match=r"absent\.pem"):
        gateway_settings([*BUS, "--ssl_certfile", str(tmp_path / "absent.pem")])


def test_other_names_for_models_are_read() -> None:
    settings = gateway_settings([*BUS, "--served_model_name", "gpt-4=chat", "default"])
    assert settings.served_model_names == {"gpt-4": "chat", "default": ""}
