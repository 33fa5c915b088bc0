"""Presets: found by the names that users write, and documented."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import urlsplit

import msgspec
import pytest
from modelbus_workers.engines.echo import EchoSettings
from modelbus_workers.engines.openai import OpenAISettings
from modelbus_workers.engines.presets import PRESETS, preset_for

DOCS = (Path(__file__).parents[3] / "docs" / "engines-saas.md").read_text()


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("", "openai"),
        ("saas/openai", "openai"),
        ("saas/official_openai", "openai"),
        ("saas/reasoning_openai", "openai"),
        ("saas/azure-openai", "azure_openai"),
        ("saas/Moonshot", "kimi"),
        ("qwen", "qianwen"),
        ("saas/spark", "sparkdesk"),
        ("saas/ollama", "ollama"),
    ],
)
def test_a_preset_is_found_by_any_of_its_names(kind: str, name: str) -> None:
    assert preset_for(kind).name == name


def test_remote_presets_are_reached_by_tls_and_local_ones_need_no_key() -> None:
    for preset in PRESETS.values():
        parts = urlsplit(preset.base_url)
        if parts.hostname == "127.0.0.1":
            assert not preset.needs_key
        elif preset.base_url:
            assert parts.scheme == "https" and preset.needs_key
        assert not preset.base_url.endswith("/")


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_every_preset_is_documented(name: str) -> None:
    assert f"`{name}`" in DOCS
    assert PRESETS[name].base_url in DOCS


@pytest.mark.parametrize("settings", [OpenAISettings, EchoSettings])
def test_every_parameter_is_documented(settings: type[msgspec.Struct]) -> None:
    for field in msgspec.structs.fields(settings):
        assert f"`{field.encode_name}`" in DOCS, field.encode_name
