from __future__ import annotations

import pytest
from modelbus_broker.errors import ConfigurationError
from modelbus_broker.messages import Deployment
from modelbus_broker.sealing import public_seal_key, seal
from modelbus_workers.node.secrets import engine_params

_KEY = "11" * 32


def _deployment(params: dict[str, str], sealed: dict[str, str]) -> Deployment:
    return Deployment(
        name="chat", model="chat", engine="echo", revision="r1", engine_params=params,
        sealed={name: seal(public_seal_key(_KEY), value) for name, value in sealed.items()},
    )  # fmt: skip


def test_sealed_and_referenced_values_are_there_and_named_as_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MODELBUS_TEST_TOKEN", "sk-2")
    params, secret = engine_params(
        _deployment({"rate": "5", "other": "env:MODELBUS_TEST_TOKEN"}, {"api_key": "sk-1"}), _KEY
    )
    assert params == {"rate": "5", "other": "sk-2", "api_key": "sk-1"}
    assert secret == ["api_key", "other"]


def test_a_sealed_reference_is_resolved_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MODELBUS_TEST_TOKEN", "sk-2")
    params, _ = engine_params(_deployment({}, {"api_key": "env:MODELBUS_TEST_TOKEN"}), _KEY)
    assert params == {"api_key": "sk-2"}


def test_what_cannot_be_had_names_the_parameter_and_not_the_value() -> None:
    with pytest.raises(ConfigurationError, match=r"parameter api_key: .*another cluster") as caught:
        engine_params(_deployment({}, {"api_key": "sk-1"}), "22" * 32)
    assert "sk-1" not in str(caught.value)
    with pytest.raises(ConfigurationError, match="parameter api_key: .*MODELBUS_TEST_ABSENT is not set"):
        engine_params(_deployment({"api_key": "env:MODELBUS_TEST_ABSENT"}, {}), _KEY)
