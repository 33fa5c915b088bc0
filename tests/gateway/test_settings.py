"""Arguments, the environment and secrets."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner
from modelbus.cli.gateway import serve
from modelbus_broker.errors import ConfigurationError
from modelbus_gateway.settings import _parser, gateway_settings

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


def test_the_command_line_has_every_flag_of_the_gateway_and_hands_it_on(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "prices.json").write_text("{}")
    given: dict[str, tuple[str, object]] = {
        "host": ("0.0.0.0", "0.0.0.0"), "port": ("8123", 8123), "processes": ("2", 2), "response-role": ("bot", "bot"),
        "allowed-origins": ("http://a", ("http://a",)), "allowed-methods": ("GET", ("GET",)), "allowed-headers": ("X", ("X",)),
        "served-model-name": ("gpt=chat", {"gpt": "chat"}), "prices": (str(tmp_path / "prices.json"),) * 2,
        "files-root": (str(tmp_path), str(tmp_path)), "max-file-mb": ("2", 2 << 20), "max-body-mb": ("0.5", 1 << 19),
        "search-service": ("second", "second"), "embedding-model": ("emb", "emb"), "rewrite-model": ("chat", "chat"),
        "client-stall": ("5", 5.0), "headers-after": ("0", 0.0), "orphan-grace": ("7.5", 7.5), "shutdown-grace": ("1", 1.0),
        "log-level": ("debug", "debug"), "allow-credentials": ("", True), "allow-adapter-updates": ("", True),
    }  # fmt: skip
    field_of = {
        "max-file-mb": "max_file_bytes",
        "max-body-mb": "max_body_bytes",
        "served-model-name": "served_model_names",
    }
    field_of |= {flag: f"{flag.replace('-', '_')}_s" for flag, (_, value) in given.items() if isinstance(value, float)}
    words = [word for flag, (value, _) in given.items() for word in (f"--{flag}", value) if word]
    ran: list[tuple[list[str], dict[str, str]]] = []
    monkeypatch.setattr("os.execve", lambda path, arguments, environment: ran.append((arguments, environment)))
    done = CliRunner().invoke(serve, [*words, *BUS, "--api-key", "secret"])
    ((arguments, environment),) = ran

    settings = gateway_settings(arguments[3:])
    assert done.exit_code == 0 and arguments[1:3] == ["-m", "modelbus_gateway"]
    assert {flag: getattr(settings, field_of.get(flag, flag.replace("-", "_"))) for flag in given} == {
        flag: value for flag, (_, value) in given.items()
    }
    assert environment["MODELBUS_API_KEY"] == "secret" and "secret" not in arguments
    flags = {flag for action in _parser()._actions for flag in action.option_strings}
    assert flags - {flag for option in serve.params for flag in option.opts} == {"-h", "--help"}
