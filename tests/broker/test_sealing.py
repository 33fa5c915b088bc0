from __future__ import annotations

import stat
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from modelbus_broker.errors import ConfigurationError
from modelbus_broker.sealing import make_seal_key, mask, public_seal_key, resolve, seal, unseal

_PRIVATE = "11" * 32
_OTHER = "22" * 32


@given(st.text())
def test_what_was_sealed_comes_back(secret: str) -> None:
    assert unseal(_PRIVATE, seal(public_seal_key(_PRIVATE), secret)) == secret


def test_a_sealed_secret_is_not_in_its_box_and_differs_each_time() -> None:
    public = public_seal_key(_PRIVATE)
    first, second = seal(public, "sk-secret"), seal(public, "sk-secret")
    assert first != second
    assert "sk-secret" not in first


@pytest.mark.parametrize(
    "sealed",
    [seal(public_seal_key(_OTHER), "sk-secret"), "", "AAAA", "not base64 !"],
    ids=["of another", "empty", "no box", "no base64"],
)
def test_what_another_key_sealed_is_refused_without_showing_anything(sealed: str) -> None:
    with pytest.raises(ConfigurationError, match="another cluster") as caught:
        unseal(_PRIVATE, sealed)
    assert caught.value.__cause__ is None
    assert "sk-secret" not in str(caught.value)


def test_the_key_file_is_made_once_and_is_private(tmp_path: Path) -> None:
    path = tmp_path / "home" / "node.key"
    key = make_seal_key(path)
    assert make_seal_key(path) == key
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert [entry.name for entry in path.parent.iterdir()] == ["node.key"]


def test_a_damaged_key_file_is_refused_without_showing_it(tmp_path: Path) -> None:
    path = tmp_path / "node.key"
    path.write_text("something private")
    with pytest.raises(ConfigurationError, match=r"node\.key is not a node key") as caught:
        make_seal_key(path)
    assert "something private" not in str(caught.value)


def test_references_are_resolved_on_this_host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MODELBUS_TEST_KEY", "sk-1")
    (tmp_path / "key").write_text("sk-2\n")
    assert resolve("env:MODELBUS_TEST_KEY") == "sk-1"
    assert resolve(f"file:{tmp_path / 'key'}") == "sk-2"
    assert resolve("plain") == "plain"
    assert resolve("http://host:1/v1") == "http://host:1/v1"


def test_a_reference_to_nothing_says_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MODELBUS_TEST_KEY", raising=False)
    (tmp_path / "empty").write_text("\n")
    with pytest.raises(ConfigurationError, match="MODELBUS_TEST_KEY is not set"):
        resolve("env:MODELBUS_TEST_KEY")
    with pytest.raises(ConfigurationError, match="No such file"):
        resolve(f"file:{tmp_path / 'absent'}")
    with pytest.raises(ConfigurationError, match="is empty"):
        resolve(f"file:{tmp_path / 'empty'}")


def test_masked_parameters_show_no_secret_but_show_references() -> None:
    params = {"api_key": "sk-1", "token": "env:TOKEN", "model": "gpt", "password": ""}
    assert mask(params, {"api_key", "token", "password"}) == {
        "api_key": "***",
        "token": "env:TOKEN",
        "model": "gpt",
        "password": "",
    }
